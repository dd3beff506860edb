"""Softmax attention as a kernel, for comparisons: exp(q·k/√d) (Vaswani et al. 2017, arXiv 1706.03762)."""

import torch.fx
from torch import Tensor

from ..ops.rotary import Rotary
from ..ops.softmax_attention import softmax_attention
from .base import Kernel, register_kernel

# it asks for derivatives of its input: torch.fx takes it as one operation
torch.fx.wrap("softmax_attention")


@register_kernel("softmax")
class SoftmaxKernel(Kernel):
    """PyTorch's scaled dot-product attention on what the linear kernels see, in the dtype of v."""

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        position: Tensor | None = None,
        key_mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        if rotary is not None:
            raise ValueError("softmax attention has no features that could be turned: see RotaryAttention")
        mask = None
        if key_mask is not None:
            padding = ~key_mask[:, :, None]
            k, v = k.masked_fill(padding, 0.0), v.masked_fill(padding, 0.0)
            # a row without real keys attends to all of them: their values are 0
            mask = (key_mask | ~key_mask.any(dim=1, keepdim=True))[:, None, None, :]
        queries, keys = self.prepare(q, k, position)
        queries = queries * self.head_dim**-0.5  # before the cast: float16 ends at 65,504
        values = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        queries, keys = queries.to(v.dtype).transpose(1, 2), keys.to(v.dtype).transpose(1, 2)
        dropout = self.options.dropout if self.training else 0.0
        out = softmax_attention(queries, keys, values, mask, dropout=dropout, scale=1.0)
        return out.transpose(1, 2).flatten(-2)

    def scores(self, queries: Tensor, keys: Tensor, factor: float | None = None) -> Tensor:
        products = queries.transpose(-3, -2) @ keys.transpose(-3, -2).transpose(-2, -1)
        return products * (self.head_dim**-0.5 if factor is None else factor)
