"""NaLaFormer: norm-aware linear attention in two stages, softmax attention in two.

"Norm×Direction: Restoring the Missing Query Norm in Vision Linear Attention", arXiv 2506.21137 (ICML 2026), after the
published code; `kernels/norm_aware.py` is its linear attention, `rotary_pyramid.py` its frame. No weights are released.

Letters: B batch, C channels, H×W token grid.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import KernelAttention
from .layers import DepthwiseConv2d, Grid, turns
from .ops.rotary import Rotary
from .options import AttentionOptions
from .pola_pp import ROWS
from .registry import Variant, register_body
from .rotary_pyramid import PyramidBlock, RotaryPyramid
from .softmax_attention import rotary_softmax


class _Surroundings(nn.Module):
    """What both kinds of attention have around them: one projection, a local branch, LayerNorm, gate by SiLU."""

    def surround(self, dim: int, kernel_size: int) -> None:
        self.qkvg = nn.Linear(dim, 4 * dim)
        self.lepe = DepthwiseConv2d(dim, kernel_size)
        self.out_proj = nn.Linear(dim, dim)
        self.ln = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H·W, C) with its grid (H, W)."""
        q, k, v, g = self.qkvg(x).chunk(4, dim=-1)
        out = self.ln(self.attend(q, k, v, grid) + self.lepe(v, grid))
        return self.out_proj(out * F.silu(g))

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """What the tokens find, (B, H·W, C)."""


class NalaMapAttention(_Surroundings, KernelAttention):
    """Norm-aware linear attention over a whole map; both halves of its features are turned alike."""

    def __init__(self, dim: int, num_heads: int, options: AttentionOptions = AttentionOptions("norm_aware")) -> None:
        super().__init__(dim, num_heads, options)
        self.surround(dim, options.kernel_size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return self.mix(q, k, v, rotary=for_both_halves(turns(q, grid, self.head_dim)))


@torch.fx.wrap
def for_both_halves(rotary: Rotary) -> Rotary:
    return Rotary(*(torch.cat([table, table], dim=-1) for table in rotary))


class NalaSoftmaxAttention(_Surroundings):
    """Softmax attention over a whole map, queries and keys turned by row and column."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 5) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.surround(dim, kernel_size)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        return rotary_softmax(q, k, v, self.num_heads, grid)


class NalaBlock(PyramidBlock):
    """With a position convolution before each."""

    def __init__(self, dim: int, *arguments: Any) -> None:
        super().__init__(dim, *arguments)
        self.cpe1 = DepthwiseConv2d(dim, 3)
        self.cpe2 = DepthwiseConv2d(dim, 3)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.attended(x + self.cpe1(x, grid), grid)
        return self.fed_forward(x + self.cpe2(x, grid), grid)


def _variant(size: str, about: str, base: str, ratio: float) -> Variant:
    """A row that has the sizes of a PolaFormer++ but for the feed-forward's and the projection's."""
    row = {**ROWS[base], "mlp_ratios": (ratio,) * 4, "projection": 1024}
    return Variant(f"nalaformer_{size}", row, f"NaLaFormer-{size.upper()}: {about}", TIMM)


TIMM: Mapping[str, Any] = {
    "fixed_input_size": False,
    "crop_mode": "center",  # the shorter side is resized, not the picture squashed
    "paper_ids": "arXiv:2506.21137",
    "paper_name": "Norm×Direction: Restoring the Missing Query Norm in Vision Linear Attention",
}


@register_body(
    ["nalaformer"],
    variants={
        "nalaformer_xt": _variant("xt", "6.1 M parameters as published (79.1 % reported for 8 M).", "pola_pp_b0", 3.5),
        # outside of the published five: the widths of b1, which fit the size and multiply-adds reported for XT
        "nalaformer_xt_8m": _variant("xt_8m", "7.8 M parameters, perhaps what 79.1 % belongs to.", "pola_pp_b1", 3.5),
        "nalaformer_t": _variant("t", "15.9 M parameters as published (82.6 % reported for 15 M).", "pola_pp_b2", 4.0),
        "nalaformer_s": _variant("s", "25.7 M parameters, 84.3 % top-1 reported.", "pola_pp_b3", 3.5),
        "nalaformer_b": _variant("b", "52.0 M parameters, 85.2 % top-1 reported.", "pola_pp_b4", 4.0),
        "nalaformer_l": _variant("l", "95.4 M parameters, 85.7 % top-1 reported.", "pola_pp_b5", 3.5),
    },
)
class NaLaFormer(RotaryPyramid):
    """NaLaFormer classifier; its arguments are those of RotaryPyramid."""

    family = "NaLaFormer"
    released = "none are released"
    kernel = "norm_aware"
    block = NalaBlock
    linear_attention = NalaMapAttention
    softmax_attention = NalaSoftmaxAttention

    @staticmethod
    def projection(channels: int, out_channels: int) -> nn.Module:
        return nn.Linear(channels, out_channels)
