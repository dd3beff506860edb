"""Rotary positions of two-dimensional maps: channels turn in pairs, by an angle that grows with the row or the column.

As PolaFormer++ has them (released 2025-10), after Su et al. 2021, arXiv 2104.09864: the first half of the channels is
turned by the row y, the second by the column x, both from 0; in each half pair t of m turns by y·θ_t or x·θ_t, with
θ_t = 10000^(−t/(m−1)).

Letters: H×W map, N = H·W tokens row by row, f channels (divisible by 4).
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Grid = tuple[int, int]


class Rotary(NamedTuple):
    """Cosine and sine of the angle of each pair of channels, (N, f/2) each."""

    cos: Tensor
    sin: Tensor


def frequencies(channels: int) -> Tensor:
    """θ of the pairs of one half, (channels/4,) float32 on the CPU: the numbers of the released files, bit for bit."""
    if channels < 4 or channels % 4:
        raise ValueError(f"{channels} channels cannot be turned by rows and columns: expected a multiple of 4")
    return 1.0 / 10000 ** torch.linspace(0, 1, channels // 4, dtype=torch.float32, device="cpu")


def rotary_table(grid: Grid, channels: int, dtype: torch.dtype, device: torch.device) -> Rotary:
    """The turns of a map's tokens, computed in `dtype` (float32 or float64) from float32 θ.

    They are kept for the next call, except in a graph that is traced, whose tensors stand for others.
    """
    tracing = torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.compiler.is_exporting()
    transforming = torch._C._are_functorch_transforms_active()  # of torch.func, functionalize among them
    if tracing or transforming or _get_current_dispatch_mode() is not None:
        return _table(grid, channels, dtype, device)
    with torch.inference_mode(False), torch.no_grad():
        return _remembered_table(grid, channels, dtype, device)


def rotate(x: Tensor, table: Rotary) -> Tensor:
    """x (…, N, f) with its neighbouring pairs of channels turned: (a, b) to (a cos − b sin, b cos + a sin)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * table.cos - b * table.sin, b * table.cos + a * table.sin], dim=-1).flatten(-2)


def turn(x: Tensor, turns: Tensor, out: Tensor) -> Tensor:
    """As `rotate`, into `out`, by complex `turns` cos + i·sin (…, N, f/2), whose conjugates turn back: one pass."""
    torch.mul(_pairs(x), turns, out=_pairs(out))
    return out


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _table(grid: Grid, channels: int, dtype: torch.dtype, device: torch.device) -> Rotary:
    theta = frequencies(channels).to(device, dtype)
    rows = torch.arange(grid[0], device=device, dtype=dtype)[:, None, None] * theta
    columns = torch.arange(grid[1], device=device, dtype=dtype)[:, None] * theta
    angle = torch.cat([rows.expand(*grid, -1), columns.expand(*grid, -1)], dim=-1).flatten(0, 1)
    return Rotary(angle.cos(), angle.sin())


_remembered_table = lru_cache(maxsize=64)(_table)
