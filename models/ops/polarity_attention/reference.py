"""The equations of polarity-aware linear attention, literally: slow, obvious, any floating dtype."""

import torch
from torch import Tensor

from .. import without_autocast


def polarity_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor,
    scale: Tensor | None,
    position: Tensor | None,
    key_mask: Tensor | None,
    eps: float,
) -> Tensor:
    """Arguments and result as in `polarity_attention`; low-precision inputs are computed in float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device):
        queries, keys, values = q.to(dtype), k.to(dtype), v.to(dtype)
        if position is not None:
            keys = keys + position.to(dtype)
        count: Tensor | int = max(k.shape[1], 1)  # no keys sum to 0
        if key_mask is not None:  # before anything is multiplied by them: whatever stands there must not matter
            padding = ~key_mask[:, :, None, None]
            keys, values = keys.masked_fill(padding, 0.0), values.masked_fill(padding, 0.0)
            count = key_mask.sum(dim=1).clamp(min=1).to(dtype)[:, None, None, None]
        power = exponent.to(dtype)
        divisor = torch.ones_like(power) if scale is None else scale.to(dtype)
        # NaN where either parameter is not finite, which pow(1, NaN) = 1 and x/Inf = 0 would hide
        divisor = divisor + 0.0 * (divisor + power).detach()
        queries, keys = queries / divisor, keys / divisor
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))  # (B, h, N or n, d)
        power = power[:, None, :]  # (h, 1, d)
        positive_q, negative_q = _relu_power(queries, power), _relu_power(-queries, power)
        positive_k, negative_k = _relu_power(keys, power), _relu_power(-keys, power)
        key_features = torch.cat([positive_k, negative_k], dim=-1)  # (B, h, n, 2d)
        same = torch.cat([positive_q, negative_q], dim=-1)
        opposite = torch.cat([negative_q, positive_q], dim=-1)
        mean_key = key_features.sum(dim=2, keepdim=True) / count  # (B, h, 1, 2d)
        streams = []
        for query_features, value in zip((same, opposite), values.chunk(2, dim=-1), strict=False):
            state = key_features.transpose(-2, -1) @ value / count  # (B, h, 2d, d/2)
            normaliser = (query_features * mean_key).sum(dim=-1, keepdim=True) + eps
            streams.append(query_features @ state / normaliser)
        return torch.cat(streams, dim=-1).transpose(1, 2).to(q.dtype)


def _relu_power(u: Tensor, power: Tensor) -> Tensor:
    """relu(u)^p, where 0 has no derivative but 0: 0^p would have ln 0 in those by p beyond the first."""
    off = u <= 0  # False for NaN, which stays
    return (u.masked_fill(off, 1.0) ** power).masked_fill(off, 0.0)
