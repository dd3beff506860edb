"""Softmax attention of the S stages: inside windows with relative position bias, or over a reduced map.

Letters: B batch (windows count as batch in Swin), N tokens, C channels, h heads, d = C/h channels per head, r spatial
reduction ratio.
"""

from typing import Protocol

import torch
import torch.fx
from torch import Tensor, nn

from .layers import DepthwiseConv2d, Deriving, Grid, resize_table, turned, turns
from .ops.softmax_attention import softmax_attention

# each an operation, in the names of this file too
torch.fx.wrap("softmax_attention")
torch.fx.wrap("turned")
torch.fx.wrap("turns")


class WindowAttention(Deriving):
    """Softmax attention inside windows with relative position bias (Swin Transformer, arXiv 2103.14030)."""

    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: Grid,
        *,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.qk_scale = qk_scale
        self.relative_position_bias_table = nn.Parameter(
            torch.zeros((2 * window[0] - 1) * (2 * window[1] - 1), num_heads)
        )
        self.register_buffer("relative_position_index", None, persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.init_non_persistent_buffers()

    def fit(self, window: Grid) -> None:
        """Index the table for another window; the table is the model's to resize."""
        self.window = window
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        self.relative_position_index = relative_position_index(self.window).to(self.relative_position_bias_table.device)

    def relative_bias(self, window: Grid) -> Tensor:
        """(N, N, h), added to the scores; the table is resized for another window than it was built for."""
        if window == self.window:
            return self.relative_position_bias_table[self.relative_position_index]
        own, other = ((2 * height - 1, 2 * width - 1) for height, width in (self.window, window))
        table = resize_table(self.relative_position_bias_table, own, other)
        return table[relative_position_index(window).to(table.device)]

    def forward(self, x: Tensor, mask: Tensor | None = None, window: Grid | None = None) -> Tensor:
        """x (windows·B, N, C); mask (windows, N, N), added to the scores of each window of an image; window None: the
        one built for."""
        B, N, C = x.shape
        bias = self.relative_bias(window or self.window).permute(2, 0, 1)[None]  # (1, h, N, N)
        windows = 1
        if mask is not None:  # windows join the heads, so that the sum of bias and mask has no batch axis
            windows = mask.shape[0]
            bias = (bias + mask[:, None].to(bias.dtype)).flatten(0, 1)[None]  # (1, windows·h, N, N)
        qkv = self.qkv(x).reshape(B // windows, windows, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)  # 3 × (B/windows, windows·h, N, d)
        out = softmax_attention(q, k, v, bias.to(q.dtype), scale=self.qk_scale)
        out = out.unflatten(1, (windows, self.num_heads)).transpose(2, 3).reshape(B, N, C)
        return self.proj_drop(self.proj(out))


def relative_position_index(window: Grid) -> Tensor:
    """(N, N) row of the bias table for each pair of positions in a window, by their offset."""
    height, width = window
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    row_offset = rows[:, None] - rows[None, :] + height - 1
    column_offset = columns[:, None] - columns[None, :] + width - 1
    return row_offset * (2 * width - 1) + column_offset


class SpatialReductionAttention(nn.Module):
    """Softmax attention whose keys and values come from a map reduced r times (PVT, arXiv 2102.12122)."""

    def __init__(
        self, dim: int, num_heads: int, *, sr_ratio: int = 1, qkv_bias: bool = True, proj_drop: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.reduction = sr_ratio
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        if sr_ratio > 1:
            self.sr = nn.Conv2d(dim, dim, kernel_size=sr_ratio, stride=sr_ratio)
            self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H·W, C) with its grid (H, W)."""
        heads = (self.num_heads, -1)
        q = self.q(x).unflatten(-1, heads).transpose(1, 2)
        k, v = self.kv(reduce_tokens(self, x, grid)).unflatten(-1, (2, *heads)).permute(2, 0, 3, 1, 4)
        out = softmax_attention(q, k, v)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class RotaryAttention(nn.Module):
    """Softmax attention over a whole map, queries and keys turned by row and column (PolaFormer++)."""

    def __init__(self, dim: int, num_heads: int, kernel_size: int = 5) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkvo = nn.Linear(dim, 4 * dim)
        self.lepe = DepthwiseConv2d(dim, kernel_size)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, H·W, C) with its grid (H, W)."""
        q, k, v, o = self.qkvo(x).chunk(4, dim=-1)
        rotary = turns(q, grid, self.head_dim)
        q, k, values = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        out = softmax_attention(turned(q, rotary), turned(k, rotary), values)
        return self.proj((out.transpose(1, 2).flatten(2) + self.lepe(v, grid)) * o)


def reduced_grid(grid: Grid, ratio: int) -> Grid:
    """The grid of keys. Raises ValueError unless the spatial reduction ratio divides the map."""
    if grid[0] % ratio or grid[1] % ratio:
        raise ValueError(f"a {grid[0]}×{grid[1]} map does not divide by the spatial reduction ratio {ratio}")
    return grid[0] // ratio, grid[1] // ratio


class Reducing(Protocol):
    """A module with a spatial reduction of its keys: a strided convolution and LayerNorm, unless the ratio is 1."""

    reduction: int
    sr: nn.Conv2d
    norm: nn.LayerNorm


def reduce_tokens(module: Reducing, x: Tensor, grid: Grid) -> Tensor:
    """Tokens (B, H·W, C) to (B, H·W/r², C) by the module's strided convolution `sr` and LayerNorm `norm`."""
    if module.reduction == 1:
        return x
    image = x.unflatten(1, grid).permute(0, 3, 1, 2)
    return module.norm(module.sr(image).flatten(2).transpose(1, 2))
