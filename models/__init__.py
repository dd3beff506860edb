"""Models by name and by configuration.

Importing this package registers every variant with timm, so that `timm.create_model("pola_swin_tiny")` finds it.
`build_model` reads MODEL.TYPE and the keys that shape it.
"""

from yacs.config import CfgNode

from config import MODEL_TYPES, image_size, parse_sr_ratios
from models import pola_pvt, pola_swin
from models.classifier import Classifier
from models.pola_pvt import PVT_DEPTHS, PolaPVT
from models.pola_swin import PolaSwin

assert ("pola_swin", *PVT_DEPTHS) == MODEL_TYPES, "config.MODEL_TYPES and the models that exist differ"


def list_models() -> list[str]:
    """The names that `timm.create_model` accepts for the models of this package."""
    return [*pola_swin.default_cfgs, *pola_pvt.default_cfgs]


def build_model(config: CfgNode, num_classes: int | None = None) -> Classifier:
    """The freshly initialised model of a configuration, on the CPU.

    Args:
        num_classes: size of the head; None takes MODEL.NUM_CLASSES, 0 leaves the head out.

    Raises:
        ValueError: an unknown MODEL.TYPE, or sizes that do not fit it.
    """
    if num_classes is None:
        num_classes = config.MODEL.NUM_CLASSES
    model: Classifier
    if config.MODEL.TYPE == "pola_swin":
        model = PolaSwin(
            img_size=image_size(config),
            patch_size=config.MODEL.SWIN.PATCH_SIZE,
            in_chans=config.MODEL.SWIN.IN_CHANS,
            num_classes=num_classes,
            embed_dim=config.MODEL.SWIN.EMBED_DIM,
            depths=config.MODEL.SWIN.DEPTHS,
            num_heads=config.MODEL.SWIN.NUM_HEADS,
            window_size=config.MODEL.SWIN.WINDOW_SIZE,
            attn_type=config.MODEL.LA.ATTN_TYPE,
            alpha=config.MODEL.LA.ALPHA,
            kernel_size=config.MODEL.LA.KERNEL_SIZE,
            mlp_ratio=config.MODEL.SWIN.MLP_RATIO,
            qkv_bias=config.MODEL.SWIN.QKV_BIAS,
            qk_scale=config.MODEL.SWIN.QK_SCALE,
            ape=config.MODEL.SWIN.APE,
            patch_norm=config.MODEL.SWIN.PATCH_NORM,
            proj_drop_rate=config.MODEL.DROP_RATE,
            drop_path_rate=config.MODEL.DROP_PATH_RATE,
            backend=config.MODEL.LA.BACKEND,
            attention=config.MODEL.LA.ATTENTION,
            learn_exponent=config.MODEL.LA.LEARN_EXPONENT,
            gate=config.MODEL.LA.GATE,
        )
    elif config.MODEL.TYPE in PVT_DEPTHS:
        model = PolaPVT(
            depths=PVT_DEPTHS[config.MODEL.TYPE],
            img_size=image_size(config),
            in_chans=config.MODEL.SWIN.IN_CHANS,
            num_classes=num_classes,
            attn_type=config.MODEL.LA.ATTN_TYPE,
            sr_ratios=parse_sr_ratios(config.MODEL.LA.PVT_LA_SR_RATIOS),
            alpha=config.MODEL.LA.ALPHA,
            kernel_size=config.MODEL.LA.KERNEL_SIZE,
            proj_drop_rate=config.MODEL.DROP_RATE,
            drop_path_rate=config.MODEL.DROP_PATH_RATE,
            backend=config.MODEL.LA.BACKEND,
            attention=config.MODEL.LA.ATTENTION,
            learn_exponent=config.MODEL.LA.LEARN_EXPONENT,
            gate=config.MODEL.LA.GATE,
        )
    else:
        raise ValueError(f"MODEL.TYPE {config.MODEL.TYPE!r} is unknown, expected one of {', '.join(MODEL_TYPES)}")
    model.set_grad_checkpointing(config.TRAIN.USE_CHECKPOINT)
    return model
