"""PolaFormer++: linear attention with channel-wise spikiness in two stages, softmax attention in two.

Released 2025-10 as b0 to b5; `kernels/polarity_pp.py` is its linear attention, `rotary_pyramid.py` its frame.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from .attention import PolaMapAttention
from .layers import DepthwiseConv2d, Grid
from .registry import Variant, register_body
from .rotary_pyramid import PyramidBlock, RotaryPyramid
from .softmax_attention import RotaryAttention


class PolaPPBlock(PyramidBlock):
    """With a position convolution before both."""

    def __init__(self, dim: int, *arguments: Any) -> None:
        super().__init__(dim, *arguments)
        self.pos = DepthwiseConv2d(dim, 3)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.fed_forward(self.attended(x + self.pos(x, grid), grid), grid)


def _row(
    dims: Sequence[int],
    depths: Sequence[int],
    heads: Sequence[int],
    drop_path_rate: float,
    init_values: Sequence[float] = (1, 1, 1, 1),
    projection: int = 2048,
) -> dict[str, Any]:
    return {
        "embed_dims": list(dims),
        "depths": list(depths),
        "num_heads": list(heads),
        "drop_path_rate": drop_path_rate,
        "layer_init_values": list(init_values),
        "projection": projection,
    }


ROWS: dict[str, dict[str, Any]] = {
    "pola_pp_b0": _row((32, 64, 128, 384), (2, 2, 2, 2), (1, 2, 4, 12), 0.1),
    "pola_pp_b1": _row((32, 64, 192, 384), (2, 2, 4, 2), (1, 2, 6, 12), 0.1),
    "pola_pp_b2": _row((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8), 0.1),
    "pola_pp_b3": _row((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8), 0.15),
    "pola_pp_b4": _row((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8), 0.4, (1, 1, 1e-6, 1e-6)),
    "pola_pp_b5": _row((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10), 0.55, (1e-6,) * 4, 2560),
}
REPORTED = (
    (7.5, 76.9),
    (9.2, 79.1),
    (16.5, 82.8),
    (27.1, 84.3),
    (49.8, 85.4),
    (97.8, 85.6),
)  # M parameters, top-1 in %
OFFICIAL_TYPES = {f"polab{i}": name for i, name in enumerate(ROWS)}  # MODEL.TYPE of the official configurations
TIMM = {
    "fixed_input_size": False,
    "paper_ids": None,
    "paper_name": "PolaFormer++: Polarity-aware Linear Attention with Channel-wise Spikiness",
}


@register_body(
    ["pola_pp", *OFFICIAL_TYPES],
    variants={
        name: Variant(name, row, f"PolaFormer++ {name[-2:]}: {size} M parameters, {top1} % top-1 reported.", TIMM)
        for (name, row), (size, top1) in zip(ROWS.items(), REPORTED, strict=True)
    },
)
class PolaPP(RotaryPyramid):
    """PolaFormer++ classifier; its arguments are those of RotaryPyramid."""

    family = "PolaFormer++"
    released = "the official repository of PolaFormer++ links a file-sharing service"
    kernel = "polarity_pp"
    angles: ClassVar = {"RoPE": 1, "RoPE_linear": 2}
    rows: ClassVar = {type_name: ROWS[name] for type_name, name in OFFICIAL_TYPES.items()}
    block = PolaPPBlock
    linear_attention = PolaMapAttention
    softmax_attention = RotaryAttention
