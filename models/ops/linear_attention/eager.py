"""Linear attention in plain PyTorch with a backward pass of its own, for any feature map that knows its pull-back.

README.md beside this file derives both passes. Nothing of the size of the features is kept for the backward pass,
which computes them again. Outside torch.compile the work goes through the batch, and through long sequences, in blocks
whose features stay in the cache; under torch.compile the same functions are traced once for the whole batch.

Letters: N queries, n keys, h heads, d channels per head, f features; b and T are a block's images and tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import without_autocast
from ..rotary import Rotary, rotate, turn
from .derivatives import check_backward

# Elements of q in a block. On a CPU the handful of buffers of that size then fits the cache that the cores share; on a
# GPU starting a kernel costs as much as so small a block, and memory of that many is at hand.
BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS = 2**19, 2**24


class Stream(NamedTuple):
    """Value channels of a head, and whether their queries meet the two halves of the key features exchanged."""

    channels: slice
    exchanged: bool = False


class FeatureMap(ABC):
    """From a block of tokens to its features, and from the gradient of the features back to the tokens.

    It acts on one token's channels of a head. `scratch` has its buffers; what it learns are the other arguments of the
    constructor, whose gradients it gathers block by block. The features of queries come in `sets`, each read by one or
    more streams over neighbouring value channels; keys have one.
    """

    # Its name in triton_maps.py, if it has kernels.
    in_triton: ClassVar[str | None] = None

    def __init__(self, scratch: "Scratch") -> None:
        self.scratch = scratch

    @classmethod
    @abstractmethod
    def sets(cls, head_dim: int) -> tuple[tuple[Stream, ...], ...]:
        """The streams of each set of query features, by ascending value channels."""

    @classmethod
    @abstractmethod
    def width(cls, head_dim: int) -> int:
        """f, the number of features."""

    @abstractmethod
    def tokens(self, block: Tensor, padding: Tensor | None = None) -> Any:
        """What features and pull-backs of a block (b, h, T, d) are made of; `padding` (b, 1, T, 1) marks tokens to be
        taken as 0, whatever stands there."""

    def query_tokens(self, block: Tensor) -> Any:
        """The same of queries; those of keys unless a map says otherwise."""
        return self.tokens(block)

    @abstractmethod
    def key_features(self, tokens: Any) -> Tensor:
        """(b, h, T, f) ≥ 0"""

    def query_features(self, tokens: Any, index: int) -> Tensor:
        """Of one set (b, h, T, f) ≥ 0; those of the keys unless a map says otherwise."""
        return self.key_features(tokens)

    @abstractmethod
    def key_backward(self, tokens: Any, features: Tensor, grad: Tensor) -> Tensor:
        """Gradient of the block (b, h, T, d) from that of its features; may overwrite its arguments."""

    def query_backward(self, tokens: Any, index: int, features: Tensor, grad: Tensor) -> Tensor:
        """The same of one set of query features; `tokens` are needed as long as another set follows."""
        return self.key_backward(tokens, features, grad)

    @abstractmethod
    def gradients(self) -> tuple[Tensor | None, ...]:
        """Of what it learns, in the order of the constructor's arguments, each in its parameter's shape."""


def linear_attention_eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: Callable[..., FeatureMap],
    learned: Sequence[Tensor | None],
    *,
    position: Tensor | None = None,
    key_mask: Tensor | None = None,
    rotary: Rotary | None = None,
    eps: float = 1e-6,
    blocks_of: type["Blocks"] | None = None,
) -> Tensor:
    """rot(f(q)) · (mean of rot(f(k))ᵀv) / (f(q) · (mean of f(k)) + eps) for each stream; differentiable once.

    Args:
        q, k, v: (B, N, h, d) queries and (B, n, h, d) keys and values of one floating dtype.
        feature_map: makes the map f from a `Scratch` and `learned`.
        learned: what the map learns; gradients flow to each.
        position: (n, h, d), added to the keys of every image. None: 0.
        key_mask: (B, n) bool, True for a real key; masked keys contribute nothing, and means divide by the real ones.
        rotary: turns of the tokens, as many queries as keys; normalisers are not turned. None: none.
        eps: positive, added to the normalisers.
        blocks_of: how blocks of tokens are handled; None: `Blocks`.

    Returns:
        (B, N, h, d) in the dtype of q, computed in float32, or float64 for float64.
    """
    turns = None if rotary is None else torch.stack(rotary)  # an operator's arguments are tensors
    with without_autocast(q.device):
        arguments = (q, k, v, position, key_mask, turns, feature_map, blocks_of or Blocks, eps)
        out: Tensor = _LinearAttention.apply(*arguments, *learned)
        return out


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        key_mask: Tensor | None,
        turns: Tensor | None,
        feature_map: Callable[..., FeatureMap],
        blocks_of: type["Blocks"],
        eps: float,
        *learned: Tensor | None,
    ) -> Tensor:
        B, _, h, d = q.shape
        blocks = blocks_of(q, position, key_mask, turns)
        scratch = blocks.scratch
        f = feature_map(scratch, *learned)
        sets = f.sets(d)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        state = torch.empty(B, h, d + 1, f.width(d), dtype=scratch.dtype, device=q.device)
        for images in _image_blocks(q, k):
            sums = torch.zeros_like(state[images])
            for tokens in _token_blocks(k):
                padding = blocks.padding(images, tokens)
                features = fill(f.key_features(f.tokens(blocks.keys(k, images, tokens), padding)), padding)
                turned = blocks.turned(features, tokens)
                sums[:, :, :d] += _product(blocks.values(v, images, tokens).mT, turned)
                sums[:, :, d:] += sum_over_tokens(features)
            state[images] = sums / _count(k, key_mask, images)
            readouts = [_readout(state[images], streams) for streams in sets]
            for tokens in _token_blocks(q):
                own = f.query_tokens(q[images, tokens].transpose(1, 2))
                for index, streams in enumerate(sets):
                    features = f.query_features(own, index)
                    turned = blocks.turned(features, tokens)
                    product = blocks.read(features, turned, readouts[index], len(streams))
                    blocks.divide(*product, streams, eps, out[images, tokens, :, _channels(streams)].transpose(1, 2))
        ctx.save_for_backward(q, k, v, position, key_mask, turns, state, *learned)
        ctx.feature_map, ctx.blocks_of, ctx.eps = feature_map, blocks_of, eps
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        check_backward(ctx.blocks_of.backend, grad_out)
        q, k, v, position, key_mask, turns, state, *learned = ctx.saved_tensors
        d = q.shape[-1]
        blocks = ctx.blocks_of(q, position, key_mask, turns)
        scratch = blocks.scratch
        f = ctx.feature_map(scratch, *learned)
        sets = f.sets(d)
        grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        grad_position = None if position is None else torch.zeros_like(position, dtype=scratch.dtype)
        for images in _image_blocks(q, k):
            readouts = [_readout(state[images], streams) for streams in sets]
            grad_readouts = [torch.zeros_like(readout) for readout in readouts]
            for tokens in _token_blocks(q):
                own = f.query_tokens(q[images, tokens].transpose(1, 2))
                upstream = grad_out[images, tokens].transpose(1, 2)
                grads = []
                for index, streams in enumerate(sets):
                    features = f.query_features(own, index)
                    turned = blocks.turned(features, tokens)
                    product = blocks.read(features, turned, readouts[index], len(streams))
                    grad_product = blocks.divide_backward(*product, streams, ctx.eps, upstream[..., _channels(streams)])
                    grad_readouts[index] += blocks.grad_readout(features, turned, *grad_product)
                    grad_features = blocks.grad_features(features, readouts[index], *grad_product, tokens)
                    grads.append(f.query_backward(own, index, features, grad_features))
                grad_q[images, tokens] = _sum(grads).transpose(1, 2)
            grad_states = [_readout_backward(grad, sets[index], d) for index, grad in enumerate(grad_readouts)]
            grad_state = _sum(grad_states) / _count(k, key_mask, images)
            grad_sums, grad_ones = grad_state.split([d, 1], dim=2)
            for tokens in _token_blocks(k):
                padding = blocks.padding(images, tokens)
                own = f.tokens(blocks.keys(k, images, tokens), padding)
                features = fill(f.key_features(own), padding)
                values = blocks.values(v, images, tokens)
                turned = blocks.turned(features, tokens)
                grad_values = _product(turned, grad_sums.mT, scratch("product", *values.shape))
                grad_v[images, tokens] = grad_values.transpose(1, 2)
                grad_features = _product(values, grad_sums, scratch("grad_features", *features.shape))
                grad_features = blocks.turned_back(grad_features, tokens).add_(grad_ones)
                grad_keys = fill(f.key_backward(own, features, grad_features), padding).transpose(1, 2)
                grad_k[images, tokens] = grad_keys
                if grad_position is not None:
                    grad_position[tokens] += grad_keys.sum(dim=0)
        return (
            grad_q,
            grad_k,
            grad_v,
            None if grad_position is None else grad_position.to(position.dtype),
            *(None,) * 5,
            *(
                None if parameter is None or grad is None else grad.to(parameter.dtype)
                for parameter, grad in zip(learned, f.gradients(), strict=True)
            ),
        )


class Blocks:
    """Blocks of tokens as the features want them, and the products that features and readouts make."""

    backend = "eager"  # which refuses what it cannot differentiate

    def __init__(self, q: Tensor, position: Tensor | None, key_mask: Tensor | None, turns: Tensor | None) -> None:
        dtype = torch.promote_types(q.dtype, torch.float32)
        self.scratch = Scratch(dtype, q.device)
        self.position = None if position is None else position.to(dtype)
        self.key_mask = key_mask
        self.rotary = None if turns is None else Rotary(*turns.to(dtype))
        self.turns = None  # the same as complex numbers, in one piece with what they turn
        if self.rotary is not None and not torch.compiler.is_compiling():
            self.turns = torch.complex(*self.rotary)

    def keys(self, k: Tensor, images: slice, tokens: slice) -> Tensor:
        """(b, h, T, d), positions added"""
        block = k[images, tokens]
        if self.position is not None:
            block = torch.add(block, self.position[tokens], out=self.scratch("keys", *block.shape))
        return block.transpose(1, 2)

    def values(self, v: Tensor, images: slice, tokens: slice) -> Tensor:
        """(b, h, T, d); masked values are 0, whatever stands there."""
        block = v[images, tokens].transpose(1, 2)
        return fill(self.scratch("values", *block.shape).copy_(block), self.padding(images, tokens))

    def padding(self, images: slice, tokens: slice) -> Tensor | None:
        """(b, 1, T, 1), True for a masked key."""
        return None if self.key_mask is None else ~self.key_mask[images, None, tokens, None]

    def turned(self, features: Tensor, tokens: slice) -> Tensor:
        """Features turned by their tokens' positions, where there are turns, beside the features themselves."""
        if self.rotary is None:
            return features
        if self.turns is None:
            return rotate(features, Rotary(self.rotary.cos[tokens], self.rotary.sin[tokens]))
        return turn(features, self.turns[tokens], out=self.scratch("turned", *features.shape))

    def turned_back(self, grad: Tensor, tokens: slice) -> Tensor:
        """From the gradient of turned features to that of the features, in place."""
        if self.rotary is None:
            return grad
        if self.turns is None:
            return rotate(grad, Rotary(self.rotary.cos[tokens], -self.rotary.sin[tokens]))
        return turn(grad, self.turns[tokens].conj(), out=grad)

    def read(self, features: Tensor, turned: Tensor, readout: Tensor, streams: int) -> tuple[Tensor, Tensor]:
        """Numerators (b, h, T, ·) and normalisers (b, h, T, streams) of query features."""
        rows = readout.shape[2]
        if turned is features:
            product = _product(features, readout.mT, self.scratch("product", *features.shape[:3], rows))
            numerators, normalisers = product.split([rows - streams, streams], dim=-1)
            return numerators, normalisers
        values, means = readout.split([rows - streams, streams], dim=2)
        out = self.scratch("product", *features.shape[:3], rows - streams)
        return _product(turned, values.mT, out), _product(features, means.mT)

    def divide(
        self, numerators: Tensor, normalisers: Tensor, streams: Sequence[Stream], eps: float, out: Tensor
    ) -> None:
        """Each stream's numerators over its normaliser, into `out` (b, h, T, ·)."""
        out.copy_(_divide_streams(numerators, normalisers + eps, streams, out=numerators))

    def divide_backward(
        self, numerators: Tensor, normalisers: Tensor, streams: Sequence[Stream], eps: float, grad: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients of numerators and normalisers from that of their quotients."""
        normalisers = normalisers + eps
        grad_numerators = _divide_streams(grad, normalisers, streams, out=self.scratch("upstream", *grad.shape))
        weighted = torch.mul(numerators, grad_numerators, out=self.scratch("weighted", *grad.shape))
        return grad_numerators, -_sum_per_stream(weighted, streams) / normalisers

    def grad_readout(self, features: Tensor, turned: Tensor, numerators: Tensor, normalisers: Tensor) -> Tensor:
        """From the gradients of what `read` returns."""
        if turned is features:
            return _product(self.joined(numerators, normalisers).mT, features)
        return torch.cat([_product(numerators.mT, turned), _product(normalisers.mT, features)], dim=2)

    def grad_features(
        self, features: Tensor, readout: Tensor, numerators: Tensor, normalisers: Tensor, tokens: slice
    ) -> Tensor:
        """Likewise."""
        grad = self.scratch("grad_features", *features.shape)
        if self.rotary is None:
            return _product(self.joined(numerators, normalisers), readout, grad)
        values, means = readout.split([numerators.shape[-1], normalisers.shape[-1]], dim=2)
        grad = self.turned_back(_product(numerators, values, grad), tokens)
        return grad.addcmul_(normalisers, means) if means.shape[2] == 1 else grad + _product(normalisers, means)

    def joined(self, numerators: Tensor, normalisers: Tensor) -> Tensor:
        shape = (*numerators.shape[:3], numerators.shape[-1] + normalisers.shape[-1])
        return torch.cat([numerators, normalisers], dim=-1, out=self.scratch("grad_product", *shape))


def fill(t: Tensor, padding: Tensor | None) -> Tensor:
    """t with 0 where `padding` is True, in place: a copy would be memory fresh from the system."""
    return t if padding is None else t.masked_fill_(padding, 0.0)


def split_by_sign(signed: Tensor, out: Tensor) -> Tensor:
    """[relu(s), relu(−s)] of (b, h, T, d), into (b, h, T, 2d)."""
    if torch.compiler.is_compiling():  # which takes no view as `out`
        return torch.cat([signed.clamp(min=0.0), (-signed).clamp(min=0.0)], dim=-1)
    positive, negative = out.chunk(2, dim=-1)
    torch.clamp(signed, min=0.0, out=positive)
    torch.sub(positive, signed, out=negative)
    return out


class Scratch:
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


# -- State: rows 0 … d−1 are f(k)ᵀv/n, transposed, one row a value channel; row d is the mean of f(k). Columns: f.
# A readout is what a set of query features multiplies: the rows of its streams' channels, then a mean for each stream.


def _count(k: Tensor, key_mask: Tensor | None, images: slice) -> Tensor | int:
    """Number of real keys; 1 where there are none, whose sums are 0."""
    if key_mask is None:
        return k.shape[1]
    return key_mask[images].sum(dim=1).clamp(min=1)[:, None, None, None]


def _channels(streams: Sequence[Stream]) -> slice:
    """The value channels that a set's streams read together."""
    return slice(streams[0].channels.start, streams[-1].channels.stop)


def _readout(state: Tensor, streams: Sequence[Stream]) -> Tensor:
    """(…, d + 1, f) to (…, channels + streams, f): halves exchanged where a stream wants it, then the means."""
    met = [_exchanged(state, stream) for stream in streams]
    rows = [part[..., stream.channels, :] for part, stream in zip(met, streams, strict=True)]
    return torch.cat([*rows, *(part[..., -1:, :] for part in met)], dim=-2)


def _readout_backward(grad: Tensor, streams: Sequence[Stream], d: int) -> Tensor:
    """Gradient of the state (…, d + 1, f) from that of a readout of it."""
    whole = _channels(streams)
    met = [_exchanged(grad, stream) for stream in streams]
    rows = [
        part[..., stream.channels.start - whole.start : stream.channels.stop - whole.start, :]
        for part, stream in zip(met, streams, strict=True)
    ]
    width = whole.stop - whole.start
    mean = _sum([part[..., width + i : width + i + 1, :] for i, part in enumerate(met)])
    pieces = [*rows, mean]
    for place, size in ((len(rows), d - whole.stop), (0, whole.start)):  # of channels that other sets read
        if size:
            pieces.insert(place, grad.new_zeros(*grad.shape[:-2], size, grad.shape[-1]))
    return torch.cat(pieces, dim=-2)


def _exchanged(t: Tensor, stream: Stream) -> Tensor:
    return t.roll(t.shape[-1] // 2, dims=-1) if stream.exchanged else t


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _divide_streams(channels: Tensor, normalisers: Tensor, streams: Sequence[Stream], out: Tensor) -> Tensor:
    """Divide each stream's channels of (…, channels) by its own normaliser (…, streams).

    By a division each: rounding errors of a common reciprocal would not average out where gradients cancel.
    """
    sizes = [stream.channels.stop - stream.channels.start for stream in streams]
    pairs = list(zip(channels.split(sizes, dim=-1), normalisers.split(1, dim=-1), strict=True))
    if torch.compiler.is_compiling():  # which takes no view as `out`
        return torch.cat([torch.div(*pair) for pair in pairs], dim=-1)
    for pair, part in zip(pairs, out.split(sizes, dim=-1), strict=True):
        torch.div(*pair, out=part)
    return out


def _sum_per_stream(channels: Tensor, streams: Sequence[Stream]) -> Tensor:
    """(…, channels) to (…, streams)"""
    sizes = [stream.channels.stop - stream.channels.start for stream in streams]
    return torch.stack([part.sum(dim=-1) for part in channels.split(sizes, dim=-1)], dim=-1)


def sum_over_tokens(t: Tensor) -> Tensor:
    """(b, h, T, ·) to (b, h, 1, ·)"""
    if torch.compiler.is_compiling():  # whose own sums add one token after the other, at three times the error
        return t.sum(dim=2, keepdim=True, dtype=torch.float64).to(t.dtype)
    return t.sum(dim=2, keepdim=True)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Matrix product over the last two axes of (b, h, ·, ·)."""
    flat_out = None if out is None else out.flatten(0, 1)
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat_out).unflatten(0, a.shape[:2])


# -- Blocks


def _image_blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """The batch in blocks of about so many elements of the longer of queries and keys."""
    if torch.compiler.is_compiling():
        return iter([slice(None)])
    B, _, h, d = q.shape
    images = max(1, _block_elements(q) // (max(q.shape[1], k.shape[1]) * h * d))
    return (slice(start, start + images) for start in range(0, B, images))


def _token_blocks(t: Tensor) -> Iterator[slice]:
    """A sequence in blocks of at most so many elements of one image."""
    if torch.compiler.is_compiling():
        return iter([slice(None)])
    tokens = max(1, _block_elements(t) // (t.shape[2] * t.shape[3]))
    return (slice(start, start + tokens) for start in range(0, t.shape[1], tokens))


def _block_elements(t: Tensor) -> int:
    return BLOCK_ELEMENTS if t.device.type == "cpu" else GPU_BLOCK_ELEMENTS
