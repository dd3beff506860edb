"""Polarity-aware linear attention in plain PyTorch, in the one-GEMM form, with a backward pass of its own.

README.md beside this file derives both passes. Nothing of the size of the features is kept for the backward pass, which
computes them again. Outside torch.compile the work goes through the batch, and through long sequences, in blocks whose
features stay in the cache; under torch.compile the same functions are traced once for the whole batch.

Letters: N queries, n keys, h heads, d channels per head; b and T are a block's images and tokens.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import without_autocast
from .derivatives import check_backward

# Elements of q in a block: the handful of buffers of that size then fits the cache that the cores share.
BLOCK_ELEMENTS = 2**19


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
    with without_autocast(q.device):
        out: Tensor = _PolarityAttention.apply(q, k, v, exponent, scale, position, key_mask, eps)
        return out


class _PolarityAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        exponent: Tensor,
        scale: Tensor | None,
        position: Tensor | None,
        key_mask: Tensor | None,
        eps: float,
    ) -> Tensor:
        B, _, h, d = q.shape
        tokens_of = _Tokens(q, exponent, scale, position, key_mask)
        scratch = tokens_of.scratch
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        state = torch.empty(B, h, d + 1, 2 * d, dtype=scratch.dtype, device=q.device)
        for images in _image_blocks(q, k):
            sums = torch.zeros_like(state[images])
            for tokens in _token_blocks(k):
                u, _, slope = tokens_of.keys(k, images, tokens)
                features = tokens_of.features(u, slope)
                sums[:, :, :d] += _product(tokens_of.values(v, images, tokens).mT, features)
                sums[:, :, d:] += _sum_over_tokens(features)
            state[images] = sums / _count(k, key_mask, images)
            readout = _readout(state[images])
            for tokens in _token_blocks(q):
                u, _, slope = tokens_of.queries(q, images, tokens)
                features = tokens_of.features(u, slope)
                product = _product(features, readout.mT, scratch("product", *u.shape[:3], d + 2))
                numerators, normalisers = product.split([d, 2], dim=-1)
                result = _divide_streams(numerators, normalisers + eps, out=numerators)
                out[images, tokens] = result.transpose(1, 2)
        ctx.save_for_backward(q, k, v, exponent, scale, position, key_mask, state)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_backward("eager", grad_out)
        q, k, v, exponent, scale, position, key_mask, state = ctx.saved_tensors
        d = q.shape[-1]
        tokens_of = _Tokens(q, exponent, scale, position, key_mask)
        scratch = tokens_of.scratch
        grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        grad_position = None if position is None else torch.zeros_like(position, dtype=scratch.dtype)
        for images in _image_blocks(q, k):
            readout = _readout(state[images])
            grad_readout = torch.zeros_like(readout)
            for tokens in _token_blocks(q):
                u, magnitude, slope = tokens_of.queries(q, images, tokens)
                features = tokens_of.features(u, slope)
                product = _product(features, readout.mT, scratch("product", *u.shape[:3], d + 2))
                numerators, normalisers = product.split([d, 2], dim=-1)
                normalisers = normalisers + ctx.eps
                upstream = grad_out[images, tokens].transpose(1, 2)
                grad_numerators = _divide_streams(upstream, normalisers, out=scratch("upstream", *u.shape))
                weighted = torch.mul(numerators, grad_numerators, out=scratch("weighted", *u.shape))
                grad_normalisers = -_sum_per_stream(weighted) / normalisers
                grad_product = torch.cat(
                    [grad_numerators, grad_normalisers], dim=-1, out=scratch("grad_product", *product.shape)
                )
                grad_readout += _product(grad_product.mT, features)
                grad_features = _product(grad_product, readout, scratch("grad_features", *features.shape))
                grad_q[images, tokens] = tokens_of.backward(u, magnitude, slope, grad_features).transpose(1, 2)
            grad_state = _readout_backward(grad_readout) / _count(k, key_mask, images)
            grad_sums, grad_ones = grad_state.split([d, 1], dim=2)
            for tokens in _token_blocks(k):
                u, magnitude, slope = tokens_of.keys(k, images, tokens)
                features = tokens_of.features(u, slope)
                values = tokens_of.values(v, images, tokens)
                grad_values = _product(features, grad_sums.mT, scratch("product", *values.shape))
                grad_v[images, tokens] = grad_values.transpose(1, 2)
                grad_features = _product(values, grad_sums, scratch("grad_features", *features.shape)).add_(grad_ones)
                grad_keys = tokens_of.backward(u, magnitude, slope, grad_features).transpose(1, 2)
                grad_k[images, tokens] = grad_keys
                if grad_position is not None:
                    grad_position[tokens] += grad_keys.sum(dim=0)
        return (
            grad_q,
            grad_k,
            grad_v,
            tokens_of.log_moment[:, 0].to(exponent.dtype),
            None if scale is None else (-tokens_of.moment[:, 0] * exponent / scale).to(scale.dtype),
            None if grad_position is None else grad_position.to(position.dtype),
            None,
            None,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------


class _Tokens:
    """From a block of tokens to u = q/scale or (k + position)/scale, from u to features, and back.

    With slope = |u|^(p−1), the signed feature is slope · u, its derivative by u is p · slope, and by p it is
    slope · u · ln|u|. The gradients of exponent and scale are sums over tokens, gathered block by block.
    """

    def __init__(
        self, q: Tensor, exponent: Tensor, scale: Tensor | None, position: Tensor | None, key_mask: Tensor | None
    ) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.scratch = _Scratch(dtype, q.device)
        self.exponent = exponent.to(dtype)[:, None, :]  # (h, 1, d)
        scale = torch.ones_like(self.exponent) if scale is None else scale.to(dtype)[:, None, :]
        # NaN where either parameter is not finite, which pow(1, NaN) = 1 and x/Inf = 0 would hide
        self.inverse_scale = torch.addcmul(scale.reciprocal(), scale, self.exponent, value=0.0)
        self.position = None if position is None else position.to(dtype)
        self.key_mask = key_mask
        self.moment = torch.zeros_like(self.exponent)  # Σ u·∂/∂u, without the factor p
        self.log_moment = torch.zeros_like(self.exponent)  # the same, each term times ln|u|

    def queries(self, q: Tensor, images: slice, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        """u, |u| and slope of a block, each (b, h, T, d)."""
        return self._sharpen(q[images, tokens])

    def keys(self, k: Tensor, images: slice, tokens: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The same of keys; u of masked keys is 0, whatever stands there."""
        block = k[images, tokens]
        if self.position is not None:
            block = torch.add(block, self.position[tokens], out=self.scratch("keys", *block.shape))
        return self._sharpen(block, self._padding(images, tokens))

    def values(self, v: Tensor, images: slice, tokens: slice) -> Tensor:
        """(b, h, T, d); masked values are 0, whatever stands there."""
        block = v[images, tokens].transpose(1, 2)
        return _fill(self.scratch("values", *block.shape).copy_(block), self._padding(images, tokens))

    def _padding(self, images: slice, tokens: slice) -> Tensor | None:
        """(b, 1, T, 1), True for a masked key."""
        return None if self.key_mask is None else ~self.key_mask[images, None, tokens, None]

    def _sharpen(self, block: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        block = block.transpose(1, 2)
        u = _fill(torch.mul(block, self.inverse_scale, out=self.scratch("u", *block.shape)), padding)
        magnitude = torch.abs(u, out=self.scratch("magnitude", *u.shape))
        slope = torch.pow(magnitude, self.exponent - 1, out=self.scratch("slope", *u.shape))
        return u, magnitude, slope

    def features(self, u: Tensor, slope: Tensor) -> Tensor:
        """[relu(u)^p, relu(−u)^p], (b, h, T, 2d)."""
        signed = torch.mul(slope, u, out=self.scratch("signed", *u.shape))
        if torch.compiler.is_compiling():  # which takes no view as `out`
            return torch.cat([signed.clamp(min=0.0), (-signed).clamp(min=0.0)], dim=-1)
        features = self.scratch("features", *u.shape[:-1], 2 * u.shape[-1])
        positive, negative = features.chunk(2, dim=-1)
        torch.clamp(signed, min=0.0, out=positive)
        torch.sub(positive, signed, out=negative)
        return features

    def backward(self, u: Tensor, magnitude: Tensor, slope: Tensor, grad_features: Tensor) -> Tensor:
        """Gradient of the tokens (b, h, T, d) from that of their features (b, h, T, 2d); overwrites its arguments."""
        positive_grad, negative_grad = grad_features.chunk(2, dim=-1)
        # a relu passes nothing at 0, so the sign of u, and not that of its slope, chooses the half
        signed_slope = torch.sign(u, out=self.scratch("signed", *u.shape)).mul_(slope)
        positive = torch.clamp(signed_slope, min=0.0, out=slope)
        negative = signed_slope.sub_(positive)  # ≤ 0
        grad_u = positive.mul_(positive_grad).addcmul_(negative, negative_grad)  # without the factor p
        # ln(0) as a number below every float's logarithm, so that 0 times it is 0; written out, because torch.compile
        # with dynamic=True makes a module's float a variable of the first layer's graph, which no other layer may read
        log = magnitude.log_().clamp_(min=-1000.0)
        self.moment += _sum_over_tokens(u.mul_(grad_u)).sum(dim=0)
        self.log_moment += _sum_over_tokens(u.mul_(log)).sum(dim=0)
        return grad_u.mul_(self.exponent * self.inverse_scale)


def _fill(t: Tensor, padding: Tensor | None) -> Tensor:
    """t with 0 where `padding` is True, in place: a copy would be memory fresh from the system."""
    return t if padding is None else t.masked_fill_(padding, 0.0)


class _Scratch:
    """Buffers by name that all blocks of one pass share: memory fresh from the system costs more than the arithmetic.

    Under torch.compile each request is a tensor of its own, and the compiler plans the memory.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=self.dtype, device=self.device)
        return self.buffers[name][:size].view(shape)


# ---------------------------------------------------------------------------------------------------------------------
# State: rows 0 … d−1 are k̃ᵀv/n, transposed, one row a value channel; row d is the mean of k̃. Columns: 2d features.
# ---------------------------------------------------------------------------------------------------------------------


def _count(k: Tensor, key_mask: Tensor | None, images: slice) -> Tensor | int:
    """Number of real keys; 1 where there are none, whose sums are 0."""
    if key_mask is None:
        return k.shape[1]
    return key_mask[images].sum(dim=1).clamp(min=1)[:, None, None, None]


def _same(d: int) -> int:
    """Number of value channels that the same-signed stream reads."""
    return (d + 1) // 2


def _readout(state: Tensor) -> Tensor:
    """(…, d + 1, 2d) to (…, d + 2, 2d): halves exchanged where the opposite-signed stream reads; both normalisers."""
    d = state.shape[-1] // 2
    swapped = state.roll(d, dims=-1)
    return torch.cat(
        [state[..., : _same(d), :], swapped[..., _same(d) : d, :], state[..., d:, :], swapped[..., d:, :]], dim=-2
    )


def _readout_backward(grad: Tensor) -> Tensor:
    """Gradient of the state from that of its readout."""
    d = grad.shape[-1] // 2
    swapped = grad.roll(d, dims=-1)
    mean = grad[..., d : d + 1, :] + swapped[..., d + 1 :, :]
    return torch.cat([grad[..., : _same(d), :], swapped[..., _same(d) : d, :], mean], dim=-2)


def _divide_streams(channels: Tensor, normalisers: Tensor, out: Tensor) -> Tensor:
    """Divide each stream's channels (…, d) by its own normaliser (…, 2).

    By a division each: rounding errors of a common reciprocal would not average out where gradients cancel.
    """
    same = _same(channels.shape[-1])
    streams = (channels[..., :same], normalisers[..., :1]), (channels[..., same:], normalisers[..., 1:])
    if torch.compiler.is_compiling():  # which takes no view as `out`
        return torch.cat([torch.div(*stream) for stream in streams], dim=-1)
    for stream, part in zip(streams, (out[..., :same], out[..., same:]), strict=True):
        torch.div(*stream, out=part)
    return out


def _sum_per_stream(channels: Tensor) -> Tensor:
    """(…, d) to (…, 2)"""
    same = _same(channels.shape[-1])
    return torch.stack([channels[..., :same].sum(dim=-1), channels[..., same:].sum(dim=-1)], dim=-1)


def _sum_over_tokens(t: Tensor) -> Tensor:
    """(b, h, T, ·) to (b, h, 1, ·)"""
    if torch.compiler.is_compiling():  # whose own sums add one token after the other, at three times the error
        return t.sum(dim=2, keepdim=True, dtype=torch.float64).to(t.dtype)
    return t.sum(dim=2, keepdim=True)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product over the last two axes of (b, h, ·, ·)."""
    flat_out = None if out is None else out.flatten(0, 1)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat_out).unflatten(0, a.shape[:2])


# ---------------------------------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------------------------------


def _image_blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """The batch in blocks of about BLOCK_ELEMENTS elements of the longer of queries and keys."""
    if torch.compiler.is_compiling():
        return iter([slice(None)])
    B, _, h, d = q.shape
    images = max(1, BLOCK_ELEMENTS // (max(q.shape[1], k.shape[1]) * h * d))
    return (slice(start, start + images) for start in range(0, B, images))


def _token_blocks(t: Tensor) -> Iterator[slice]:
    """A sequence in blocks of at most BLOCK_ELEMENTS elements of one image."""
    if torch.compiler.is_compiling():
        return iter([slice(None)])
    tokens = max(1, BLOCK_ELEMENTS // (t.shape[2] * t.shape[3]))
    return (slice(start, start + tokens) for start in range(0, t.shape[1], tokens))
