"""NaLaFormer: linear attention whose queries keep their norm, as the exponent that sharpens their direction.

"Norm×Direction: Restoring the Missing Query Norm in Vision Linear Attention", arXiv 2506.21137 (ICML 2026). With the
norm ν of a query over its head's channels, its direction w = q/ν and p = λ(τ + tanh ν), λ = 3, τ = ½:

norm_aware    the published code: φ(q) = [relu(w)^p, relu(−w)^p], φ(k) = [relu(k)³, relu(−k)³]; same signs alone count
nala_cosine   the paper's text: φ(q) = |w|^p ⊙ [cos δ, sin δ], φ(k) = |k|³ ⊙ [cos δ, sin δ] with a phase by direction,
              δ(u) = π/4 · tanh(a·u/‖u‖), a = 20, so that a channel counts cos(δ(q) − δ(k)). For a → ∞ it is norm_aware.

Nothing is learned. A query of zeros gives zeros. A body with rotary positions turns each half of the features alike.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.linear_attention import FeatureMap, Stream, fill, split_by_sign
from .base import LinearKernel, register_kernel

SHARPNESS, OFFSET = 3, 0.5  # λ, τ
PHASE_SLOPE = 20.0  # a


class Direction(NamedTuple):
    """u of a block (b, h, T, d), its norm (b, h, T, 1) and direction u/‖u‖, which of zeros is 0."""

    u: Tensor
    norm: Tensor
    direction: Tensor


def direction_of(u: Tensor) -> Direction:
    """The norm in two steps: squares of small numbers would be 0."""
    largest = u.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    scaled = u / largest
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=1.0)  # at least 1, but for zeros
    return Direction(u, largest * length, scaled / length)


def exponent_of(norm: Tensor) -> Tensor:
    """p, between 1.5 and 4.5."""
    return SHARPNESS * (OFFSET + torch.tanh(norm))


class NormAwareFeatures(FeatureMap):
    """Powers of the direction of queries and of the channels of keys, in the half that the sign chooses."""

    @classmethod
    def sets(cls, head_dim: int) -> tuple[tuple[Stream, ...], ...]:
        return ((Stream(slice(0, head_dim)),),)

    @classmethod
    def width(cls, head_dim: int) -> int:
        return 2 * head_dim

    def tokens(self, block: Tensor, padding: Tensor | None = None) -> Tensor:
        return fill(self.scratch("u", *block.shape).copy_(block), padding)

    def key_features(self, tokens: Tensor) -> Tensor:
        return self._halves(tokens * tokens * tokens)

    def query_features(self, tokens: Tensor, index: int) -> Tensor:
        _, norm, direction = direction_of(tokens)
        return self._halves(direction.abs().pow_(exponent_of(norm)).copysign_(direction))

    def key_backward(self, tokens: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return self._chosen(tokens, grad).mul_(tokens).mul_(tokens).mul_(SHARPNESS)

    def query_backward(self, tokens: Tensor, index: int, features: Tensor, grad: Tensor) -> Tensor:
        _, norm, direction = direction_of(tokens)
        return _power_backward(norm, direction, self._chosen(tokens, grad))

    def gradients(self) -> tuple[Tensor | None, ...]:
        return ()

    def _halves(self, signed: Tensor) -> Tensor:
        return split_by_sign(signed, self.scratch("features", *signed.shape[:-1], 2 * signed.shape[-1]))

    def _chosen(self, u: Tensor, grad: Tensor) -> Tensor:
        """The gradient of the signed feature from that of its halves: of the half that the sign of u chooses."""
        positive, negative = grad.chunk(2, dim=-1)
        sign = torch.sign(u)
        plus = sign.clamp(min=0.0)
        return plus.mul(positive).addcmul_(sign.sub_(plus), negative)


def _power_backward(norm: Tensor, direction: Tensor, grad: Tensor) -> Tensor:
    """Gradient of u from that of sign(w)·|w|^p, with w = u/ν and p = λ(τ + tanh ν): directly, and by ν in both."""
    power, size = exponent_of(norm), direction.abs()
    slope = size.pow(power - 1)
    weighted = grad * slope * direction  # the gradient times the feature
    logarithm = size.log_().clamp_(min=-1000.0)  # finite at 0, so that 0 times it is 0
    by_norm = SHARPNESS * (1 - torch.tanh(norm).square()) * (weighted * logarithm).sum(dim=-1, keepdim=True)
    by_norm -= power / norm * weighted.sum(dim=-1, keepdim=True)
    return slope.mul_(grad).mul_(power / norm).addcmul_(direction, by_norm)


class CosineFeatures(NormAwareFeatures):
    """S ⊙ [cos δ, sin δ] with the size S = |w|^p of queries and |k|³ of keys, and the phase δ by direction."""

    def key_features(self, tokens: Tensor) -> Tensor:
        return self._phased(tokens.abs().pow_(SHARPNESS), direction_of(tokens).direction)

    def query_features(self, tokens: Tensor, index: int) -> Tensor:
        _, norm, direction = direction_of(tokens)
        return self._phased(direction.abs().pow_(exponent_of(norm)), direction)

    def key_backward(self, tokens: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        _, norm, direction = direction_of(tokens)
        by_size, by_direction = self._pull_back(tokens.abs().pow_(SHARPNESS), direction, grad)
        by_direction = (by_direction - direction * (by_direction * direction).sum(dim=-1, keepdim=True)) / norm
        return by_size.mul_(tokens).mul_(tokens.abs()).mul_(SHARPNESS).add_(by_direction)

    def query_backward(self, tokens: Tensor, index: int, features: Tensor, grad: Tensor) -> Tensor:
        _, norm, direction = direction_of(tokens)
        by_size, by_direction = self._pull_back(direction.abs().pow_(exponent_of(norm)), direction, grad)
        by_direction = (by_direction - direction * (by_direction * direction).sum(dim=-1, keepdim=True)) / norm
        return _power_backward(norm, direction, by_size.mul_(direction.sign())).add_(by_direction)

    def _phased(self, size: Tensor, direction: Tensor) -> Tensor:
        return phased(size, direction, out=self.scratch("features", *size.shape[:-1], 2 * size.shape[-1]))

    def _pull_back(self, size: Tensor, direction: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the size and, through the phase, of the direction."""
        phase = phase_of(direction)
        cosine, sine = phase.cos(), phase.sin()
        first, second = grad.chunk(2, dim=-1)
        slope = math.pi / 4 * PHASE_SLOPE * (1 - torch.tanh(PHASE_SLOPE * direction).square())
        return first * cosine + second * sine, (second * cosine - first * sine) * size * slope


def phase_of(direction: Tensor) -> Tensor:
    """δ, from −π/4 to π/4."""
    return math.pi / 4 * torch.tanh(PHASE_SLOPE * direction)


@register_kernel("norm_aware")
class NormAwareKernel(LinearKernel):
    """The published code's kernel."""

    feature_map = NormAwareFeatures
    scaled = False

    def learned(self) -> tuple[Tensor | None, ...]:
        return ()

    def query_exponents(self, u: Tensor) -> Tensor:
        return exponent_of(direction_of(u).norm[..., 0])

    def features(self, u: Tensor) -> Tensor:
        return torch.cat([F.relu(u) ** SHARPNESS, F.relu(-u) ** SHARPNESS], dim=-1)

    def query_features(self, u: Tensor) -> Mapping[str, Tensor]:
        _, norm, direction = direction_of(u)
        size = power(direction.abs(), exponent_of(norm))
        return {self.name: torch.cat([size * (direction > 0), size * (direction < 0)], dim=-1)}


@register_kernel("nala_cosine")
class CosineKernel(NormAwareKernel):
    """The paper's kernel, with a phase for each channel."""

    feature_map = CosineFeatures

    def features(self, u: Tensor) -> Tensor:
        return phased(u.abs() ** SHARPNESS, direction_of(u).direction)

    def query_features(self, u: Tensor) -> Mapping[str, Tensor]:
        _, norm, direction = direction_of(u)
        return {self.name: phased(power(direction.abs(), exponent_of(norm)), direction)}


def phased(size: Tensor, direction: Tensor, out: Tensor | None = None) -> Tensor:
    phase = phase_of(direction)
    return torch.cat([size * phase.cos(), size * phase.sin()], dim=-1, out=out)


def power(size: Tensor, exponent: Tensor) -> Tensor:
    """size^exponent, where 0 has no derivative but 0: 0^p would have ln 0 in those by p beyond the first."""
    off = size == 0
    return (size.masked_fill(off, 1.0) ** exponent).masked_fill(off, 0.0)
