"""The attention kernels that polarity attention is compared with, over the same queries, keys and values.

    softmax    exp(q·k/√d): scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762)
    relu       relu(q)·relu(k): linear attention on the positive parts alone
    elu        (1 + elu(q))·(1 + elu(k)): linear attention of Katharopoulos et al. 2020, arXiv 2006.16236, equation 7
    focused    f(q)·f(k), f(x) = ‖x₊‖/‖x₊³‖ · x₊³ with x₊ = relu(x): focused linear attention of Han et al. 2023,
               arXiv 2308.00442, equation 6, with its power 3; norms are those of a head's channels

A row of attention is the kernel of one query with every key, divided by its sum over keys.

Letters: B batch, N query tokens, n key tokens, h heads, d channels per head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

KINDS = ("softmax", "relu", "elu", "focused")
FOCUSING_POWER = 3


def kernel_attention(
    kind: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: Tensor | None = None,
    position: Tensor | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with one of `KINDS`; arguments and result have the shapes of `polarity_attention`.

    Args:
        q: (B, N, h, d) queries.
        k, v: (B, n, h, d) keys and values; n may differ from N.
        scale: (h, d) positive; queries and keys are divided by it, whatever the kind. None: 1.
        position: (n, h, d), added to the keys of every image before that division. None: 0.
        key_mask: (B, n) bool, True for a real key. Masked keys contribute nothing, whatever stands there; a row
            without real keys gives 0.
        eps: added to the normaliser of the linear kinds, which is a mean over keys.
        dropout: probability of leaving a weight of softmax out; the linear kinds have no weights to leave out.

    Returns:
        (B, N, h, d) in the dtype of q. The linear kinds are computed in float32 (float64 for float64); softmax, apart
        from scale and position, by PyTorch's kernel for the dtype of q.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of attention, expected one of {', '.join(KINDS)}")
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = q.to(dtype), k.to(dtype), v
        if position is not None:
            keys = keys + position.to(dtype)
        if scale is not None:
            queries, keys = queries / scale.to(dtype), keys / scale.to(dtype)
        if key_mask is not None:
            padding = ~key_mask[:, :, None, None]
            keys, values = keys.masked_fill(padding, 0.0), values.masked_fill(padding, 0.0)
        queries, keys, values = (t.transpose(1, 2) for t in (queries, keys, values))  # (B, h, N or n, d)
        if kind == "softmax":
            out = _softmax(queries, keys, values, key_mask, dropout)
        else:
            out = _linear(feature_map(kind, queries), feature_map(kind, keys), values.to(dtype), key_mask, eps)
    return out.transpose(1, 2).to(q.dtype)


def feature_map(kind: str, x: Tensor) -> Tensor:
    """φ(x) ≥ 0 over the last axis, for which a linear kind's kernel is φ(q)·φ(k)."""
    if kind == "relu":
        return F.relu(x)
    if kind == "elu":
        return 1 + F.elu(x)
    assert kind == "focused", kind
    positive = F.relu(x)
    largest = positive.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    direction = (positive / largest) ** FOCUSING_POWER  # the same direction as x₊³, and its power cannot overflow
    norm = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    return norm * F.normalize(direction, dim=-1)


def _softmax(queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None, dropout: float) -> Tensor:
    mask = None
    if key_mask is not None:  # a row without real keys attends to all of them: their values are 0
        mask = (key_mask | ~key_mask.any(dim=1, keepdim=True))[:, None, None, :]
    dtype = values.dtype
    queries = queries * queries.shape[-1] ** -0.5  # before the cast: float16 ends at 65,504
    return F.scaled_dot_product_attention(
        queries.to(dtype), keys.to(dtype), values, attn_mask=mask, dropout_p=dropout, scale=1.0
    )


def _linear(queries: Tensor, keys: Tensor, values: Tensor, key_mask: Tensor | None, eps: float) -> Tensor:
    """φ(q) (mean of φ(k)ᵀ v) / (φ(q) · mean of φ(k) + eps), in O(N·d²)."""
    count: Tensor | int = keys.shape[2]
    if key_mask is not None:
        keys = keys.masked_fill(~key_mask[:, None, :, None], 0.0)  # φ(0) need not be 0
        count = key_mask.sum(dim=1).clamp(min=1).to(keys.dtype)[:, None, None, None]
    state = keys.transpose(-2, -1) @ values / count  # (B, h, d, d)
    mean_key = keys.sum(dim=2, keepdim=True) / count  # (B, h, 1, d)
    return queries @ state / ((queries * mean_key).sum(dim=-1, keepdim=True) + eps)
