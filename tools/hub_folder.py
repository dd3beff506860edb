"""What a Hugging Face Hub folder says about a model: timm's config.json and a model card."""

from pathlib import Path
from typing import Any

import timm
from yacs.config import CfgNode

from config import image_size, load_config
from data.imagenet import readable_names
from models import model_arguments
from models.registry import VARIANTS, body_of
from tools.pages import render_page

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# Arguments that do not change what a trained model computes.
TRAINING_ARGUMENTS = ("proj_drop_rate", "drop_path_rate", "backend", "gate_bias")
# What a description shares with timm's own of the architecture.
SHARED = ("fixed_input_size", "first_conv", "classifier")


def _arguments(config: CfgNode) -> dict[str, Any]:
    return {name: value for name, value in model_arguments(config).items() if name not in TRAINING_ARGUMENTS}


def architecture_of(config: CfgNode) -> tuple[str, dict[str, Any]]:
    """timm's name of a configuration's model, and the arguments by which it differs from what that name builds.

    A model that is none of the official ones is the variant called like its MODEL.TYPE, or the first of its body, with
    every argument. A baseline of timm has its own name.
    """
    if config.MODEL.TYPE == "timm":
        described = timm.get_pretrained_cfg(config.MODEL.TIMM.NAME)
        size = {"img_size": list(image_size(config))} if described and described.fixed_input_size else {}
        return config.MODEL.TIMM.NAME.partition(".")[0], {**size, **config.MODEL.TIMM.KWARGS}
    own = _arguments(config)
    for name, variant in VARIANTS.items():
        file = CONFIGS / f"{variant.config}.yaml"
        official = load_config(str(file)) if file.is_file() else None
        if official and body_of(official) is body_of(config) and _arguments(official) == own:
            return name, {}
    variants = body_of(config).variants
    return (config.MODEL.TYPE if config.MODEL.TYPE in variants else next(iter(variants))), own


def hub_config(config: CfgNode, num_features: int, classes: list[str] | None) -> dict[str, Any]:
    """config.json as timm reads it. The evaluation transform is that of TEST.CROP and TEST.RESIZE."""
    architecture, arguments = architecture_of(config)
    official = timm.get_pretrained_cfg(architecture)
    assert official is not None
    content: dict[str, Any] = {
        "architecture": architecture,
        "num_classes": config.MODEL.NUM_CLASSES,
        "num_features": num_features,
        "global_pool": "avg",
    }
    if classes:
        content["label_names"] = classes
        words = readable_names(classes, len(classes))
        if words != classes:
            content["label_descriptions"] = dict(zip(classes, words, strict=True))
    if arguments:
        content["model_args"] = arguments
    content["pretrained_cfg"] = {
        **{key: getattr(official, key) for key in SHARED},
        "input_size": [config.MODEL.SWIN.IN_CHANS, *image_size(config)],
        "mean": config.DATA.MEAN,
        "std": config.DATA.STD,
        "interpolation": config.DATA.INTERPOLATION,
        "crop_pct": config.TEST.CROP_RATIO if config.TEST.CROP else 1.0,
        "crop_mode": "center" if config.TEST.CROP and config.TEST.RESIZE == "shorter" else "squash",
        "num_classes": config.MODEL.NUM_CLASSES,
        "pool_size": None,
    }
    return content


def model_card(name: str, config: CfgNode, hub: dict[str, Any], parameters: int, metadata: dict[str, str]) -> str:
    """README.md of the folder: what the model is, how it is loaded, what it was made from. It claims no accuracy."""
    height, width = image_size(config)
    return render_page(
        Path(__file__).with_name("model_card.md"),
        name=name,
        family=body_of(config).cls.family,
        hub=hub,
        parameters=parameters,
        height=height,
        width=width,
        about=metadata,
    )
