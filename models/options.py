"""What a configuration says to a model: keys with their defaults, and everything about attention in one value.

A configuration is any nested mapping with the sections and keys of config.py: a yacs node, a YAML file that was read,
or what a checkpoint stores.
"""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .layers import Grid
from .ops.polarity_attention import BACKENDS

LARGEST_IMAGE, DEEPEST_STAGE = 2**13, 256  # pixels a side and blocks, beyond which a configuration is a mistake

# What a key that a mapping lacks stands for: every key that is read below models/, with the default of config.py.
DEFAULTS: dict[str, Any] = {
    "DATA.IMG_SIZE": 224,
    "MODEL.TYPE": "swin",
    "MODEL.NUM_CLASSES": 1000,
    "MODEL.DROP_RATE": 0.0,
    "MODEL.DROP_PATH_RATE": 0.1,
    "MODEL.SWIN.PATCH_SIZE": 4,
    "MODEL.SWIN.IN_CHANS": 3,
    "MODEL.SWIN.EMBED_DIM": 96,
    "MODEL.SWIN.DEPTHS": [2, 2, 6, 2],
    "MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24],
    "MODEL.SWIN.WINDOW_SIZE": 7,
    "MODEL.SWIN.MLP_RATIO": 4.0,
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.QK_SCALE": None,
    "MODEL.SWIN.APE": False,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.LA.ALPHA": 4,
    "MODEL.LA.KERNEL_SIZE": 5,
    "MODEL.LA.ATTN_TYPE": "LLLL",
    "MODEL.LA.PVT_LA_SR_RATIOS": 1111,
    "MODEL.LA.ATTENTION": "polarity",
    "MODEL.LA.LEARN_EXPONENT": True,
    "MODEL.LA.GATE": True,
    "MODEL.LA.GATE_BIAS": None,
    "MODEL.LA.BACKEND": "auto",
    "MODEL.PPP.EMBED_DIMS": [32, 64, 128, 384],
    "MODEL.PPP.DEPTHS": [2, 2, 2, 2],
    "MODEL.PPP.NUM_HEADS": [1, 2, 4, 12],
    "MODEL.PPP.MLP_RATIOS": [3.5, 3.5, 3.5, 3.5],
    "MODEL.PPP.PROJECTION": 2048,
    "MODEL.PPP.LAYER_INIT_VALUES": [1.0, 1.0, 1.0, 1.0],
    "MODEL.PPP.STAGE_TYPES": "LLSS",
    "MODEL.TIMM.NAME": "",
    "MODEL.TIMM.KWARGS": {},
    "MODEL.LRA.LENGTH": 2048,
    "MODEL.LRA.VOCABULARY": 32,
    "MODEL.LRA.DOCUMENTS": 1,
    "MODEL.LRA.DIM": 64,
    "MODEL.LRA.DEPTH": 2,
    "MODEL.LRA.NUM_HEADS": 2,
    "MODEL.LRA.MLP_DIM": 128,
    "MODEL.LRA.POOL": "mean_padded",
    "MODEL.LRA.KERNEL_SIZE": 0,
    "MODEL.LRA.LEARN_SCALE": True,
    "MODEL.LRA.ATTENTION_DROP": 0.0,
    "TRAIN.USE_CHECKPOINT": False,
}


def value_of(config: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; where the mapping lacks it, that of DEFAULTS.

    Text in the place of another kind of value is decoded, as YAML 1.1 reads None and 5e-4 as text. Raises ValueError
    where it stands for none.
    """
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return DEFAULTS[key]
        node = node[part]
    if not isinstance(node, str) or isinstance(DEFAULTS.get(key, ""), str):
        return node
    words = {"null": None, "~": None, "true": True, "false": False}
    try:
        return words[node.lower()] if node.lower() in words else ast.literal_eval(node)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"{key} is {node[:80]!r}, expected a value such as {DEFAULTS[key]!r}") from None


def image_size(config: Mapping[str, Any]) -> Grid:
    """DATA.IMG_SIZE as (height, width) in pixels."""
    size = value_of(config, "DATA.IMG_SIZE")
    if not isinstance(size, int) and not (isinstance(size, Sequence) and len(size) == 2):
        raise ValueError(f"DATA.IMG_SIZE is {repr(size)[:80]}, expected a side or [height, width]")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class AttentionOptions:
    """What the polarity (L) blocks of a model are made of. The names are timm's keyword arguments of every variant.

    Args:
        attention: name of the kernel, one of models.kernels.KERNELS (MODEL.LA.ATTENTION).
        alpha: range of the learnable exponent p = 1 + alpha·sigmoid(power) (MODEL.LA.ALPHA).
        kernel_size: side of the depthwise convolution over v, odd; 0 leaves it out where the layout can do without it.
        learn_exponent: False fixes the exponent at 1 + alpha/2, where a learnable one starts (MODEL.LA.LEARN_EXPONENT).
        learn_scale: learn what queries and keys are divided by, where the kernel divides them.
        gate: multiply the output by a gate made from the block's input (MODEL.LA.GATE).
        gate_bias: initial value of that gate's bias; None: what the body initialises biases with (MODEL.LA.GATE_BIAS).
        dropout: probability of leaving out a weight of softmax while training; linear kernels have no weights to drop.
        backend: implementation of linear attention: auto, eager, native, triton or reference (MODEL.LA.BACKEND).

    Raises ValueError for a negative alpha, an unknown backend, or a dropout that is no probability below 1.
    """

    attention: str = "polarity"
    alpha: float = 4.0
    kernel_size: int = 5
    learn_exponent: bool = True
    learn_scale: bool = True
    gate: bool = True
    gate_bias: float | None = None
    dropout: float = 0.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        require_number("MODEL.LA.ALPHA (alpha)", self.alpha)
        if self.gate_bias is not None:
            require_number("MODEL.LA.GATE_BIAS (gate_bias)", self.gate_bias, low=-1e9)
            if not self.gate:
                raise ValueError("MODEL.LA.GATE_BIAS (gate_bias) needs the gate (MODEL.LA.GATE True, gate)")
        if self.backend not in ("auto", *BACKENDS):
            raise ValueError(
                f"MODEL.LA.BACKEND (backend) {self.backend!r} is no backend of polarity attention, expected auto,"
                f" {', '.join(BACKENDS)}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(
                f"MODEL.LRA.ATTENTION_DROP is {self.dropout}, expected a number from 0 to below 1 (dropout)"
            )

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> "AttentionOptions":
        """From keyword arguments. Raises TypeError that lists the valid ones for an unknown one."""
        names = [field.name for field in fields(cls)]
        if strange := [name for name in keywords if name not in names]:
            raise TypeError(f"unknown argument {strange[0]!r}; those about attention are {', '.join(names)}")
        return cls(**keywords)


def attention_keywords(config: Mapping[str, Any]) -> dict[str, Any]:
    """What MODEL.LA says about attention, as keyword arguments of a body."""
    keys = {
        "attention": "ATTENTION",
        "alpha": "ALPHA",
        "kernel_size": "KERNEL_SIZE",
        "learn_exponent": "LEARN_EXPONENT",
        "gate": "GATE",
        "gate_bias": "GATE_BIAS",
        "backend": "BACKEND",
    }
    return {name: value_of(config, f"MODEL.LA.{key}") for name, key in keys.items()}


def parse_attention_types(
    attn_type: str, num_stages: int, given: str = "MODEL.LA.ATTN_TYPE", accepted: str = "LSM"
) -> tuple[str, int]:
    """Split ``LLSS`` or ``MLSS4`` into its letters and the number of polarity blocks of an M stage (else 0).

    Raises ValueError, with the name of the key, for a letter that is not accepted or a wrong number of them, an M
    without number, or a number without M.
    """
    if not isinstance(attn_type, str):
        raise ValueError(f"{given} is {attn_type!r}, expected letters such as LLSS")
    letters = attn_type.rstrip("0123456789")
    number = attn_type[len(letters) :]
    expected = f"expected one of {', '.join(accepted)} per stage ({num_stages})"
    if "M" in accepted:
        expected += ", and after an M a number of blocks, as in MLSS4"
    if len(letters) != num_stages:
        raise ValueError(f"{given} {attn_type!r} has {len(letters)} letters, {expected}")
    if strange := set(letters) - set(accepted):
        raise ValueError(f"{given} {attn_type!r} has the letter {sorted(strange)[0]}, {expected}")
    if "M" in letters and not number:
        raise ValueError(f"{given} {attn_type!r} has an M stage without a number, {expected}")
    if number and "M" not in letters:
        raise ValueError(f"{given} {attn_type!r} has a number but no M stage that uses it, {expected}")
    return letters, int(number or 0)


def require_whole(given: str, *values: Any, high: int = 2**16) -> None:
    """Raise ValueError unless all are integers from 1 to `high`, beyond which no model of this kind lies."""
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
            raise ValueError(f"{given} is {repr(value)[:80]}, expected an integer from 1 to {high}")


def require_number(given: str, value: Any, low: float = 0.0) -> None:
    """Raise ValueError unless `value` is a finite number, at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value < float("inf"):
        raise ValueError(f"{given} is {repr(value)[:80]}, expected a number ≥ {low:g}")


def require_heads(channels: Sequence[int], num_heads: Sequence[int], given: str) -> None:
    """Raise ValueError unless there are heads for every stage, which divide its channels; `given` names the heads."""
    if not isinstance(num_heads, Sequence):
        raise ValueError(f"{given} is {repr(num_heads)[:80]}, expected a number of heads for each stage")
    given = f"{given} {list(num_heads)}"
    if len(num_heads) != len(channels):
        raise ValueError(f"{given} has {len(num_heads)} stages, MODEL.SWIN.DEPTHS {len(channels)} (depths)")
    for stage, (dim, heads) in enumerate(zip(channels, num_heads, strict=True)):
        if heads < 1 or dim % heads:
            raise ValueError(f"{given}: the {dim} channels of stage {stage} do not divide by {heads}")
