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
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..ops.linear_attention import FeatureMap, Raw, Stream, fill, split_by_sign
from .base import LinearKernel, register_kernel

SHARPNESS, OFFSET = 3, 0.5  # λ, τ
PHASE_SLOPE = 20.0  # a


class Direction(NamedTuple):
    """The norm (…, T, 1) of tokens u (…, T, d) and their direction u/‖u‖, which of zeros is 0."""

    norm: Tensor
    direction: Tensor


def direction_of(u: Tensor, out: Tensor | None = None) -> Direction:
    """The norm in two steps: squares of small numbers would be 0. The direction goes into `out`, if there is one."""
    largest = torch.abs(u.detach(), out=out).amax(dim=-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    scaled = torch.div(u, largest, out=out)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=1.0)  # at least 1, but for zeros
    return Direction(largest * length, torch.div(scaled, length, out=out))


def exponent_of(norm: Tensor) -> Tensor:
    """p, between 1.5 and 4.5."""
    return SHARPNESS * (OFFSET + torch.tanh(norm))


class Query(NamedTuple):
    """Of a block of queries: Direction's, p (b, h, T, 1), the sizes |w| ≥ tiny and their binary logarithms."""

    norm: Tensor
    direction: Tensor
    power: Tensor
    size: Tensor
    logarithm: Tensor


class _ByDirection(FeatureMap):
    """What both maps have in common.

    Their pull-backs need no power again: with the size S of a feature φ and its gradient g, S·∂S is φ·g summed over
    both halves.
    """

    @classmethod
    def sets(cls, head_dim: int) -> tuple[tuple[Stream, ...], ...]:
        return ((Stream(slice(0, head_dim)),),)

    @classmethod
    def width(cls, head_dim: int) -> int:
        return 2 * head_dim

    def gradients(self) -> tuple[Tensor | None, ...]:
        return ()

    def query_tokens(self, block: Tensor) -> Query:
        norm, direction = self._direction(self._copied(block))
        size = self._size(direction)
        return Query(norm, direction, exponent_of(norm), size, torch.log2(size, out=self._buffer("logarithm", size)))

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        return self.scratch(name, *like.shape)

    def _copied(self, block: Tensor, padding: Tensor | None = None) -> Tensor:
        return fill(self._buffer("u", block).copy_(block), padding)

    def _direction(self, u: Tensor) -> Direction:
        return direction_of(u, out=self._buffer("direction", u))

    def _size(self, direction: Tensor) -> Tensor:
        """Not 0, which has no logarithm and divides nothing; its powers are 0."""
        size = torch.abs(direction, out=self._buffer("size", direction))
        return size.clamp_(min=torch.finfo(size.dtype).tiny)

    def _powers(self, query: Query) -> Tensor:
        return torch.mul(query.logarithm, query.power, out=self._buffer("signed", query.size)).exp2_()

    def _by_norm(self, query: Query, weighted: Tensor) -> Tensor:
        """Gradient of the norm, in the exponent and in the direction, times the norm; overwrites S·∂S."""
        direct = query.power * weighted.sum(dim=-1, keepdim=True)
        slope = SHARPNESS * math.log(2.0) * (1 - torch.tanh(query.norm).square())
        return slope * query.norm * weighted.mul_(query.logarithm).sum(dim=-1, keepdim=True) - direct


class NormAwareFeatures(_ByDirection):
    """Powers of the direction of queries and of the channels of keys, in the half that the sign chooses."""

    in_triton = "norm"

    def tokens(self, block: Tensor, padding: Tensor | None = None) -> Tensor:
        return self._copied(block, padding)

    def key_features(self, tokens: Tensor) -> Tensor:
        return self._halves(torch.pow(tokens, SHARPNESS, out=self._buffer("signed", tokens)))

    def query_features(self, tokens: Query, index: int) -> Tensor:
        return self._halves(self._powers(tokens).copysign_(tokens.direction))

    def key_backward(self, tokens: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        parts = split_by_sign(tokens, features)
        plus, minus = grad.mul_(parts).chunk(2, dim=-1)
        positive, negative = parts.chunk(2, dim=-1)
        out = torch.mul(plus, positive, out=self._buffer("grad_u", tokens))
        return out.addcmul_(minus, negative, value=-1).mul_(SHARPNESS)

    def query_backward(self, tokens: Query, index: int, features: Tensor, grad: Tensor) -> Tensor:
        plus, minus = grad.mul_(features).chunk(2, dim=-1)
        signed = torch.sub(plus, minus, out=self._buffer("grad_u", plus))
        weighted = torch.add(plus, minus, out=self._buffer("signed", plus))
        signed.div_(tokens.size).mul_(tokens.power)
        return signed.addcmul_(tokens.direction, self._by_norm(tokens, weighted)).div_(tokens.norm)

    def _halves(self, signed: Tensor) -> Tensor:
        return split_by_sign(signed, self.scratch("features", *signed.shape[:-1], 2 * signed.shape[-1]))


class Key(NamedTuple):
    """Of a block of keys: the tokens u and Direction's, and the sizes |w| ≥ tiny."""

    u: Tensor
    norm: Tensor
    direction: Tensor
    size: Tensor


class CosineFeatures(_ByDirection):
    """S ⊙ [cos δ, sin δ] with the size S = |w|^p of queries and |k|³ of keys, and the phase δ by direction."""

    def tokens(self, block: Tensor, padding: Tensor | None = None) -> Key:
        u = self._copied(block, padding)
        norm, direction = self._direction(u)
        return Key(u, norm, direction, self._size(direction))

    def key_features(self, tokens: Key) -> Tensor:
        cubes = torch.pow(tokens.u, SHARPNESS, out=self._buffer("signed", tokens.u)).abs_()
        return self._phased(cubes, tokens.direction)

    def query_features(self, tokens: Query, index: int) -> Tensor:
        return self._phased(self._powers(tokens), tokens.direction)

    def key_backward(self, tokens: Key, features: Tensor, grad: Tensor) -> Tensor:
        turned, across, sized, _ = self._pull_back(tokens, features, grad)
        return turned.add_(sized, alpha=SHARPNESS).addcmul_(tokens.direction, across).div_(tokens.norm)

    def query_backward(self, tokens: Query, index: int, features: Tensor, grad: Tensor) -> Tensor:
        turned, across, sized, weighted = self._pull_back(tokens, features, grad)
        across += self._by_norm(tokens, weighted)
        return turned.addcmul_(sized, tokens.power).addcmul_(tokens.direction, across).div_(tokens.norm)

    def _phased(self, size: Tensor, direction: Tensor) -> Tensor:
        sine = self._tanh(direction).mul_(math.pi / 4).sin_()
        cosine = torch.mul(sine, sine, out=self._buffer("cosine", sine)).neg_().add_(1.0).sqrt_()  # δ is at most π/4
        if torch.compiler.is_compiling():  # which takes no view as `out`
            return torch.cat([size * cosine, size * sine], dim=-1)
        features = self.scratch("features", *size.shape[:-1], 2 * size.shape[-1])
        for part, half in zip((cosine, sine), features.chunk(2, dim=-1), strict=True):
            torch.mul(size, part, out=half)
        return features

    def _tanh(self, direction: Tensor) -> Tensor:
        """Of a times the direction, as 2σ(2x) − 1 in a quarter of tanh's time; exactly ±1 where it saturates."""
        return torch.mul(direction, 2 * PHASE_SLOPE, out=self._buffer("tanh", direction)).sigmoid_().mul_(2).sub_(1)

    def _pull_back(self, tokens: Key | Query, features: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What makes the gradient, times the norm.

        By the phase: that of the direction and, (b, h, T, 1), its part along the direction, to be taken away. By the
        size: S·∂S over the direction, and S·∂S.
        """
        cosine, sine = features.chunk(2, dim=-1)
        first, second = grad.chunk(2, dim=-1)
        slope = self._tanh(tokens.direction).square_().neg_().add_(1.0)
        turned = torch.mul(second, cosine, out=self._buffer("grad_u", cosine)).addcmul_(first, sine, value=-1)
        turned.mul_(slope).mul_(PHASE_SLOPE * math.pi / 4)
        across = torch.mul(turned, tokens.direction, out=slope).sum(dim=-1, keepdim=True).neg_()
        weighted = torch.mul(first, cosine, out=self._buffer("signed", cosine)).addcmul_(second, sine)
        sign = torch.sign(tokens.direction, out=self._buffer("cosine", cosine))
        return turned, across, torch.div(weighted, tokens.size, out=slope).mul_(sign), weighted


def phase_of(direction: Tensor) -> Tensor:
    """δ, from −π/4 to π/4."""
    return math.pi / 4 * torch.tanh(PHASE_SLOPE * direction)


@register_kernel("norm_aware")
class NormAwareKernel(LinearKernel):
    """The published code's kernel."""

    feature_map: ClassVar[type[FeatureMap] | None] = NormAwareFeatures
    scaled = False

    def learned(self) -> tuple[Tensor | None, ...]:
        return ()

    def raw(self) -> Raw | None:
        return Raw("norm", None, None, 0.0)

    def query_exponents(self, u: Tensor) -> Tensor:
        return exponent_of(direction_of(u).norm[..., 0])

    def features(self, u: Tensor) -> Tensor:
        return torch.cat([F.relu(u) ** SHARPNESS, F.relu(-u) ** SHARPNESS], dim=-1)

    def query_features(self, u: Tensor) -> Mapping[str, Tensor]:
        norm, direction = direction_of(u)
        size = power(direction.abs(), exponent_of(norm))
        return {self.name: torch.cat([size * (direction > 0), size * (direction < 0)], dim=-1)}


@register_kernel("nala_cosine")
class CosineKernel(NormAwareKernel):
    """The paper's kernel, with a phase for each channel."""

    feature_map = CosineFeatures

    def raw(self) -> Raw | None:
        return None

    def features(self, u: Tensor) -> Tensor:
        return phased(u.abs() ** SHARPNESS, direction_of(u).direction)

    def query_features(self, u: Tensor) -> Mapping[str, Tensor]:
        norm, direction = direction_of(u)
        return {self.name: phased(power(direction.abs(), exponent_of(norm)), direction)}


def phased(size: Tensor, direction: Tensor, out: Tensor | None = None) -> Tensor:
    phase = phase_of(direction)
    return torch.cat([size * phase.cos(), size * phase.sin()], dim=-1, out=out)


def power(size: Tensor, exponent: Tensor) -> Tensor:
    """size^exponent, where 0 has no derivative but 0: 0^p would have ln 0 in those by p beyond the first."""
    off = size == 0
    return (size.masked_fill(off, 1.0) ** exponent).masked_fill(off, 0.0)
