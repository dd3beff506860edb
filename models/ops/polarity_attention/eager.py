"""Polarity attention's features for the core of ../linear_attention/eager.py: powers of relu(±u).

README.md beside this file derives its pull-back.

Letters: h heads, d channels per head; b and T are a block's images and tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..linear_attention import FeatureMap, Scratch, Stream, fill, linear_attention_eager, split_by_sign, sum_over_tokens


def polarity_attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor,
    scale: Tensor | None,
    position: Tensor | None,
    key_mask: Tensor | None,
    eps: float,
) -> Tensor:
    """Arguments and result as in `polarity_attention`; differentiable once."""
    learned = (exponent, scale)
    return linear_attention_eager(q, k, v, PolarityFeatures, learned, position=position, key_mask=key_mask, eps=eps)


class Sharpened(NamedTuple):
    """u = token/scale, |u| and slope = |u|^(p−1) of a block, each (b, h, T, d)."""

    u: Tensor
    magnitude: Tensor
    slope: Tensor


class PolarityFeatures(FeatureMap):
    """[relu(u)^p, relu(−u)^p] with u = token/scale.

    The signed feature is slope · u, its derivative by u p · slope, and that by p slope · u · ln|u|. Queries have one
    set of features: the opposite-signed stream reads it with the halves of the state exchanged.
    """

    in_triton = "power"

    def __init__(self, scratch: Scratch, exponent: Tensor, scale: Tensor | None) -> None:
        super().__init__(scratch)
        self.exponent = exponent.to(scratch.dtype)[:, None, :]  # (h, 1, d)
        self.scale = scale
        divisor = torch.ones_like(self.exponent) if scale is None else scale.to(scratch.dtype)[:, None, :]
        # NaN where either parameter is not finite, which pow(1, NaN) = 1 and x/Inf = 0 would hide
        self.inverse_scale = torch.addcmul(divisor.reciprocal(), divisor, self.exponent, value=0.0)
        self.moment = torch.zeros_like(self.exponent)  # Σ u·∂/∂u, without the factor p
        self.log_moment = torch.zeros_like(self.exponent)  # the same, each term times ln|u|

    @classmethod
    def sets(cls, head_dim: int) -> tuple[tuple[Stream, ...], ...]:
        same = (head_dim + 1) // 2
        return ((Stream(slice(0, same)), Stream(slice(same, head_dim), exchanged=True)),)

    @classmethod
    def width(cls, head_dim: int) -> int:
        return 2 * head_dim

    def tokens(self, block: Tensor, padding: Tensor | None = None) -> Sharpened:
        u = fill(torch.mul(block, self.inverse_scale, out=self.scratch("u", *block.shape)), padding)
        magnitude = torch.abs(u, out=self.scratch("magnitude", *u.shape))
        slope = torch.pow(magnitude, self.exponent - 1, out=self.scratch("slope", *u.shape))
        return Sharpened(u, magnitude, slope)

    def key_features(self, tokens: Sharpened) -> Tensor:
        signed = torch.mul(tokens.slope, tokens.u, out=self.scratch("signed", *tokens.u.shape))
        return split_by_sign(signed, self.scratch("features", *signed.shape[:-1], 2 * signed.shape[-1]))

    def key_backward(self, tokens: Sharpened, features: Tensor, grad: Tensor) -> Tensor:
        u, magnitude, slope = tokens
        positive_grad, negative_grad = grad.chunk(2, dim=-1)
        # a relu passes nothing at 0, so the sign of u, and not that of its slope, chooses the half
        signed_slope = torch.sign(u, out=self.scratch("signed", *u.shape)).mul_(slope)
        positive = torch.clamp(signed_slope, min=0.0, out=slope)
        negative = signed_slope.sub_(positive)  # ≤ 0
        grad_u = positive.mul_(positive_grad).addcmul_(negative, negative_grad)  # without the factor p
        # ln(0) as a number below every float's logarithm, so that 0 times it is 0; written out, because torch.compile
        # with dynamic=True makes a module's float a variable of the first layer's graph, which no other layer may read
        log = magnitude.log_().clamp_(min=-1000.0)
        self.moment += sum_over_tokens(u.mul_(grad_u)).sum(dim=0)
        self.log_moment += sum_over_tokens(u.mul_(log)).sum(dim=0)
        return grad_u.mul_(self.exponent * self.inverse_scale)

    def gradients(self) -> tuple[Tensor | None, ...]:
        if self.scale is None:
            return self.log_moment[:, 0], None
        return self.log_moment[:, 0], -self.moment[:, 0] * self.exponent[:, 0] / self.scale
