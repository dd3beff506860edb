"""What every variant's entry in timm's registry shares: its default configuration, and how it is built and loaded."""

from inspect import signature
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, resolve_pretrained_cfg
from torch import Tensor, nn
from yacs.config import CfgNode

from config import image_size, value_of
from models.adaptation import adapt_position_tables, released_names, require_fit
from models.classifier import Classifier
from models.files import FUNCTION_KEYS, CheckpointError, load_checkpoint, num_classes_of, stored_config
from models.layers import Grid

RELEASED_WEIGHTS = "https://huggingface.co/ZachMeng/PolaFormer"


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
        row: the variant's constructor arguments; `given`, the caller's, take precedence.

    Raises:
        ValueError: `pretrained` without a file.
        CheckpointError: weights that do not fit, or that were trained for another function than the model computes.
    """
    arguments = {**row, **given}
    overlay = dict(arguments.pop("pretrained_cfg_overlay", None) or {})
    cfg = resolve_pretrained_cfg(name, arguments.get("pretrained_cfg"), overlay)
    source = {"img_size": cfg.input_size[-2:], **(given.get("pretrained_model_args") or {})}
    if pretrained and not (cfg.has_weights or cfg.state_dict):
        raise ValueError(
            f"no weights of {name} can be downloaded through timm: fetch them from {RELEASED_WEIGHTS} and add"
            f' pretrained_cfg_overlay={{"file": "FILE.pth"}}, or pass pretrained=False'
        )
    defaults = {key: parameter.default for key, parameter in signature(cls).parameters.items()}
    file = str(overlay.get("file") or "")
    if pretrained and file and not file.endswith(".safetensors"):
        # read here, because released files hold a configuration object that timm's reader refuses
        checkpoint = load_checkpoint(file)
        overlay["state_dict"] = checkpoint["model"]
        headless = not any(key.endswith("head.bias") for key in checkpoint["model"])
        overlay.setdefault("num_classes", 0 if headless else num_classes_of(checkpoint, file))
        if config := stored_config(checkpoint, file):
            source = {"img_size": image_size(config), "window_size": config.MODEL.SWIN.WINDOW_SIZE}
            _require_function(config, {**defaults, **arguments}, file)

    def adapted(state: dict[str, Tensor], model: Classifier) -> dict[str, Tensor]:
        with torch.device("meta"):
            twin = cls(**{key: value for key, value in {**arguments, **source}.items() if key in defaults})
        state, _ = released_names(model, state)
        grids = {table: grid for table, grid in twin.position_grids().items() if _fits(state, table, grid)}
        state, _ = adapt_position_tables(model, state, grids, name)
        require_fit(model, state, file or name, (f"{cfg.first_conv}.weight", "head.weight", "head.bias"))
        return state

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
    return model  # a Classifier, or timm's wrapper of one for features_only


def _fits(state: dict[str, Tensor], table: str, grid: Grid) -> bool:
    return table in state and state[table].shape[-2] == grid[0] * grid[1]


def _require_function(config: CfgNode, arguments: dict[str, Any], file: str) -> None:
    """Raise CheckpointError unless what changes a model's function, but no shape, is as the file was trained with."""
    own = {key: key.rsplit(".", 1)[1].lower() for key in FUNCTION_KEYS if ".LRA." not in key}
    differing = [
        f"{name}={value_of(config, key)!r}, not {arguments[name]!r}"
        for key, name in own.items()
        if name in arguments and arguments[name] != value_of(config, key)
    ]
    if differing:
        raise CheckpointError(f"{file} was trained with {'; '.join(differing)}: pass what it was trained with")
