"""PolaFormer++: polarity attention whose features are exponentials, spiky channel by channel.

Released 2025-10, "Polarity-aware Linear Attention with Channel-wise Spikiness". With u₊ = relu(u), u₋ = relu(−u):

    keys                  k̃   = [exp(k₊) − 1, exp(k₋) − 1]
    same-signed stream    q_s = exp([q₊, q₋] ⊙ a₁) − 1        a₁ = sigmoid(s1)
    opposite-signed       q_o = exp([q₋, q₊] ⊙ a₂) − 1        a₂ = sigmoid(s2)

The first half of a head's value channels is read by the same-signed stream, the second by the opposite-signed one. A
body with rotary positions has the features turned where they meet the values, and not where they normalise, so that a
row of weights may have negative ones and need not sum to 1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.linear_attention import FeatureMap, Raw, Scratch, Stream, fill, split_by_sign, sum_over_tokens
from ..options import AttentionOptions
from .base import LinearKernel, register_kernel


class ExponentialFeatures(FeatureMap):
    """exp(a ⊙ [u₊, u₋]) − 1, and for the opposite-signed stream exp(a ⊙ [u₋, u₊]) − 1; a is 1 for keys.

    The tokens of a block are [u₊, u₋], (b, h, T, 2d). Queries have a set of features for each stream.
    """

    in_triton = "growth"

    def __init__(self, scratch: Scratch, same: Tensor, opposite: Tensor) -> None:
        """a₁ and a₂, (h, 2d), in the order of the features."""
        super().__init__(scratch)
        self.rates = [rate.to(scratch.dtype)[:, None] for rate in (same, opposite)]  # (h, 1, 2d)
        self.moments = [torch.zeros_like(rate) for rate in self.rates]  # their gradients

    @classmethod
    def sets(cls, head_dim: int) -> tuple[tuple[Stream, ...], ...]:
        border = (head_dim + 1) // 2
        return (Stream(slice(0, border)),), (Stream(slice(border, head_dim)),)

    @classmethod
    def width(cls, head_dim: int) -> int:
        return 2 * head_dim

    def tokens(self, block: Tensor, padding: Tensor | None = None) -> Tensor:
        u = fill(self.scratch("u", *block.shape).copy_(block), padding)
        return split_by_sign(u, self.scratch("tokens", *u.shape[:-1], 2 * u.shape[-1]))

    def key_features(self, tokens: Tensor) -> Tensor:
        return torch.expm1(tokens, out=self.scratch("features", *tokens.shape))

    def query_features(self, tokens: Tensor, index: int) -> Tensor:
        return self._in_order(tokens, index, self.rates[index]).expm1_()

    def key_backward(self, tokens: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return self._of_tokens(tokens, 0, grad.addcmul_(grad, features), "grad_keys")  # exp(a·u) times the gradient

    def query_backward(self, tokens: Tensor, index: int, features: Tensor, grad: Tensor) -> Tensor:
        growth = grad.addcmul_(grad, features)
        self.moments[index] += sum_over_tokens(self._in_order(tokens, index, growth)).sum(dim=0)
        return self._of_tokens(tokens, index, growth.mul_(self.rates[index]), f"grad_queries{index}")

    def gradients(self) -> tuple[Tensor | None, ...]:
        return tuple(moment[:, 0] for moment in self.moments)

    def _in_order(self, tokens: Tensor, index: int, factor: Tensor) -> Tensor:
        """[u₊, u₋] or, for the opposite-signed stream, [u₋, u₊], times a factor of each."""
        out = self.scratch("features", *tokens.shape)
        if not index:
            return torch.mul(tokens, factor, out=out)
        halves = zip(tokens.chunk(2, dim=-1)[::-1], factor.chunk(2, dim=-1), strict=True)
        if torch.compiler.is_compiling():  # which takes no view as `out`
            return torch.cat([part * times for part, times in halves], dim=-1)
        for (part, times), half in zip(halves, out.chunk(2, dim=-1), strict=True):
            torch.mul(part, times, out=half)
        return out

    def _of_tokens(self, tokens: Tensor, index: int, grad: Tensor, buffer: str) -> Tensor:
        """From the gradient of the parts, in the order of the stream, to that of u: a part that is 0 passes nothing."""
        plus, minus = grad.chunk(2, dim=-1)[:: -1 if index else 1]
        positive, negative = torch.sign(tokens, out=self.scratch("features", *tokens.shape)).chunk(2, dim=-1)
        out = torch.mul(plus, positive, out=self.scratch(buffer, *plus.shape))
        return out.addcmul_(minus, negative, value=-1)


@register_kernel("polarity_pp")
class PolarityPlusKernel(LinearKernel):
    """Parameters `s1`, `s2` (1, h, 1, 2d): the raw rates of the two streams. There is no scale."""

    streams = ("same", "opposite")
    feature_map = ExponentialFeatures
    scaled = False

    def add_parameters(self, options: AttentionOptions) -> None:
        self.s1 = nn.Parameter(torch.zeros(1, self.num_heads, 1, 2 * self.head_dim))
        self.s2 = nn.Parameter(torch.zeros(1, self.num_heads, 1, 2 * self.head_dim))

    def learned(self) -> tuple[Tensor | None, ...]:
        return torch.sigmoid(self.s1[0, :, 0]), torch.sigmoid(self.s2[0, :, 0])

    def raw(self) -> Raw | None:
        return Raw("growth", self.s1.view(self.num_heads, -1), self.s2.view(self.num_heads, -1), 0.0)

    def spikiness(self) -> Mapping[str, Tensor]:
        return {stream: rate for stream, rate in zip(self.streams, self.learned(), strict=True) if rate is not None}

    def features(self, u: Tensor) -> Tensor:
        return _growth(_by_sign(u))

    def query_features(self, u: Tensor) -> Mapping[str, Tensor]:
        rates = (rate.to(u.dtype) for rate in self.learned() if rate is not None)
        return {
            stream: _growth(_by_sign(-u if stream == "opposite" else u) * rate)
            for stream, rate in zip(self.streams, rates, strict=True)
        }

    @classmethod
    def channels(cls, stream: str, head_dim: int) -> range:
        border = (head_dim + 1) // 2
        return {"same": range(border), "opposite": range(border, head_dim)}[stream]


def _by_sign(u: Tensor) -> Tensor:
    """[u₊, u₋]; those of −u are [u₋, u₊]."""
    return torch.cat([F.relu(u), F.relu(-u)], dim=-1)


def _growth(x: Tensor) -> Tensor:
    """exp(x) − 1 with the digits of small x; in a TorchScript trace by operations that ONNX has."""
    return torch.tanh(x / 2) * (x.exp() + 1) if torch.jit.is_tracing() else torch.expm1(x)
