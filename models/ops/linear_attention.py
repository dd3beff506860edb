"""Linear attention of given features: φ(q)(φ(k)ᵀv) over φ(q)·Σφ(k), in time linear in the number of tokens.

Katharopoulos et al. 2020, arXiv 2006.16236, equations 4 and 5.

Letters: B batch, N query tokens, n key tokens, h heads, f features, d value channels per head.
"""

from torch import Tensor

from . import without_autocast


def linear_attention(
    queries: Tensor, keys: Tensor, v: Tensor, key_mask: Tensor | None = None, eps: float = 1e-6
) -> Tensor:
    """φ(q) · (mean of φ(k)ᵀv) / (φ(q) · (mean of φ(k)) + eps), by autograd.

    Args:
        queries: (B, N, h, f) features ≥ 0, float32 or float64; under autocast they stay what they are.
        keys: (B, n, h, f) features ≥ 0 of the same dtype; n may differ from N.
        v: (B, n, h, d) values, of any floating dtype.
        key_mask: (B, n) bool, True for a real key. Masked keys contribute nothing, whatever stands there; a row without
            real keys gives 0.
        eps: positive, added to the normaliser.

    Returns:
        (B, N, h, d) in the dtype of v, computed in that of the features.
    """
    with without_autocast(queries.device):
        queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)  # (B, h, N or n, f)
        values = v.to(queries.dtype).transpose(1, 2)  # (B, h, n, d)
        count: Tensor | int = max(keys.shape[2], 1)  # no keys sum to 0
        if key_mask is not None:
            padding = ~key_mask[:, None, :, None]
            keys, values = keys.masked_fill(padding, 0.0), values.masked_fill(padding, 0.0)  # φ(0) need not be 0
            count = key_mask.sum(dim=1).clamp(min=1).to(keys.dtype)[:, None, None, None]
        state = keys.transpose(-2, -1) @ values / count  # (B, h, f, d)
        mean_key = keys.sum(dim=2, keepdim=True) / count  # (B, h, 1, f)
        out = queries @ state / ((queries * mean_key).sum(dim=-1, keepdim=True) + eps)
    return out.transpose(1, 2).to(v.dtype)
