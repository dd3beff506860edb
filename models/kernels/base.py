"""What every kernel is: how queries find values by keys, what of it is learned, and how it is looked at.

A kernel is one file of this folder. `LinearKernel` is the base of those with a feature map φ, whose weight of a query
and a key is φ(q)·φ(k): a new one gives `features` and is done (docs/new_kernel.md). The attention layouts of
models/attention.py inherit from the kernel they are built with, so that its parameters stand in a file beside theirs.

Letters: B batch, N queries, n keys, C channels, h heads, d = C/h channels per head, f features.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.linear_attention import (
    FeatureMap,
    Raw,
    anywhere,
    choose,
    is_symbolic,
    linear_attention_eager,
    linear_attention_reference,
    of_call,
    reason_against_triton,
)
from ..ops.rotary import Rotary
from ..options import AttentionOptions

# it asks for the dtypes of its input: torch.fx takes it as one operation
torch.fx.wrap("linear_attention_reference")

KERNELS: dict[str, type["Kernel"]] = {}
K = TypeVar("K", bound=type["Kernel"])


def register_kernel(name: str) -> Callable[[K], K]:
    """Give a kernel the name that MODEL.LA.ATTENTION calls it by."""

    def register(cls: K) -> K:
        other = KERNELS.get(name, cls)
        if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):  # not a notebook's cell again
            raise ValueError(f"two kernels are called {name!r}: those of {other.__module__} and {cls.__module__}")
        KERNELS[name] = cls
        cls.name = name
        return cls

    return register


def kernel_of(name: str) -> type["Kernel"]:
    """The kernel of a name. Raises ValueError that lists the names there are."""
    if name not in KERNELS:
        raise ValueError(f"MODEL.LA.ATTENTION (attention) {name!r} is unknown, expected one of {', '.join(KERNELS)}")
    return KERNELS[name]


@torch.fx.wrap
def shifted_and_scaled(
    q: Tensor, k: Tensor, position: Tensor | None, divisor: Tensor | None, num_heads: int
) -> tuple[Tensor, Tensor]:
    """q / divisor and (k + position) / divisor with their channels by heads, in float32 or more under any autocast."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    if position is not None:
        k = k + position.to(dtype)
    if divisor is not None:
        q, k = q / divisor.to(dtype), k / divisor.to(dtype)
    return q.unflatten(-1, (num_heads, -1)), k.unflatten(-1, (num_heads, -1))


@torch.fx.wrap
def through_feature_map(
    kernel: str,
    num_heads: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    learned: Sequence[Tensor | None],
    position: Tensor | None,
    key_mask: Tensor | None,
    rotary: Rotary | None,
    backend: str,
) -> Tensor:
    """As `LinearKernel.mix`, by the feature map of the kernel of that name: one operation for torch.fx."""
    cls = kernel_of(kernel)
    assert issubclass(cls, LinearKernel)
    feature_map = cls.feature_map
    assert feature_map is not None
    chosen = cls.implementation_of(backend, q.shape[-1] // num_heads, q, k, v, position, *learned)
    q, k, v = (t.unflatten(-1, (num_heads, -1)) for t in (q, k, v))
    if position is not None:
        position = position.unflatten(-1, (num_heads, -1))
    if chosen == "triton":
        from ..ops.linear_attention.triton_op import linear_attention_triton  # not every platform has Triton

        linear_attention: Callable[..., Tensor] = linear_attention_triton
    else:
        linear_attention = linear_attention_eager
    out = linear_attention(q, k, v, feature_map, learned, position=position, key_mask=key_mask, rotary=rotary)
    return out.flatten(-2)


class Kernel(nn.Module):
    """Attention between projected queries and keys, (B, N, C) and (B, n, C) to (B, N, C).

    Parameter: `scale` (1, 1, C), softplus of which divides q and k, unless the options or the kernel leave it out;
    subclasses add theirs in `add_parameters`.
    """

    name: ClassVar[str]
    # Keys that change what the kernel computes but no shape: compared when a file is loaded.
    function_keys: ClassVar[tuple[str, ...]] = ()
    # The matrices that it applies to the values, by name; empty: one, called like the kernel.
    streams: ClassVar[tuple[str, ...]] = ()
    # Whether queries and keys may be divided by a learned scale.
    scaled: ClassVar[bool] = True
    # φ with its pull-back, so that nothing of the size of the features is kept for the backward pass; None: autograd.
    feature_map: ClassVar[type[FeatureMap] | None] = None

    def __init__(self, dim: int, num_heads: int, options: AttentionOptions) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"{dim} channels do not divide by {num_heads} heads")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.options = options
        self.add_parameters(options)
        self.scale = nn.Parameter(torch.zeros(1, 1, dim)) if options.learn_scale and self.scaled else None

    def add_parameters(self, options: AttentionOptions) -> None:
        """Create what the kernel learns beside the scale, under the names that it has in a file."""

    @classmethod
    def announce(cls, options: AttentionOptions, device: torch.device) -> str:
        """One phrase for the log: what computes. Raises ValueError where it cannot run on the device."""
        return f"{cls.name} attention"

    # -- computing

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
        """The values v (B, n, C) that q (B, N, C) finds by k (B, n, C): (B, N, C).

        `position` (n, C) is added to k; `key_mask` (B, n) is True for a real key, and the others contribute nothing;
        `rotary` turns the features of a linear kernel by their tokens' positions.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how queries find values")

    def forward(self, *tensors: Any, **named: Any) -> Tensor:
        """`mix`, for a kernel that is used by itself; a layout has a forward pass of its own."""
        return self.mix(*tensors, **named)

    def divisor(self) -> Tensor | None:
        """What queries and keys are divided by, softplus of the scale, (C,); None without a scale."""
        return None if self.scale is None else F.softplus(self.scale[0, 0])

    def prepare(self, q: Tensor, k: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Queries and keys as they are compared, shifted and scaled: (…, N, h, d) and (…, n, h, d), float32 or more."""
        return shifted_and_scaled(q, k, position, self.divisor(), self.num_heads)

    # -- looking

    def exponent(self) -> Tensor | None:
        """The exponent of each head and channel (h, d), of kernels that have one."""
        return None

    def query_exponents(self, u: Tensor) -> Tensor | None:
        """The exponent of each prepared query (…, h, d) by itself, (…, h), of kernels that make one of its norm."""
        return None

    def spikiness(self) -> Mapping[str, Tensor]:
        """What each stream multiplies inside of its features' exponents, 0 to 1, (h, f), of kernels that learn it."""
        return {}

    def scores(self, queries: Tensor, keys: Tensor, factor: float | None = None) -> Tensor:
        """Unnormalised weights before anything that depends on all keys: (…, h, N, n) of prepared (…, N, h, d).

        For kernels without a feature map; `factor` replaces the default factor of the products.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores")

    @classmethod
    def channels(cls, stream: str, head_dim: int) -> range:
        """The value channels of a head that a stream is applied to."""
        return range(head_dim)


class LinearKernel(Kernel):
    """A kernel with a feature map: the weight of a query and a key is φ(q)·φ(k) ≥ 0, over its sum over the keys."""

    def features(self, u: Tensor) -> Tensor:
        """φ(u) ≥ 0, (…, h, f), of prepared queries or keys (…, h, d)."""
        raise NotImplementedError(f"{type(self).__name__} gives no feature map")

    def query_features(self, u: Tensor) -> Mapping[str, Tensor]:
        """The query features of each stream; the features of keys are the same for all of them."""
        return {self.name: self.features(u)}

    def learned(self) -> tuple[Tensor | None, ...]:
        """What `feature_map` learns: its arguments, the divisor (h, d) unless a kernel says otherwise."""
        divisor = self.divisor()
        return (None if divisor is None else divisor.unflatten(-1, (self.num_heads, -1)),)

    def raw(self) -> Raw | None:
        """What `learned` is made of, for Triton's kernels that make it themselves; None where there are none."""
        return None

    @classmethod
    def backends(cls) -> Mapping[str, Callable[[torch.device, torch.dtype, int], str | None]]:
        """The implementations that it has, each with why it cannot take a device, dtype and number of channels."""
        name = None if cls.feature_map is None else cls.feature_map.in_triton
        own = {} if name is None else {"triton": partial(reason_against_triton, feature_map=name)}
        return {"eager": anywhere, **own, "reference": anywhere}

    @classmethod
    def announce(cls, options: AttentionOptions, device: torch.device) -> str:
        chosen = choose(options.backend, cls.backends(), device, attention=cls.name)
        return super().announce(options, device) + (f" backend: {chosen}" if "triton" in cls.backends() else "")

    @classmethod
    def implementation_of(cls, backend: str, channels: int, q: Tensor, k: Tensor, *others: Tensor | None) -> str:
        """The backend that MODEL.LA.BACKEND, its argument, means for a call on these tensors."""
        chosen = choose(backend, cls.backends(), q.device, q.dtype, channels, attention=cls.name)
        return of_call(chosen, backend != "auto", q, k, *others)

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
        """As `Kernel.mix`, in O(N·f·d). `rotary` turns the features that meet the values, not those that normalise."""
        learned = self.learned()
        backend = self.options.backend
        if self.feature_map and self._has_own_backward(q, k, v, position, *learned):
            return through_feature_map(self.name, self.num_heads, q, k, v, learned, position, key_mask, rotary, backend)
        if key_mask is not None:  # whatever stands there, so that not even NaN comes out of it
            k = k.masked_fill(~key_mask[:, :, None], 0.0)
        queries, keys = self.prepare(q, k, position)
        streams = self.query_features(queries)
        out = linear_attention_reference(
            list(streams.values()),
            self.features(keys),
            v.unflatten(-1, (self.num_heads, -1)),
            key_mask,
            channels=[self.channels(stream, self.head_dim) for stream in streams],
            rotary=rotary,
        )
        return out.flatten(-2)

    def _has_own_backward(self, q: Tensor, k: Tensor, *others: Tensor | None) -> bool:
        """Whether what computes is the feature map, and not the formula."""
        if is_symbolic(q, k, *others):
            return self.options.backend != "reference"
        return self.implementation_of(self.options.backend, self.head_dim, q, k, *others) != "reference"
