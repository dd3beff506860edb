"""What benchmarks.attention compares: each kernel's op and literal formulation, on which inputs, and how they are run.

Letters: B batch, N tokens (as many queries as keys), h heads, d channels per head.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks import common
from benchmarks.baseline import (
    literal_norm_aware_attention,
    literal_polarity_attention,
    literal_polarity_pp_attention,
)
from benchmarks.common import WrongResultError, timed
from models.kernels import kernel_of
from models.kernels.norm_aware import PHASE_SLOPE
from models.nalaformer import for_both_halves
from models.ops.polarity_attention import polarity_attention
from models.ops.rotary import Grid, Rotary, rotary_table
from models.options import AttentionOptions
from utils.memory import saved_bytes
from utils.precision import autocast, exact_float32

Shape = tuple[int, int, int, int]
Op = Callable[..., Tensor]


class Kernel(NamedTuple):
    """What is measured of one kernel. Shapes and backends are by device."""

    op: Op  # takes `backend`
    literal: Op
    shapes: Mapping[str, list[Shape]]
    backends: Mapping[str, list[str]]
    # Of contenders over the baseline: forward + backward, float32, two CPU cores.
    speedups: Mapping[str, Mapping[Shape, float]]
    saved_ratio: float  # of bytes, over the baseline, at most
    # Turned by as many keys as queries; else keys may have a position, and both be divided by a scale.
    rotated: bool
    learned: tuple[str, ...]  # its parameters, of which the op has the gradients


def square(tokens: int) -> Grid:
    """The map of that many tokens that is closest to a square."""
    rows = max(rows for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0)
    return rows, tokens // rows


def rotated_attention(name: str, q: Tensor, k: Tensor, v: Tensor, *, backend: str, **learned: Tensor) -> Tensor:
    """A kernel with rotary positions, on (B, N, h, d) like the op of polarity."""
    N, h, d = q.shape[1:]
    kernel = kernel_of(name)(h * d, h, AttentionOptions(name, backend=backend))
    tokens = tuple(t.flatten(-2) for t in (q, k, v))
    rotary = _turns(name, square(N), d, torch.promote_types(q.dtype, torch.float32), q.device)
    out: Tensor = functional_call(kernel, learned, tokens, {"rotary": rotary})
    return out.unflatten(-1, (h, d))


def _turns(name: str, grid: Grid, d: int, dtype: torch.dtype, device: torch.device) -> Rotary:
    """PolaFormer++ turns all features in one piece, NaLaFormer the halves alike."""
    if name == "polarity_pp":
        return rotary_table(grid, 2 * d, dtype, device)
    return for_both_halves(rotary_table(grid, d, dtype, device))


def _on_a_map(literal: Op) -> Op:
    return lambda q, **others: literal(q, **others, grid=square(q.shape[1]))


CPU_SHAPES: list[Shape] = [(8, 3136, 3, 32), (8, 3136, 1, 64), (8, 784, 6, 32), (8, 196, 5, 64)]
GPU_SHAPES: list[Shape] = [
    (128, 3136, 3, 32),
    (128, 3136, 1, 64),
    (128, 1024, 3, 32),
    (128, 1024, 2, 64),
    (8, 16384, 3, 32),
]
MAP_SHAPES: list[Shape] = [(8, 3136, 1, 64), (8, 784, 2, 64)]


def _rotated(name: str, literal: Op, *learned: str) -> Kernel:
    """A kernel of a body with rotary positions, in its first two stages."""
    return Kernel(
        partial(rotated_attention, name),
        _on_a_map(literal),
        {"cpu": MAP_SHAPES, "cuda": MAP_SHAPES},
        {"cpu": ["eager"], "cuda": ["eager"]},
        {"eager": dict.fromkeys(MAP_SHAPES, 1.82)},
        saved_ratio=0.35,
        rotated=True,
        learned=learned,
    )


KERNELS = {
    "polarity": Kernel(
        polarity_attention,
        literal_polarity_attention,
        {"cpu": CPU_SHAPES, "cuda": GPU_SHAPES},
        {"cpu": ["eager", "native"], "cuda": ["eager", "triton"]},
        {
            "eager": dict(zip(CPU_SHAPES, (2.4, 2.4, 2.0, 2.0), strict=True)),
            "native": dict.fromkeys(CPU_SHAPES, 4.5),
            "eager, compiled": {(8, 3136, 3, 32): 4.0},
        },
        saved_ratio=0.25,
        rotated=False,
        learned=("exponent",),
    ),
    "polarity_pp": _rotated("polarity_pp", literal_polarity_pp_attention, "s1", "s2"),
    "norm_aware": _rotated("norm_aware", literal_norm_aware_attention),
    "nala_cosine": _rotated("nala_cosine", partial(literal_norm_aware_attention, slope=PHASE_SLOPE)),
}
# Not counted among the bytes saved: a model holds them anyway.
PARAMETERS = {"scale", "position"}.union(*(kernel.learned for kernel in KERNELS.values()))
# Queries and keys of the correctness gate: neither divides by a block size, and they differ.
GATE_BATCH, GATE_QUERIES, GATE_KEYS = 2, 500, 333


class Seconds(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Kernel = KERNELS["polarity"],
    *,
    keys: int | None = None,
    surroundings: bool = False,
) -> dict[str, Tensor]:
    """Leaves that require gradients: q, k, v (B, ·, h, d) in `dtype`, and the parameters in float32, as in a model."""
    B, N, h, d = shape
    n = keys or N
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(B, tokens, h, d, generator=generator).to(dtype)
        for name, tokens in (("q", N), ("k", n), ("v", n))
    }
    if kernel.rotated:
        inputs |= {name: torch.randn(1, h, 1, 2 * d, generator=generator) for name in kernel.learned}
    else:
        inputs["exponent"] = 1 + 4 * torch.rand(h, d, generator=generator)
    if surroundings:
        inputs["scale"] = 0.5 + torch.rand(h, d, generator=generator)
        inputs["position"] = 0.1 * torch.randn(n, h, d, generator=generator)
    return {name: tensor.to(device).requires_grad_() for name, tensor in inputs.items()}


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own, in the layout of the op."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def materialised_linear_attention(query_features: Tensor, key_features: Tensor, values: Tensor) -> Tensor:
    """φ(q)(φ(k)ᵀv) of features that lie in memory, (B·h, N, 2d): what a linear attention without fused features costs.

    It is spared computing the features and both normalisers.
    """
    return torch.bmm(query_features, torch.bmm(key_features.mT, values))


class Contender:
    """Forward and backward pass of `function(**inputs)`, under autocast for low precision."""

    def __init__(self, function: Op, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.function = function
        self.inputs = dict(inputs)
        self.leaves = list(self.inputs.values())
        self.device = self.leaves[0].device
        self.autocast_dtype = None if dtype == torch.float32 else dtype
        out = self.forward().detach()
        self.cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)

    def forward(self) -> Tensor:
        with autocast(self.device, self.autocast_dtype):
            return self.function(**self.inputs)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, self.leaves, self.cotangent)

    def seconds(self) -> Seconds:
        forward, out = timed(self.device, self.forward)
        backward, _ = timed(self.device, lambda: self.backward(out))
        return Seconds(forward, backward)

    def saved_bytes(self) -> int:
        """For the backward pass; parameters are not counted."""
        parameters = [tensor for name, tensor in self.inputs.items() if name in PARAMETERS]
        return saved_bytes(self.forward, excluded=parameters)

    def peak_bytes(self) -> int | None:
        """Most memory that both passes need beyond the inputs, on a GPU; None on a CPU, which does not count it."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.backward(self.forward())
        return torch.cuda.max_memory_allocated(self.device) - before


class GraphedContender(Contender):
    """Both passes recorded as CUDA graphs: time on the device alone, without that of launching kernels one by one."""

    def __init__(self, function: Op, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        super().__init__(function, inputs, dtype)
        side = torch.cuda.Stream()  # capture wants warmed-up kernels, and warming up a stream of its own
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.backward(self.forward())
        torch.cuda.current_stream().wait_stream(side)
        self.forward_graph, self.backward_graph = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward_graph):
            self.out = self.forward()
        with torch.cuda.graph(self.backward_graph, pool=self.forward_graph.pool()):
            self.gradients = self.backward(self.out)

    def seconds(self) -> Seconds:
        forward, _ = timed(self.device, self.forward_graph.replay)
        backward, _ = timed(self.device, self.backward_graph.replay)
        return Seconds(forward, backward)


# -- Correctness gate


def require_correct(
    ops: Mapping[str, Op],
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    with_surroundings: Sequence[bool] = (False, True),
    kernel: Kernel = KERNELS["polarity"],
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare output and every gradient of each op with the float64 reference, at a moderate size with `heads` (h, d).

    Returns, by op (`baseline` among them) and then by tensor, the relative L2 error and, for ops, the largest that is
    allowed: twice the baseline's in the same dtype, or 8 ε of the dtype where that is more.

    Raises WrongResultError for an error beyond that, or a result that is not finite.
    """
    errors: dict[str, dict[str, dict[str, float]]] = {name: {} for name in ("baseline", *ops)}
    shape = (GATE_BATCH, GATE_QUERIES, *heads)
    keys = GATE_QUERIES if kernel.rotated else GATE_KEYS
    for surroundings in (False,) if kernel.rotated else with_surroundings:
        inputs = make_inputs(shape, dtype, device, kernel, keys=keys, surroundings=surroundings)
        exact_inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
        exact = Contender(partial(kernel.op, backend="reference"), exact_inputs, torch.float32)
        cotangent = exact.cotangent.to(dtype)
        exact.cotangent = cotangent.double()
        expected = _results(exact)
        for name, op in {"baseline": kernel.literal, **ops}.items():
            contender = Contender(op, inputs, dtype)
            contender.cotangent = cotangent
            with exact_float32():
                results = _results(contender)
            for tensor, result in results.items():
                key = f"{tensor}, with scale and position" if surroundings else tensor
                entry = {"error": common.relative_error(result, expected[tensor])}
                errors[name][key] = entry
                if name == "baseline":
                    continue
                # in this order: max() returns its first argument when the baseline's error is NaN, as by overflow
                entry["allowed"] = max(8 * torch.finfo(dtype).eps, 2 * errors["baseline"][key]["error"])
                if not entry["error"] <= entry["allowed"]:
                    raise WrongResultError(
                        f"{name} at {shape} in {dtype}: {key} is off by {entry['error']:.2e} relative to the float64"
                        f" reference, allowed is {entry['allowed']:.2e}"
                    )
    return errors


def _results(contender: Contender) -> dict[str, Tensor]:
    out = contender.forward()
    names = ["output", *(f"gradient of {name}" for name in contender.inputs)]
    return dict(zip(names, (out.detach(), *contender.backward(out)), strict=True))
