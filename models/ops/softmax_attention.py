"""Softmax attention: PyTorch's operation, with every derivative of torch.func and forward-mode AD."""

from contextlib import nullcontext

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .polarity_attention.derivatives import beyond_plain


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *, dropout: float = 0.0, scale: float | None = None
) -> Tensor:
    """As `scaled_dot_product_attention`, whose fused kernels are differentiable once, by a plain backward pass.

    Where other derivatives are asked for it is computed by its formula, as polarity attention is.
    """
    with nullcontext() if beyond_plain(q, k, v, mask) is None else sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
