"""Polarity attention: same-signed and opposite-signed interactions apart, sharpened by learnable powers.

PolaFormer, ICLR 2025, arXiv 2501.15061, section 4.1: features relu(±u)^p with p = 1 + α·sigmoid(power). The first half
of a head's value channels is read by the same-signed stream, the second by the opposite-signed one.
"""

from collections.abc import Mapping

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.linear_attention import Raw
from ..ops.polarity_attention import backend_of_call, choose_backend, polarity_attention
from ..ops.rotary import Rotary
from ..options import AttentionOptions
from .base import LinearKernel, register_kernel

# it checks its input's values and shapes: torch.fx takes it as one operation
torch.fx.wrap("polarity_attention")


@register_kernel("polarity")
class PolarityKernel(LinearKernel):
    """Parameter beside `scale`: `power` (1, h, 1, d), the raw exponent; left out where it is not learned."""

    function_keys = ("MODEL.LA.ALPHA", "MODEL.LA.LEARN_EXPONENT")
    streams = ("same", "opposite")

    def add_parameters(self, options: AttentionOptions) -> None:
        learned = options.learn_exponent
        self.power = nn.Parameter(torch.zeros(1, self.num_heads, 1, self.head_dim)) if learned else None

    @classmethod
    def announce(cls, options: AttentionOptions, device: torch.device) -> str:
        return f"polarity attention backend: {choose_backend(options.backend, device)}"

    @classmethod
    def implementation_of(cls, backend: str, channels: int, q: Tensor, k: Tensor, *others: Tensor | None) -> str:
        return backend_of_call(backend, channels, q, k, *others)

    def raw(self) -> Raw | None:
        power, scale = (None if p is None else p.view(self.num_heads, -1) for p in (self.power, self.scale))
        return Raw("power", power, scale, self.options.alpha)

    def exponent(self) -> Tensor:
        """p = 1 + α·sigmoid(power), (h, d); without `power` 1 + α/2, its value at power 0."""
        alpha = self.options.alpha
        if self.power is None:
            like = next(self.parameters())
            return torch.full((self.num_heads, self.head_dim), 1 + alpha / 2, device=like.device, dtype=like.dtype)
        return 1 + alpha * torch.sigmoid(self.power[0, :, 0])

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
        if rotary is not None:  # the op has no turns
            return super().mix(q, k, v, position=position, key_mask=key_mask, rotary=rotary)
        heads = (self.num_heads, -1)
        divisor = self.divisor()
        out = polarity_attention(
            q.unflatten(-1, heads),
            k.unflatten(-1, heads),
            v.unflatten(-1, heads),
            self.exponent(),
            scale=None if divisor is None else divisor.unflatten(-1, heads),
            position=None if position is None else position.unflatten(-1, heads),
            key_mask=key_mask,
            backend=self.options.backend,
        )
        return out.flatten(2)

    def features(self, u: Tensor) -> Tensor:
        """[relu(u)^p, relu(−u)^p], (…, h, 2d)."""
        size = u.abs().pow(self.exponent().to(u.dtype))
        return torch.cat([size.masked_fill(u <= 0, 0.0), size.masked_fill(u >= 0, 0.0)], dim=-1)  # NaN stays NaN

    def query_features(self, u: Tensor) -> Mapping[str, Tensor]:
        same = self.features(u)
        return {"same": same, "opposite": same.roll(self.head_dim, dims=-1)}  # the two halves change places

    @classmethod
    def channels(cls, stream: str, head_dim: int) -> range:
        border = (head_dim + 1) // 2
        return {"same": range(border), "opposite": range(border, head_dim)}[stream]
