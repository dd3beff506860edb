"""The Triton kernels as PyTorch operators: what they can take, how they are launched, and what autograd, torch.compile
and the FLOP counter ask of an operator.

Letters as in triton.py: B images, N queries, n keys, H heads, D channels per head.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..rotary import Rotary
from .derivatives import check_backward
from .eager import FeatureMap
from .operators import differentiable, operator
from .triton import (
    key_backward_kernel,
    output_kernel,
    query_backward_kernel,
    state_kernel,
)

# The feature maps, and how many sums over tokens a channel has for the gradients of what each learns.
MOMENTS = {"power": 2, "growth": 4, "norm": 0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# -- Launching

# One CUDA device's multiprocessors; the interpreter, which has none, splits sequences as such a device would.
INTERPRETED_MULTIPROCESSORS = 132
# Tokens of a tile, warps, and stages of the pipeline by padded channels: of the kernel of the state, of the output, and
# of the gradients over queries and over keys. What takes the fewest instructions at the highest occupancy without
# spilling, as far as that goes (tests/test_compiled_kernels.py has the figures, benchmarks/kernels.py counts).
LAUNCHES = {
    torch.bfloat16: {
        32: ((64, 4, 2), (64, 4, 2), (32, 2, 2), (64, 4, 2)),
        64: ((32, 4, 2), (64, 4, 2), (64, 8, 1), (32, 8, 1)),
        128: ((32, 8, 1), (32, 8, 1), (16, 8, 1), (16, 8, 1)),
    },
    torch.float16: {
        32: ((64, 4, 3), (64, 4, 3), (16, 4, 3), (32, 4, 3)),
        64: ((32, 8, 2), (32, 8, 2), (16, 8, 2), (16, 8, 2)),
        128: ((16, 8, 1), (16, 8, 1), (16, 8, 1), (16, 8, 1)),
    },
    torch.float32: {
        32: ((32, 4, 3), (32, 4, 3), (16, 4, 3), (16, 4, 3)),
        64: ((32, 8, 2), (32, 8, 2), (16, 8, 2), (16, 8, 2)),
        128: ((16, 8, 1), (16, 8, 1), (16, 8, 1), (16, 8, 1)),
    },
}
# Other maps than power, which hold more: in bfloat16, by the kernel's place below and padded channels.
LAUNCHES_OF_MAPS = {
    ("growth", 1): {64: (64, 8, 1)},
    ("growth", 2): {32: (16, 4, 1), 64: (16, 4, 1)},
    ("norm", 2): {64: (32, 8, 1)},
    ("norm", 3): {64: (64, 4, 1)},
}
KERNELS = (state_kernel, output_kernel, query_backward_kernel, key_backward_kernel)
# Of a thread: so three programs of four warps fit a multiprocessor. Left alone, the compiler takes a few more.
REGISTERS_OF_THREE_PROGRAMS = 168
# How many programs of a kernel that sums over tokens a multiprocessor holds at a time, by padded channels: in bfloat16
# on Hopper, near enough for the others.
RESIDENT_PROGRAMS = {state_kernel: {32: 3, 64: 3, 128: 1}, query_backward_kernel: {32: 4, 64: 1, 128: 1}}
# Bytes of shared memory that the most demanding kernel takes, by the same.
SHARED_MEMORY = {
    torch.bfloat16: {32: 51200, 64: 65536, 128: 163840},
    torch.float16: {32: 45056, 64: 90112, 128: 196608},
    torch.float32: {32: 32768, 64: 73728, 128: 172032},
}
# The same of the other maps, of any dtype, and the most channels that they take.
SHARED_MEMORY_OF_MAPS = {"growth": {32: 131072, 64: 156672}, "norm": {32: 86016, 64: 98304}}
# A sequence is split for a sum only into parts that outweigh the state, 2·D·(D + 1) floats, that each part writes.
MIN_TOKENS_OF_A_SUM = 256
# About as long as these many tokens of a part take its beginning and its end.
TOKENS_OF_AN_END = 128
# Where programs sum nothing that they would have to write, a part is long enough to outweigh reading the state.
TILES_OF_A_PART = 4


def is_interpreted() -> bool:
    """Whether kernels run on the CPU in Triton's interpreter (TRITON_INTERPRET=1 when this module was imported)."""
    return not isinstance(state_kernel, triton.JITFunction)


def reason_against(device: torch.device, dtype: torch.dtype, channels: int, feature_map: str = "power") -> str | None:
    """Why the kernels cannot take tensors of this device, dtype and number of channels per head, or None."""
    shared_memory = SHARED_MEMORY_OF_MAPS.get(feature_map, SHARED_MEMORY.get(dtype, {}))
    if device.type != "cuda" and not is_interpreted():
        return f"it needs a CUDA device (or TRITON_INTERPRET=1), the queries are on {device.type}"
    if torch.version.hip:
        return "its kernels hold instructions of NVIDIA's GPUs, this PyTorch is built for ROCm"
    if dtype not in DTYPES:
        return f"it computes in float32, bfloat16 or float16, the queries are {str(dtype).removeprefix('torch.')}"
    if channels > max(shared_memory):
        return f"it takes up to {max(shared_memory)} channels per head, the queries have {channels}"
    if device.type == "cuda":
        needed = shared_memory[_table_size(channels)]
        available = torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        if needed > available:
            return f"{channels} channels per head take {needed} bytes of shared memory, the device has {available}"
    return None


def _table_size(channels: int) -> int:
    return 32 if channels <= 32 else 64 if channels <= 64 else 128


@functools.cache
def launch_options(
    kernel: Any, channels: int, dtype: torch.dtype, architecture: int | None, feature_map: str = "power"
) -> dict[str, Any]:
    """Compile-time constants of a kernel: tile and padded sizes, precision of its products, warps and pipeline stages.

    architecture: compute capability, 90 for 9.0; None for the interpreter.

    Features overflow float16, so float16 inputs are multiplied in TF32. The interpreter's bfloat16 products are wrong
    (Triton 3.7), so it multiplies in float32.
    """
    precision = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "ieee"}[dtype]
    size = _table_size(channels)
    place = KERNELS.index(kernel)
    tile, warps, stages = LAUNCHES[dtype][size][place]
    if dtype == torch.bfloat16:
        tile, warps, stages = LAUNCHES_OF_MAPS.get((feature_map, place), {}).get(size, (tile, warps, stages))
    if kernel is query_backward_kernel and size == 64 and architecture is not None and architecture < 90:
        tile = 16  # operands of products before Hopper's take more registers
    if architecture is not None and 100 <= architecture < 120:
        stages = 1  # Triton 3.7 fails to pipeline inline assembly with the tensor cores of data centres' Blackwell
    options: dict[str, Any] = {"num_warps": warps, "num_stages": stages}
    if (kernel, dtype, channels) == (key_backward_kernel, torch.bfloat16, 32) and (architecture or 0) >= 90:
        options["maxnreg"] = REGISTERS_OF_THREE_PROGRAMS  # Ampere's, and those that are padded, would spill
    return {
        "D": channels,
        "DP": 16 if channels <= 16 else size,
        "T": tile,
        "PRECISION": "interpreted" if architecture is None else precision,
        **options,
    }


@functools.lru_cache(1024)
def parts_of_a_sum(tokens: int, sequences: int, slots: int) -> int:
    """Parts of each sequence, for a kernel that sums over tokens, of which the device holds `slots` programs at a time.

    Programs run in waves of so many, and the last takes as long as the others, however few are left for it. Few long
    sequences fill the device that way, and one and a half waves become three of half the length.
    """

    def duration(parts: int) -> float:
        return triton.cdiv(sequences * parts, slots) * (tokens / parts + TOKENS_OF_AN_END)

    return min(range(1, max(1, tokens // MIN_TOKENS_OF_A_SUM) + 1), key=duration)


def plain_parts(tokens: int, tile: int) -> tuple[int, int]:
    """Number of parts, and tokens of each, for a kernel whose tokens are independent."""
    return triton.cdiv(tokens, TILES_OF_A_PART * tile), TILES_OF_A_PART * tile


def with_unit_channel_stride(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


class Gating(NamedTuple):
    """The gate (B, N, H, D), what it multiplies, the gradient of the gate and that of what it multiplies."""

    gate: Tensor
    ungated: Tensor
    grad_gate: Tensor
    gated: Tensor


class Launch:
    """What all launches of one call share: tensors and constants.

    The learned, first and second, are of power exponent and scale (H, D), of growth the rates of its sets (H, 2·D), and
    with `alpha` what they are made of: 1 + alpha·sigmoid of the first, softplus of the second; of growth sigmoid.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor | None,
        second: Tensor | None,
        position: Tensor | None,
        key_mask: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        feature_map: str,
        eps: float,
        alpha: float | None = None,
    ) -> None:
        self.eps = eps
        self.B, self.N, self.H, self.D = q.shape
        self.n = k.shape[1]
        self.q, self.k, self.v = (with_unit_channel_stride(t) for t in (q, k, v))
        self.learned = [None if t is None else t.contiguous() for t in (first, second)]
        self.turns = [None if t is None else t.contiguous() for t in (cos, sin)]
        self.position, self.key_mask = (None if t is None else t.contiguous() for t in (position, key_mask))
        self.inverse_count = None  # (B,) one over the number of real keys, 1 where there are none
        if key_mask is not None:
            self.inverse_count = key_mask.sum(dim=1).clamp(min=1).float().reciprocal()
        self.device, self.dtype = q.device, q.dtype
        self.architecture = None
        if not is_interpreted():
            major, minor = torch.cuda.get_device_capability(q.device)
            self.architecture = 10 * major + minor
        self.state_shape = (self.B, self.H, 2, self.D + 1, self.D)
        self.feature_map, self.power = feature_map, feature_map == "power"
        self.flags = {"MAP": feature_map, "H": self.H, "ALPHA": alpha, "HAS_TURNS": cos is not None}
        self.of_queries = {"BORDER": border(feature_map, self.D)}
        self.of_keys = {"HAS_POSITION": position is not None, "HAS_MASK": key_mask is not None}

    def options(self, kernel: Any) -> dict[str, Any]:
        own = self.of_queries if kernel in (output_kernel, query_backward_kernel) else self.of_keys
        chosen = launch_options(kernel, self.D, self.dtype, self.architecture, self.feature_map)
        return {**chosen, **self.flags, **own}

    def sum_parts(self, kernel: Any, tokens: int) -> tuple[int, int]:
        """Number of parts, and tokens of each, for a kernel that sums over tokens"""
        slots = multiprocessors(self.device) * RESIDENT_PROGRAMS[kernel][_table_size(self.D)]
        parts = parts_of_a_sum(tokens, self.B * self.H, slots)
        return parts, triton.cdiv(tokens, parts)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output (B, N, H, D) in the dtype of q, and the state."""
        out = torch.empty(self.q.shape, dtype=self.dtype, device=self.device)
        parts, length = self.sum_parts(state_kernel, self.n)
        state = self.empty(parts, *self.state_shape)
        state_kernel[(self.B * self.H * parts,)](
            self.k, self.v, *self.learned, self.position, self.key_mask, self.inverse_count, *self.turns, state,
            *self.k.stride()[:3], *self.v.stride()[:3], self.n, self.B, parts, length, **self.options(state_kernel),
        )  # fmt: skip
        state = state.sum(dim=0) if parts > 1 else state[0]
        options = self.options(output_kernel)
        parts, length = plain_parts(self.N, options["T"])
        output_kernel[(self.B * self.H * parts,)](
            self.q, *self.learned, state, *self.turns, out,
            *self.q.stride()[:3], self.N, parts, length, self.eps, **options,
        )  # fmt: skip
        return out, state

    def backward(
        self, grad_out: Tensor, state: Tensor, grads: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """Into `grads`, of q, k and v, (B, ·, H, D). Returns the moments of queries (·, H, ·, D) and keys."""
        moments, grad_state = self.query_backward(grad_out, state, grads[0])
        return moments, self.key_backward(state, grad_state, *grads[1:])

    def query_backward(
        self, grad_out: Tensor, state: Tensor, grad_q: Tensor, gating: Gating | None = None
    ) -> tuple[Tensor, Tensor]:
        """Into grad_q (B, N, H, D), whose rows may be apart. Returns the moments and the gradient of the state."""
        parts, length = self.sum_parts(query_backward_kernel, self.N)
        grad_state = self.empty(parts, *self.state_shape)
        moments = self.empty(parts * self.B, self.H, MOMENTS[self.feature_map] - self.power, self.D)
        gate_strides = (0, 0, 0) if gating is None else gating.gate.stride()[:3]
        query_backward_kernel[(self.B * self.H * parts,)](
            self.q, *self.learned, state, self.inverse_count, *self.turns, grad_out,
            *(gating or (None,) * 4), grad_q, grad_state, moments,
            *self.q.stride()[:3], *grad_out.stride()[:3], *gate_strides,
            self.N, self.n, self.B, parts, length, self.eps,
            HAS_GATE=gating is not None, ROW=grad_q.stride(1), **self.options(query_backward_kernel),
        )  # fmt: skip
        return moments, grad_state.sum(dim=0) if parts > 1 else grad_state[0]

    def key_backward(
        self, state: Tensor, grad_state: Tensor, grad_k: Tensor, grad_v: Tensor, *, local: bool = False
    ) -> Tensor | None:
        """Into both, (B, n, H, D), whose rows may be apart; to that of v added if `local`. Returns the moments."""
        options = self.options(key_backward_kernel)
        parts, length = plain_parts(self.n, options["T"])
        key_moments = self.empty(parts * self.B, self.H, 2, self.D) if self.power else None
        key_backward_kernel[(self.B * self.H * parts,)](
            self.k, self.v, *self.learned, self.position, self.key_mask, self.inverse_count, *self.turns,
            state, grad_state, grad_k, grad_v, key_moments,
            *self.k.stride()[:3], *self.v.stride()[:3], self.n, self.B, parts, length,
            HAS_LOCAL=local, ROW=grad_k.stride(1), **options,
        )  # fmt: skip
        return key_moments


def multiprocessors(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return INTERPRETED_MULTIPROCESSORS


def border(feature_map: str, channels: int) -> int:
    """How many value channels the first stream reads: all of them where it is the only one."""
    return channels if feature_map == "norm" else (channels + 1) // 2


def _forward_fake(q, k, v, first, second, position, key_mask, cos, sin, feature_map, eps):
    B, _, H, D = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(B, H, 2, D + 1, D, dtype=torch.float32, device=q.device)


def _backward_fake(grad_out, q, k, v, first, second, position, key_mask, cos, sin, state, feature_map, eps):
    gradients = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    H, D = q.shape[2:]
    return *gradients, torch.empty(H, MOMENTS[feature_map], D, dtype=torch.float32, device=q.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    position: Tensor | None,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The output (B, N, H, D) in the dtype of q, and the state (B, H, 2, D + 1, D), float32.

    The state holds, for both halves of the features, the D × D sums k̃ᵀv/n, one row a feature channel, and in the row
    after them the mean of k̃. It is for the backward pass; gradients do not flow through it.
    """
    call = Launch(q, k, v, first, second, position, key_mask, cos, sin, feature_map, eps)
    with torch.cuda.device_of(q):
        return call.forward()


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    position: Tensor | None,
    key_mask: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    state: Tensor,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, and the moments (H, MOMENTS, D) of the learned, float32.

    They are, of power, Σ u·∂/∂u over the keys, without the factor p, and Σ u·∂/∂u·log2|u| over queries and keys; of
    growth the gradients of the rates, by sets and halves.
    """
    call = Launch(q, k, v, first, second, position, key_mask, cos, sin, feature_map, eps)
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    with torch.cuda.device_of(q):
        moments, key_moments = call.backward(with_unit_channel_stride(grad_out), state, (grad_q, grad_k, grad_v))
    total = moments.sum(dim=0)
    if key_moments is not None:
        of_keys = key_moments.sum(dim=0)
        of_keys[:, 1:] += total
        total = of_keys
    return grad_q, grad_k, grad_v, total


# -- What PyTorch asks of an operator: shapes without data, gradients, FLOPs


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.feature_map, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
    check_backward("triton", grad_out)
    *tensors, state = ctx.saved_tensors
    first, second, position = tensors[3:6]
    arguments = (*tensors, state, ctx.feature_map, ctx.eps)
    grad_q, grad_k, grad_v, moments = linear_attention_backward(grad_out, *arguments)
    grad_first, grad_second = None, None
    if ctx.feature_map == "power":
        # Σ u·∂/∂u over the queries is that over the keys: either is the sums' product with their gradient (README.md)
        grad_first = (moments[:, 1] * math.log(2)).to(first.dtype)
        grad_second = None if second is None else (-2 * moments[:, 0] * first / second).to(second.dtype)
    elif ctx.feature_map == "growth":
        grad_first, grad_second = (part.flatten(1).to(first.dtype) for part in moments.chunk(2, dim=1))
    return (
        grad_q,
        grad_k,
        grad_v,
        grad_first,
        grad_second,
        None if position is None else grad_k.sum(dim=0, dtype=torch.float32).to(position.dtype),
        *(None,) * 5,
    )


def _forward_flops(q_shape: tuple[int, ...], k_shape: tuple[int, ...], *args: Any, **kwargs: Any) -> int:
    """A multiply-add counts as two; the products of the eager backend, one over the keys and one over the queries."""
    B, N, H, D = q_shape
    return B * H * (_key_product_flops(k_shape[1], D) + _query_product_flops(N, D, args[-2]))


def _backward_flops(
    grad_shape: tuple[int, ...], q_shape: tuple[int, ...], k_shape: tuple[int, ...], *args: Any, **kwargs: Any
) -> int:
    B, N, H, D = q_shape
    return B * H * (2 * _key_product_flops(k_shape[1], D) + 3 * _query_product_flops(N, D, args[-2]))


def _key_product_flops(n: int, D: int) -> int:
    return 2 * n * D * 2 * D


def _query_product_flops(N: int, D: int, feature_map: str) -> int:
    return 2 * N * (D + (1 if feature_map == "norm" else 2)) * 2 * D  # a normaliser for each stream


linear_attention_forward = operator("linear_attention", forward, _forward_fake)
linear_attention_backward = operator("linear_attention_backward", backward, _backward_fake)
differentiable(linear_attention_forward, _setup_context, _backward)
if torch.ops.polaformer.linear_attention not in flop_registry:  # where no other copy of this package has done it
    register_flop_formula(torch.ops.polaformer.linear_attention)(_forward_flops)
    register_flop_formula(torch.ops.polaformer.linear_attention_backward)(_backward_flops)


def linear_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    feature_map: type[FeatureMap],
    learned: Sequence[Tensor | None],
    *,
    position: Tensor | None = None,
    key_mask: Tensor | None = None,
    rotary: Rotary | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """As `linear_attention_eager`, arguments and result, with a feature map that has kernels; differentiable once."""
    name = feature_map.in_triton
    assert name is not None
    first, second = (*learned, None, None)[:2]
    cos, sin = (None, None) if rotary is None else (table.float() for table in rotary)
    out: Tensor = linear_attention_forward(q, k, v, first, second, position, key_mask, cos, sin, name, eps)[0]
    return out
