"""Softmax attention: PyTorch's operation, or its formula where that cannot follow."""

import torch
from torch import Tensor
from torch.nn import functional as F

from . import is_exporting
from .linear_attention.derivatives import beyond_plain


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """As `scaled_dot_product_attention`, whose fused kernels are differentiable once, by a plain backward pass.

    By its formula where torch.func or forward-mode AD asks for other derivatives, and in an exported program, which
    would fix the layout of the result of the kernel that this machine chose.
    """
    if not is_exporting() and beyond_plain(q, k, v, mask) is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(dim=-1), dropout) @ v
