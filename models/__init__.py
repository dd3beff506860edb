"""Models by name and by configuration.

Importing this package registers every variant with timm, so that `timm.create_model("pola_swin_tiny")` finds it.
`build_model` reads MODEL.TYPE and the keys that shape it.
"""

from typing import Any

from yacs.config import CfgNode

from config import IMAGE_MODELS, image_size, parse_sr_ratios
from models import pola_pvt, pola_swin
from models.classifier import Classifier, TrainableModel
from models.lra import SequenceClassifier, sequence_arguments
from models.pola_pvt import PVT_DEPTHS, PolaPVT
from models.pola_swin import PolaSwin

assert ("pola_swin", *PVT_DEPTHS) == IMAGE_MODELS, "config.IMAGE_MODELS and the models that exist differ"


def list_models() -> list[str]:
    """The names that `timm.create_model` accepts for the models of this package."""
    return [*pola_swin.default_cfgs, *pola_pvt.default_cfgs]


def model_arguments(config: CfgNode) -> dict[str, Any]:
    """What a configuration says to the constructor of its image model, apart from the number of classes.

    Raises ValueError for an unknown MODEL.TYPE.
    """
    shared = {
        "img_size": image_size(config),
        "in_chans": config.MODEL.SWIN.IN_CHANS,
        "attn_type": config.MODEL.LA.ATTN_TYPE,
        "alpha": config.MODEL.LA.ALPHA,
        "kernel_size": config.MODEL.LA.KERNEL_SIZE,
        "proj_drop_rate": config.MODEL.DROP_RATE,
        "drop_path_rate": config.MODEL.DROP_PATH_RATE,
        "backend": config.MODEL.LA.BACKEND,
        "attention": config.MODEL.LA.ATTENTION,
        "learn_exponent": config.MODEL.LA.LEARN_EXPONENT,
        "gate": config.MODEL.LA.GATE,
    }
    if config.MODEL.TYPE in PVT_DEPTHS:
        return {
            **shared,
            "depths": PVT_DEPTHS[config.MODEL.TYPE],
            "sr_ratios": parse_sr_ratios(config.MODEL.LA.PVT_LA_SR_RATIOS),
        }
    if config.MODEL.TYPE == "pola_swin":
        return {
            **shared,
            "patch_size": config.MODEL.SWIN.PATCH_SIZE,
            "embed_dim": config.MODEL.SWIN.EMBED_DIM,
            "depths": config.MODEL.SWIN.DEPTHS,
            "num_heads": config.MODEL.SWIN.NUM_HEADS,
            "window_size": config.MODEL.SWIN.WINDOW_SIZE,
            "mlp_ratio": config.MODEL.SWIN.MLP_RATIO,
            "qkv_bias": config.MODEL.SWIN.QKV_BIAS,
            "qk_scale": config.MODEL.SWIN.QK_SCALE,
            "ape": config.MODEL.SWIN.APE,
            "patch_norm": config.MODEL.SWIN.PATCH_NORM,
        }
    raise ValueError(f"MODEL.TYPE {config.MODEL.TYPE!r} is unknown, expected one of {', '.join(IMAGE_MODELS)}")


def build_classifier(config: CfgNode, num_classes: int | None = None) -> Classifier:
    """`build_model` for a configuration of an image model. Raises ValueError for another."""
    arguments = model_arguments(config) | {
        "num_classes": config.MODEL.NUM_CLASSES if num_classes is None else num_classes
    }
    model = PolaSwin(**arguments) if config.MODEL.TYPE == "pola_swin" else PolaPVT(**arguments)
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model


def build_model(config: CfgNode, num_classes: int | None = None) -> TrainableModel:
    """The freshly initialised model of a configuration, on the CPU.

    Args:
        num_classes: size of the head; None takes MODEL.NUM_CLASSES, 0 leaves the head out.

    Raises:
        ValueError: an unknown MODEL.TYPE, or sizes that do not fit it.
    """
    if config.MODEL.TYPE != "lra":
        return build_classifier(config, num_classes)
    classes = config.MODEL.NUM_CLASSES if num_classes is None else num_classes
    model = SequenceClassifier(num_classes=classes, **sequence_arguments(config))
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model
