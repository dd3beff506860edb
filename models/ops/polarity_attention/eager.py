"""Polarity-aware linear attention in plain PyTorch, in the one-GEMM form.

The opposite-signed query features are the same-signed ones with their halves swapped, so swapping the halves of the
*state* instead turns both streams into a single linear attention with one product over the keys and one over the
queries (README.md beside this file derives it).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def _polar_features(u: Tensor, power: Tensor) -> Tensor:
    """[relu(u)^p, relu(−u)^p] along the last axis; |u|^p is computed once."""
    magnitude = u.abs().pow(power)
    zero = magnitude.new_zeros(())
    return torch.cat([torch.where(u > 0, magnitude, zero), torch.where(u < 0, magnitude, zero)], dim=-1)


def polarity_attention_eager(
    q: Tensor, k: Tensor, v: Tensor, exponent: Tensor, key_mask: Tensor | None, eps: float
) -> Tensor:
    """Arguments and result as in `polarity_attention`."""
    d = q.shape[-1]
    same = (d + 1) // 2  # value channels of the same-signed stream
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (t.to(dtype).transpose(1, 2) for t in (q, k, v))  # (B, h, N or n, d)
        power = exponent.to(dtype)[:, None, :]  # (h, 1, d)
        count: Tensor | int = k.shape[1]
        if key_mask is not None:  # before anything is computed of them: whatever stands there must not matter
            padding = ~key_mask[:, None, :, None]
            keys, values = keys.masked_fill(padding, 0.0), values.masked_fill(padding, 0.0)
            count = key_mask.sum(dim=1).clamp(min=1).to(dtype)[:, None, None, None]
        key_features = _polar_features(keys, power)  # (B, h, n, 2d)
        extended = F.pad(values, (0, 1), value=1.0)  # a column of ones: its product is the sum of the keys
        state = key_features.transpose(-2, -1) @ extended / count  # (B, h, 2d, d + 1)
        swapped = state.roll(d, dims=-2)  # the two halves of 2d exchanged
        weights = torch.cat([state[..., :same], swapped[..., same:d], state[..., d:], swapped[..., d:]], dim=-1)
        product = _polar_features(queries, power) @ weights  # (B, h, N, d + 2)
        normaliser = product[..., d:] + eps
        out = torch.cat([product[..., :same] / normaliser[..., :1], product[..., same:d] / normaliser[..., 1:]], dim=-1)
        return out.transpose(1, 2).to(q.dtype)
