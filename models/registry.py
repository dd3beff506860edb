"""The bodies there are: what each reads, its variants as rows of the tables of the papers, and how timm builds one.

A body is a class with the decorator `register_body`; main.py, timm, torch.hub, tools/export.py and the model table go
by what stands here. `build_model` makes the model of a configuration.
"""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cache
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, resolve_pretrained_cfg
from torch import Tensor, nn

from .adaptation import adapt_position_tables, released_names, require_fit
from .classifier import Classifier, TrainableModel
from .files import CheckpointError, load_checkpoint, num_classes_of, stored_config, verify_by_sidecar, weights_of
from .kernels import KERNELS, kernel_of
from .options import DEFAULTS, AttentionOptions, value_of

ATTENTION = "MODEL.LA.ATTENTION"  # names the kernel, of the bodies that leave it open
IMAGES, TOKENS = "images", "tokens"  # what a body reads, and a data source delivers


@dataclass(frozen=True)
class Variant:
    """A row of a paper's table.

    `config` is its file in configs/, `row` the constructor's arguments, `about` a line for the model table and timm's
    docstring, `timm` what differs from the default in timm's description.
    """

    config: str
    row: Mapping[str, Any]
    about: str
    timm: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Body:
    """An architecture: its class, the values of MODEL.TYPE that mean it, what it reads, and its variants by name."""

    cls: type[TrainableModel]
    types: tuple[str, ...]
    reads: str
    variants: Mapping[str, Variant]


BODIES: dict[str, Body] = {}  # by MODEL.TYPE
VARIANTS: dict[str, Variant] = {}  # by timm's name
B = TypeVar("B", bound=type[TrainableModel])


def register_body(
    types: Sequence[str], *, reads: str = IMAGES, variants: Mapping[str, Variant] | None = None
) -> Callable[[B], B]:
    """Make a class the body of these MODEL.TYPEs, and its variants known to timm.

    The class has `config_arguments(config)`, what a configuration says to its constructor apart from the number of
    classes, and `function_keys`, the keys that change what it computes but no shape.
    """

    def register(cls: B) -> B:
        body = Body(cls, tuple(types), reads, variants or {})
        for name in body.types:
            if name in BODIES:
                raise ValueError(f"two bodies have MODEL.TYPE {name!r}: {BODIES[name].cls.__name__}, {cls.__name__}")
            BODIES[name] = body
        VARIANTS.update(body.variants)
        for name, variant in body.variants.items():
            _register_with_timm(cls, name, variant)
        return cls

    return register


def list_models() -> list[str]:
    """The names that `timm.create_model` accepts for the models of this package."""
    return list(VARIANTS)


def body_of(config: Mapping[str, Any]) -> Body:
    """The body of a configuration. Raises ValueError for an unknown MODEL.TYPE."""
    name = value_of(config, "MODEL.TYPE")
    if not isinstance(name, str) or name not in BODIES:
        names = ", ".join(sorted(BODIES))
        if name == DEFAULTS["MODEL.TYPE"]:
            raise ValueError(
                f"the configuration names no model of this project: MODEL.TYPE is {name!r}, as it is where nothing sets"
                f" it; expected one of {names}"
            )
        raise ValueError(f"MODEL.TYPE {repr(name)[:80]} is unknown, expected one of {names}")
    return BODIES[name]


def model_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration says to the constructor of its model, apart from the number of classes."""
    return body_of(config).cls.config_arguments(config)


def attention_options(config: Mapping[str, Any]) -> AttentionOptions:
    """What the model of a configuration makes its attention of: MODEL.LA, and what its body does not leave to that."""
    arguments, own = model_arguments(config), asdict(AttentionOptions())
    return AttentionOptions.of({name: arguments[name] for name in own if name in arguments})


def announce_attention(config: Mapping[str, Any], device: torch.device) -> str:
    """One phrase: what computes attention. Raises ValueError where it cannot run on the device."""
    if "attention" not in model_arguments(config):
        return f"{body_of(config).cls.family}'s own attention"
    options = attention_options(config)
    return kernel_of(options.attention).announce(options, device)


def build_model(config: Mapping[str, Any], num_classes: int | None = None) -> TrainableModel:
    """The freshly initialised model of a configuration, on the CPU.

    Args:
        config: a nested mapping with the keys of config.py; those that it lacks have their defaults.
        num_classes: size of the head; None takes MODEL.NUM_CLASSES, 0 leaves the head out.

    Raises:
        ValueError: an unknown MODEL.TYPE, or values that the model does not accept.
    """
    classes = value_of(config, "MODEL.NUM_CLASSES") if num_classes is None else num_classes
    model = body_of(config).cls.create(num_classes=classes, **model_arguments(config))
    try:
        model.set_grad_checkpointing(value_of(config, "TRAIN.USE_CHECKPOINT"))
    except AssertionError as problem:  # timm's word for a model that cannot
        raise ValueError(f"TRAIN.USE_CHECKPOINT: {type(model).__name__} recomputes nothing ({problem})") from None
    return model


def function_differences(
    stored: Mapping[str, Any] | None, config: Mapping[str, Any], source: str, more: Sequence[str] = ()
) -> list[str]:
    """A line for each key by which a file's configuration computes another function with the same shapes.

    Args:
        stored: the configuration in the file `source`; None: it has none, and nothing can be said.
        more: keys of the data source that change what a model is given.
    """
    if stored is None:
        return []
    keys = [*body_of(config).cls.function_keys, *more]
    if ATTENTION in keys:  # the body has the kernel that it names
        for name in (value_of(stored, ATTENTION), value_of(config, ATTENTION)):
            keys += KERNELS[name].function_keys if name in KERNELS else ()
    pairs = {key: (value_of(stored, key), value_of(config, key)) for key in dict.fromkeys(keys)}
    pairs |= body_of(config).cls.ambiguous_sizes(stored, config)
    return [
        f"{source} was trained with {key} {theirs}, this configuration has {ours}, which gives other results from the"
        f" same weights; --opts {key} {theirs} restores it"
        for key, (theirs, ours) in pairs.items()
        if theirs != ours
    ]


# -- timm


def _register_with_timm(cls: type[TrainableModel], name: str, variant: Variant) -> None:
    """Register one variant, unless another copy of this package in the process has done so: then that one stays."""
    assert issubclass(cls, Classifier), "timm's models are classifiers of images"

    def create(pretrained: bool = False, **given: Any) -> nn.Module:
        return create_variant(cls, name, pretrained, dict(variant.row), given)

    create.__name__, create.__qualname__, create.__module__ = name, name, cls.__module__
    create.__doc__ = variant.about
    module = sys.modules[cls.__module__]  # where timm looks for the description of the variants
    setattr(module, name, create)
    if timm.is_model(name):
        _warn_of_a_second_copy(timm.model_entrypoint(name).__module__.rpartition(".")[0])
        return
    described: Any = module.__dict__.setdefault("default_cfgs", {})
    described.update(generate_default_cfgs({name: default_cfg(cls.first_conv, **variant.timm)}))
    register_model(create)


@cache
def _warn_of_a_second_copy(first: str) -> None:
    warnings.warn(
        f"{__package__} is a second copy of {first} in this process: timm and PyTorch keep the"
        " models and operators of the first; import one of them only",
        stacklevel=2,
    )


def default_cfg(first_conv: str, size: int = 224, **changed: Any) -> dict[str, Any]:
    """timm's description of a variant: input, evaluation transform and the names of its first and last layer.

    There is no URL: the released weights are not in a form that timm downloads, and `pretrained=True` needs a file. The
    released models were evaluated with a resize that squashes the aspect ratio, at 384 pixels without a crop.
    """
    return {
        "input_size": (3, size, size),
        "fixed_input_size": True,
        "pool_size": (size // 32, size // 32),
        "num_classes": 1000,
        "crop_pct": 0.875,
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": first_conv,
        "classifier": "head",
        "license": "mit",
        "paper_ids": "arXiv:2501.15061",
        "paper_name": "PolaFormer: Polarity-aware Linear Attention for Vision Transformers",
        **changed,
    }


def create_variant(
    cls: type[Classifier], name: str, pretrained: bool, row: dict[str, Any], given: dict[str, Any]
) -> nn.Module:
    """The model of a registered name, as `timm.create_model` asks for it.

    Args:
        pretrained: load the weights that `pretrained_cfg_overlay={"file": …}` or the folder of a `local-dir:` name
            names, adapted to the classes, channels and image size asked for. The file may be one of ours, a released
            one, or whatever timm reads.
        row: the variant's constructor arguments; `given`, the caller's, take precedence, and may hold timm's `device`
            and `dtype`.

    Raises:
        ValueError: `pretrained` without a file.
        CheckpointError: weights that do not fit, or that were trained for another function than the model computes.
    """
    accepted = _constructor_defaults(cls)
    arguments = {**row, **given}
    device, dtype = arguments.pop("device", None), arguments.pop("dtype", None)
    overlay = dict(arguments.pop("pretrained_cfg_overlay", None) or {})
    cfg = resolve_pretrained_cfg(name, arguments.get("pretrained_cfg"), overlay)
    source = {"img_size": cfg.input_size[-2:], **(given.get("pretrained_model_args") or {})}
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise ValueError(
            f"no weights of {name} can be downloaded through timm: {cls.released}; add"
            f' pretrained_cfg_overlay={{"file": "FILE.pth"}}, or pass pretrained=False'
        )
    file = os.path.expanduser(overlay["file"]) if overlay.get("file") else ""
    if pretrained and cfg.file and Path(cfg.file).is_file():  # timm reads the file, also that of a `local-dir:` name
        verify_by_sidecar(Path(cfg.file))
    if pretrained and file and not file.endswith(".safetensors"):
        # read here, because released files hold a configuration object that timm's reader refuses
        checkpoint = load_checkpoint(file)
        overlay["state_dict"] = next(iter(weights_of(checkpoint, "auto", file).values()))
        headless = "head.bias" not in overlay["state_dict"]
        overlay.setdefault("num_classes", 0 if headless else num_classes_of(checkpoint, file))
        if (config := stored_config(checkpoint)) is not None:
            source = cls.sizes(config)
            _require_function(cls, config, {**accepted, **arguments}, file)

    def adapted(state: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
        with torch.device("meta"):
            twin = cls(**{key: value for key, value in {**arguments, **source}.items() if key in accepted})
        state, _ = released_names(model, state)
        lengths = {table: tensor.shape[-2] for table, tensor in state.items() if tensor.ndim > 1}
        grids = {table: (h, w) for table, (h, w) in twin.position_grids().items() if lengths.get(table) == h * w}
        state, _ = adapt_position_tables(model, state, grids, name)
        require_fit(model, state, file or name, (f"{cfg.first_conv}.weight", "head.weight", "head.bias"))
        return state

    with nullcontext() if device is None else torch.device(device):
        model: Any = build_model_with_cfg(
            cls,
            name,
            pretrained,
            pretrained_cfg_overlay=overlay,
            pretrained_filter_fn=adapted,
            feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
            **arguments,
        )
    model.pretrained_cfg.pop("state_dict", None)
    return model.to(dtype=dtype)  # a Classifier, or timm's wrapper of one for features_only


def _constructor_defaults(cls: type[Classifier]) -> dict[str, Any]:
    """What the constructor accepts, with its defaults."""
    own = {name: each.default for name, each in signature(cls).parameters.items() if each.kind == each.KEYWORD_ONLY}
    return own | asdict(AttentionOptions())


def _require_function(
    cls: type[Classifier], config: Mapping[str, Any], arguments: Mapping[str, Any], file: str
) -> None:
    """Raise CheckpointError unless what changes a model's function, but no shape, is as the file was trained with."""
    keys = list(cls.function_keys)
    if ATTENTION in keys:
        keys += kernel_of(value_of(config, ATTENTION)).function_keys
    own = {key: key.rsplit(".", 1)[1].lower() for key in keys}
    differing = [
        f"{name}={value_of(config, key)!r}, not {arguments[name]!r}"
        for key, name in own.items()
        if name in arguments and arguments[name] != value_of(config, key)
    ]
    if differing:
        raise CheckpointError(f"{file} was trained with {'; '.join(differing)}: pass what it was trained with")
