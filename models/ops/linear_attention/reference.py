"""Linear attention of given features, literally and by autograd: every derivative, any floating dtype.

Katharopoulos et al. 2020, arXiv 2006.16236, equations 4 and 5; in streams (PolaFormer, arXiv 2501.15061, section 4.1)
and with a numerator turned by the tokens' positions (PolaFormer++).

Letters: B batch, N query tokens, n key tokens, h heads, f features, d value channels per head.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import without_autocast
from ..rotary import Rotary, rotate


def linear_attention_reference(
    queries: Sequence[Tensor],
    keys: Tensor,
    v: Tensor,
    key_mask: Tensor | None = None,
    *,
    channels: Sequence[range] | None = None,
    rotary: Rotary | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """rot(φ(q)) · (mean of rot(φ(k))ᵀv) / (φ(q) · (mean of φ(k)) + eps) for each stream.

    Args:
        queries: of each stream (B, N, h, f) features ≥ 0, float32 or float64; under autocast they stay what they are.
        keys: (B, n, h, f) features ≥ 0 of the same dtype, for all streams; n may differ from N.
        v: (B, n, h, d) values, of any floating dtype.
        key_mask: (B, n) bool, True for a real key. Masked keys contribute nothing, whatever stands there; a row without
            real keys gives 0.
        channels: the value channels that each stream reads; None: all of them, by one stream.
        rotary: turns of the tokens, queries and keys being the same ones; the normaliser is not turned. None: none.
        eps: positive, added to the normalisers.

    Returns:
        (B, N, h, d) in the dtype of v, computed in that of the features.
    """
    with without_autocast(keys.device):
        keys = keys.transpose(1, 2)  # (B, h, n, f)
        values = v.to(keys.dtype).transpose(1, 2)  # (B, h, n, d)
        count: Tensor | int = max(keys.shape[2], 1)  # no keys sum to 0
        if key_mask is not None:
            padding = ~key_mask[:, None, :, None]
            keys, values = keys.masked_fill(padding, 0.0), values.masked_fill(padding, 0.0)  # φ(0) need not be 0
            count = key_mask.sum(dim=1).clamp(min=1).to(keys.dtype)[:, None, None, None]
        turned_keys = keys if rotary is None else rotate(keys, rotary)
        mean_key = keys.sum(dim=2, keepdim=True) / count  # (B, h, 1, f)
        streams = []
        for features, part in zip(queries, channels or [range(v.shape[-1])], strict=True):
            features = features.transpose(1, 2)  # (B, h, N, f)
            state = turned_keys.transpose(-2, -1) @ values[..., part.start : part.stop] / count  # (B, h, f, ·)
            normaliser = (features * mean_key).sum(dim=-1, keepdim=True) + eps
            streams.append((features if rotary is None else rotate(features, rotary)) @ state / normaliser)
        return torch.cat(streams, dim=-1).transpose(1, 2).to(v.dtype)
