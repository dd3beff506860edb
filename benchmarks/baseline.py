"""The fixed baselines of every figure: equations as they are usually typed, under autograd.

Contiguous (B, h, N, d) copies, features for each sign, three concatenations, and for each of the two streams one state
product, one output product and one normaliser product. They never change, so that ratios stay comparable.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F

from models.attention import PolaMapAttention
from models.kernels import polarity
from models.nalaformer import NalaMapAttention
from models.ops.rotary import Grid
from models.pola_pp import PolaPP


def literal_polarity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor,
    *,
    scale: Tensor | None = None,
    position: Tensor | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Takes what `models.ops.polarity_attention` takes, so that a model can call it; `backend` has no effect.

    As in the released models, tensors return to the type of v before the features are computed. Low-precision inputs
    need autocast, as features are float32 wherever the exponent is.

    Raises ValueError for a key mask, which the baseline does not support.
    """
    if key_mask is not None:
        raise ValueError("the literal baseline has no key mask: choose an image size that the windows divide")
    if position is not None:
        k = k + position
    if scale is not None:
        q, k = q / scale, k / scale
    q, k, v = (t.to(v.dtype).transpose(1, 2).contiguous() for t in (q, k, v))  # (B, h, N or n, d)
    n = k.shape[2]
    power = exponent[:, None, :]  # (h, 1, d)
    positive_q, negative_q = torch.relu(q) ** power, torch.relu(-q) ** power
    positive_k, negative_k = torch.relu(k) ** power, torch.relu(-k) ** power
    same = torch.cat([positive_q, negative_q], dim=-1)  # (B, h, N, 2d)
    opposite = torch.cat([negative_q, positive_q], dim=-1)
    key_features = torch.cat([positive_k, negative_k], dim=-1)  # (B, h, n, 2d)
    mean_key = key_features.mean(dim=2, keepdim=True).mT  # (B, h, 2d, 1)
    streams = []
    for query_features, values in zip((same, opposite), v.chunk(2, dim=-1), strict=False):  # d = 1 has one stream
        state = key_features.mT @ (values / n)  # (B, h, 2d, d/2)
        streams.append(query_features @ state / (query_features @ mean_key + eps))
    return torch.cat(streams, dim=-1).transpose(1, 2).to(v.dtype)


# -- PolaFormer++ and NaLaFormer


def literal_polarity_pp_attention(q: Tensor, k: Tensor, v: Tensor, s1: Tensor, s2: Tensor, *, grid: Grid) -> Tensor:
    """PolaFormer++'s over a map of H×W tokens (B, H·W, h, d), of the released model's parameters (1, h, 1, 2d)."""
    q, k, v = (t.to(v.dtype).transpose(1, 2).contiguous() for t in (q, k, v))  # (B, h, N, d)
    positive_q, negative_q = torch.relu(q), torch.relu(-q)
    same = torch.exp(torch.cat([positive_q, negative_q], dim=-1) * torch.sigmoid(s1)) - 1  # (B, h, N, 2d)
    opposite = torch.exp(torch.cat([negative_q, positive_q], dim=-1) * torch.sigmoid(s2)) - 1
    key_features = torch.exp(torch.cat([torch.relu(k), torch.relu(-k)], dim=-1)) - 1
    mean_key = key_features.mean(dim=2, keepdim=True).mT  # (B, h, 2d, 1)
    turned_keys = _turned(key_features, grid).mT
    streams = []
    for query_features, values in zip((same, opposite), v.chunk(2, dim=-1), strict=True):
        normaliser = query_features @ mean_key + 1e-6
        state = turned_keys @ (values / k.shape[2])  # (B, h, 2d, d/2)
        streams.append(_turned(query_features, grid) @ state / normaliser)
    return torch.cat(streams, dim=-1).transpose(1, 2).to(v.dtype)


def literal_norm_aware_attention(q: Tensor, k: Tensor, v: Tensor, *, grid: Grid, slope: float | None = None) -> Tensor:
    """NaLaFormer's over a map, both halves of the features turned alike; with a slope a, that of the paper's text."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    q, k, v = (t.to(dtype).transpose(1, 2).contiguous() for t in (q, k, v))  # (B, h, N, d)
    norm = q.norm(dim=-1, keepdim=True)
    direction, power = q / norm, 3 * (0.5 + torch.tanh(norm))
    if slope is None:
        queries = torch.relu(direction) ** power, torch.relu(-direction) ** power
        keys = torch.relu(k) ** 3, torch.relu(-k) ** 3
    else:
        phase_q, phase_k = (math.pi / 4 * torch.tanh(slope * w) for w in (direction, k / k.norm(dim=-1, keepdim=True)))
        size_q, size_k = direction.abs() ** power, k.abs() ** 3
        queries = size_q * torch.cos(phase_q), size_q * torch.sin(phase_q)
        keys = size_k * torch.cos(phase_k), size_k * torch.sin(phase_k)
    query_features, key_features = torch.cat(queries, dim=-1), torch.cat(keys, dim=-1)  # (B, h, N, 2d)
    normaliser = query_features @ key_features.mean(dim=2, keepdim=True).mT + 1e-6
    turned_queries = torch.cat([_turned(half, grid) for half in queries], dim=-1)
    turned_keys = torch.cat([_turned(half, grid) for half in keys], dim=-1)
    state = turned_keys.mT @ (v / k.shape[2])  # (B, h, 2d, d)
    return (turned_queries @ state / normaliser).transpose(1, 2)


def _turned(x: Tensor, grid: Grid) -> Tensor:
    """x (…, H·W, f) with neighbouring channels turned by rows in the first half, by columns in the second."""
    sine, cosine = _angles(grid, x.shape[-1], torch.promote_types(x.dtype, torch.float32), x.device)
    return x * cosine + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) * sine


@lru_cache
def _angles(grid: Grid, channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Sine and cosine (H·W, channels) of all tokens, each twice in a row, from float32 θ."""
    theta = 1.0 / 10000 ** torch.linspace(0, 1, channels // 4)
    theta = theta.repeat_interleave(2).to(device, dtype)
    rows, columns = (torch.arange(side, device=device)[:, None] * theta for side in grid)
    angle = torch.cat([rows.repeat_interleave(grid[1], dim=0), columns.repeat(grid[0], 1)], dim=-1)
    return angle.sin(), angle.cos()


def literal_pola_pp(model: Any, images: Tensor) -> Tensor:
    """The forward pass of a `PolaPP` on maps (B, C, H, W), as its specification is read line by line."""
    x = model.patch_embed(images)
    for stage in model.layers:
        for block in stage.blocks:
            x = _block(block, x)
        if stage.downsample is not None:
            x = stage.downsample(x)
    x = F.silu(model.norm(F.conv2d(x, model.proj.weight, model.proj.bias))).mean(dim=(2, 3), keepdim=True)
    return F.conv2d(x, model.head.weight, model.head.bias).flatten(1)


def _block(block: Any, x: Tensor) -> Tensor:
    x = x + _depthwise(block.pos, x)
    normed = block.norm1(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    x = x + block.drop_path(block.gamma_1 * _attention(block.attn, normed))
    normed = block.norm2(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x + block.drop_path(block.gamma_2 * _feed_forward(block.ffn, normed))


def _attention(attn: Any, x: Tensor) -> Tensor:
    grid = x.shape[2], x.shape[3]
    linear = isinstance(attn, PolaMapAttention)
    project = attn.qkvg if linear else attn.qkvo
    q, k, v, gate = project(x.flatten(2).mT).chunk(4, dim=-1)  # (B, N, C)
    local = _depthwise(attn.lepe, v.mT.unflatten(2, grid)).flatten(2).mT
    q, k, v = (t.unflatten(-1, (attn.num_heads, -1)) for t in (q, k, v))
    if linear:
        out = literal_polarity_pp_attention(q, k, v, attn.s1, attn.s2, grid=grid)
    else:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, h, N, d)
        weights = (_turned(q, grid) @ _turned(k, grid).mT / q.shape[-1] ** 0.5).softmax(dim=-1)
        out = (weights @ v).transpose(1, 2)
    return attn.proj((out.flatten(2) + local) * gate).mT.unflatten(2, grid)


def _feed_forward(ffn: Any, x: Tensor) -> Tensor:
    hidden = F.gelu(ffn.fc1(x.flatten(2).mT)).mT.unflatten(2, x.shape[2:])
    hidden = hidden + _depthwise(ffn.dwconv, hidden)
    return ffn.fc2(hidden.flatten(2).mT).mT.unflatten(2, x.shape[2:])


def _depthwise(convolution: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, convolution.weight, convolution.bias, padding=convolution.padding, groups=x.shape[1])


# -- In models


def patched_model_attention(op: Callable[..., Tensor]) -> AbstractContextManager[object]:
    """Inside, polarity blocks of all models compute with `op`."""
    return mock.patch.object(polarity, "polarity_attention", op)


def patched_pola_pp() -> AbstractContextManager[object]:
    """Inside, every PolaFormer++ computes literally."""
    return mock.patch.object(PolaPP, "forward", literal_pola_pp)


def patched_nalaformer() -> AbstractContextManager[object]:
    """Inside, the linear attention of every NaLaFormer computes literally."""

    def attend(self: Any, q: Tensor, k: Tensor, v: Tensor, grid: Grid) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v))
        return literal_norm_aware_attention(q, k, v, grid=grid).flatten(2)

    return mock.patch.object(NalaMapAttention, "attend", attend)
