"""Any image model of timm in the place of ours: the same loop, data and tools, a comparison one YAML apart.

`MODEL.TYPE timm` with MODEL.TIMM.NAME and MODEL.TIMM.KWARGS; configs/baselines/ has three of them.
"""

import difflib
import sys
import types
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .classifier import TrainableModel
from .layers import Grid
from .options import image_size, value_of
from .registry import VARIANTS, register_body

# What MODEL.TIMM.KWARGS leaves to others, and to whom.
DECIDED = {
    "num_classes": "the data set (MODEL.NUM_CLASSES)",
    "img_size": "DATA.IMG_SIZE",
    "in_chans": "MODEL.SWIN.IN_CHANS",
    "pretrained": "--pretrained FILE",
    "checkpoint_path": "--pretrained FILE",
    "features_only": "nobody: a classifier is trained",
}
LEAVES_OUT = {"drop_path_rate": "MODEL.DROP_PATH_RATE 0", "drop_rate": "MODEL.DROP_RATE 0"}


def listed_models(name: str) -> str:
    """A few of timm's models that `name` may mean."""
    names = [each for each in timm.list_models() if each not in VARIANTS]
    return ", ".join(difflib.get_close_matches(name, [each for each in names if name in each] or names, 5, 0.0))


def _joined(theirs: type[nn.Module]) -> type[nn.Module]:
    """A class that is both: what timm's model has comes first."""
    return types.new_class(theirs.__name__, (theirs, TimmModel))


@register_body(["timm"])
class TimmModel(TrainableModel):
    """What timm's models lack to be trained, stored and looked at like ours.

    `create` makes one object of two classes, timm's and this one, as torch's parametrizations do: its parameters keep
    timm's names, so that files of either side are read by the other.
    """

    function_keys = ("MODEL.TIMM.NAME", "MODEL.TIMM.KWARGS")
    family = "timm"

    pretrained_cfg: dict[str, Any]
    input_shape: tuple[int, ...]  # channels, height, width

    @classmethod
    def config_arguments(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "name": value_of(config, "MODEL.TIMM.NAME"),
            "keywords": dict(value_of(config, "MODEL.TIMM.KWARGS")),
            "img_size": image_size(config),
            "in_chans": value_of(config, "MODEL.SWIN.IN_CHANS"),
            "drop_rate": value_of(config, "MODEL.DROP_RATE"),
            "drop_path_rate": value_of(config, "MODEL.DROP_PATH_RATE"),
        }

    @classmethod
    def create(cls, **arguments: Any) -> TrainableModel:
        """timm's model of a name. Raises ValueError for an unknown one, and for what its constructor refuses."""
        name, keywords = arguments.pop("name"), arguments.pop("keywords")
        if name in VARIANTS:
            raise ValueError(f"MODEL.TIMM.NAME {name} is of this project: --cfg configs/{VARIANTS[name].config}.yaml")
        if not name:
            raise ValueError("MODEL.TIMM.NAME is empty, and MODEL.TYPE timm needs a model of timm.list_models()")
        if not timm.is_model(name):
            raise ValueError(f"MODEL.TIMM.NAME {name!r} is no model of timm; there are {listed_models(name)}, …")
        if given := next((word for word in keywords if word in DECIDED), None):
            raise ValueError(f"MODEL.TIMM.KWARGS names {given}, which is decided by {DECIDED[given]}; leave it out")
        size = arguments.pop("img_size")
        for rate in LEAVES_OUT:  # many constructors do not know them
            if not arguments[rate]:
                del arguments[rate]
        try:
            if (described := timm.get_pretrained_cfg(name)) and described.fixed_input_size:
                arguments["img_size"] = size
            model: Any = timm.create_model(name, **{**arguments, **keywords})
        except Exception as problem:  # a constructor refuses in any way
            helps = next((f"; {key} leaves it out" for word, key in LEAVES_OUT.items() if word in str(problem)), "")
            raise ValueError(
                f"MODEL.TIMM.NAME {name}: timm does not build it with { ({**arguments, **keywords}) }: {problem}{helps}"
            ) from problem
        model.__class__ = _joined(type(model))
        model.input_shape = (arguments["in_chans"], *size)
        model.require_input()
        return model

    def require_input(self) -> None:
        """Raise ValueError where the model, on the meta device, does not make logits from images of its size."""
        if not next(self.parameters()).is_meta:
            return
        try:
            logits = self(self.example_input(2))
        except (AssertionError, RuntimeError, ValueError) as problem:
            raise ValueError(f"{type(self).__name__} of timm takes no images of {self.input_size}: {problem}") from None
        if self.num_classes and getattr(logits, "shape", None) != (2, self.num_classes):
            raise ValueError(
                f"{type(self).__name__} of timm does not give one vector of logits: it is no plain classifier"
            )

    @property
    def classifiers(self) -> tuple[str, ...]:  # type: ignore[override]
        named = self.pretrained_cfg.get("classifier") or ()
        return (named,) if isinstance(named, str) else tuple(named)

    @property
    def input_size(self) -> str:
        return "size {}×{}".format(*self.input_shape[1:])

    def example_input(self, batch: int) -> Tensor:
        return torch.randn(batch, *self.input_shape, device=next(self.parameters()).device)

    def converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        module = sys.modules[timm.model_entrypoint(self.pretrained_cfg["architecture"]).__module__]
        convert = getattr(module, "checkpoint_filter_fn", None)
        return convert(state, self) if convert else state

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        if enable:
            raise AssertionError("timm has none for it")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        raise ValueError(f"timm names no layers of {type(self).__name__}: TRAIN.LAYER_DECAY has to be 1.0")

    def position_grids(self) -> dict[str, Grid]:
        """None that we resize: `converted` does what timm does."""
        return {}
