"""Time the attention op of a kernel against its literal formulation: python -m benchmarks.attention.

A correctness gate comes first: what is wrong is not timed. Then forward and backward of the baseline, of every backend
and of softmax attention, interleaved in one process, at each shape; the bytes each saves for the backward pass; and
time and memory against the sequence length. README.md beside this file says what is counted and how results are named.

Letters: B batch, N tokens (as many queries as keys), h heads, d channels per head.
"""

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks import common
from benchmarks.baseline import literal_polarity_attention, literal_polarity_pp_attention
from benchmarks.common import DTYPES, MEBIBYTE, Bar, Outcome, Spread, WrongResultError, interleaved, ratios, timed
from models.kernels import kernel_of
from models.ops.polarity_attention import polarity_attention
from models.ops.rotary import Grid, rotary_table
from models.options import AttentionOptions
from utils.precision import autocast, exact_float32

Shape = tuple[int, int, int, int]
Op = Callable[..., Tensor]


class Kernel(NamedTuple):
    """What is measured of one kernel. Shapes and backends are by device."""

    op: Op  # takes `backend`
    literal: Op
    shapes: Mapping[str, list[Shape]]
    backends: Mapping[str, list[str]]
    # Forward + backward of the eager backend over the baseline, float32, two cores.
    speedups: Mapping[Shape, float]
    compiled_speedups: Mapping[Shape, float]
    saved_ratio: float  # of bytes, over the baseline, at most
    rotated: bool  # by as many keys as queries; else keys may have a position, and both be divided by a scale


def square(tokens: int) -> Grid:
    """The map of that many tokens that is closest to a square."""
    rows = max(rows for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0)
    return rows, tokens // rows


def polarity_pp_attention(q: Tensor, k: Tensor, v: Tensor, s1: Tensor, s2: Tensor, *, backend: str) -> Tensor:
    """PolaFormer++'s kernel with rotary positions, on (B, N, h, d) like the op of polarity."""
    N, h, d = q.shape[1:]
    kernel = kernel_of("polarity_pp")(h * d, h, AttentionOptions("polarity_pp", backend=backend))
    rotary = rotary_table(square(N), 2 * d, torch.promote_types(q.dtype, torch.float32), q.device)
    tokens = tuple(t.flatten(-2) for t in (q, k, v))
    out: Tensor = functional_call(kernel, {"s1": s1, "s2": s2}, tokens, {"rotary": rotary})
    return out.unflatten(-1, (h, d))


def literal_polarity_pp(q: Tensor, **others: Tensor) -> Tensor:
    return literal_polarity_pp_attention(q, **others, grid=square(q.shape[1]))


CPU_SHAPES: list[Shape] = [(8, 3136, 3, 32), (8, 3136, 1, 64), (8, 784, 6, 32), (8, 196, 5, 64)]
GPU_SHAPES: list[Shape] = [
    (128, 3136, 3, 32),
    (128, 3136, 1, 64),
    (128, 1024, 3, 32),
    (128, 1024, 2, 64),
    (8, 16384, 3, 32),
]
PP_SHAPES: list[Shape] = [(8, 3136, 1, 64), (8, 784, 2, 64)]
KERNELS = {
    "polarity": Kernel(
        polarity_attention,
        literal_polarity_attention,
        {"cpu": CPU_SHAPES, "cuda": GPU_SHAPES},
        {"cpu": ["eager"], "cuda": ["eager", "triton"]},
        dict(zip(CPU_SHAPES, (2.4, 2.4, 2.0, 2.0), strict=True)),
        {(8, 3136, 3, 32): 4.0},
        saved_ratio=0.25,
        rotated=False,
    ),
    "polarity_pp": Kernel(
        polarity_pp_attention,
        literal_polarity_pp,
        {"cpu": PP_SHAPES, "cuda": PP_SHAPES},
        {"cpu": ["eager"], "cuda": ["eager"]},
        dict.fromkeys(PP_SHAPES, 1.82),
        {},
        saved_ratio=0.35,
        rotated=True,
    ),
}
PARAMETERS = ("exponent", "scale", "position", "s1", "s2")
LENGTHS = [2**power for power in range(8, 17)]
HEADS_OF_LENGTHS = (3, 32)
OF_LENGTHS = f"(1, N, {HEADS_OF_LENGTHS[0]}, {HEADS_OF_LENGTHS[1]})"
# The length sweep leaves out softmax attention from where one forward and backward pass would take longer.
SOFTMAX_SECONDS = 2.0
LABELS = {"baseline": "literal formulation", "softmax": "softmax (SDPA)"}  # in the picture
# Queries and keys of the correctness gate: neither divides by a block size, and they differ.
GATE_BATCH, GATE_QUERIES, GATE_KEYS = 2, 500, 333

GPU_SHAPE: Shape = (128, 3136, 3, 32)  # of the bars against memory floor and baseline, bfloat16
GROWTH = (4096, 65536)  # tokens
GROWTH_BAR = 20.0


class Seconds(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


class Setting(NamedTuple):
    """What every measurement needs to know."""

    kernel: Kernel
    backends: Mapping[str, Op]
    dtype: torch.dtype
    device: torch.device
    repeats: int
    surroundings: bool
    graphs: bool

    @property
    def sides(self) -> dict[str, Op]:
        """The baseline and all backends."""
        return {"baseline": self.kernel.literal, **self.backends}

    def contender(self, function: Op, inputs: Mapping[str, Tensor]) -> "Contender":
        return (GraphedContender if self.graphs else Contender)(function, inputs, self.dtype)

    def contenders(self, shape: Shape, ops: Mapping[str, Op], *, softmax: bool) -> "dict[str, Contender]":
        """Each op on the same inputs, and softmax attention."""
        inputs = make_inputs(
            shape, self.dtype, self.device, surroundings=self.surroundings, rotated=self.kernel.rotated
        )
        contenders = {name: self.contender(op, inputs) for name, op in ops.items()}
        if softmax:
            contenders["softmax"] = self.contender(softmax_attention, {name: inputs[name] for name in "qkv"})
        return contenders

    def samples(self, contenders: "Mapping[common.Name, Contender]") -> dict[common.Name, list[Seconds]]:
        return interleaved({name: contender.seconds for name, contender in contenders.items()}, self.repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    recorded = "kernel dtype backends repeats surroundings"
    variant = "" if options.kernel == "polarity" else f"-{options.kernel}"
    common.run(options, measure, recorded=recorded, variant=f"{variant}-{options.dtype}")


def measure(options: argparse.Namespace) -> Outcome:
    """Gate, then all shapes, lengths and growth, a table of each."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    kernel = KERNELS[options.kernel]
    backends: dict[str, Op] = {name: partial(kernel.op, backend=name) for name in options.backends}
    graphs = device.type == "cuda" and options.graphs
    setting = Setting(kernel, backends, dtype, device, options.repeats, options.surroundings, graphs)
    errors = {
        f"{h} heads of {d}": require_correct(backends, (h, d), dtype, device, kernel=kernel)
        for _, _, h, d in options.shapes
    }
    print_gate(errors)
    copied = common.copy_bandwidth(device)
    print(f"\nmeasured copy: {copied.text(1e-9)} GB/s, bytes read and written", flush=True)
    shapes = []
    for index, shape in enumerate(options.shapes):
        compiled = options.compile == "all" or (options.compile == "first" and index == 0)
        shapes.append(measure_shape(shape, setting, compiled, copied.median))
        print_shape(shapes[-1])
    setting = setting._replace(surroundings=False)
    lengths = measure_lengths(options.lengths, setting)
    print_lengths(lengths)
    growth = measure_growth(setting) if set(GROWTH) <= set(options.lengths) else {}
    bars = [bar for record in shapes for bar in shape_bars(record, device, options.dtype, kernel)] + growth_bars(growth)
    content = {
        "cuda_graphs": graphs,
        "gate": errors,
        "copy_bytes_per_s": copied,
        "shapes": shapes,
        "lengths": lengths,
        "growth": growth,
    }
    title = f"(B, N, h, d) = {OF_LENGTHS}, {common.environment(device)['device_name']}, {options.dtype}"
    return Outcome(content, bars, partial(draw_lengths, lengths, title))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.argument_parser("attention", __doc__, device=True)
    add = parser.add_argument
    add("--kernel", choices=KERNELS, default="polarity", help="default: polarity; polarity_pp is that of PolaFormer++")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--shapes", nargs="+", type=_shape, metavar="B,N,h,d", help="default: those of the bars")
    add("--backends", nargs="+", metavar="NAME", help="default: eager, and triton on a GPU")
    what = "also time baseline and backends under torch.compile, at all shapes or only at the first"
    add("--compile", nargs="?", choices=("first", "all"), const="all", help=what)
    add("--repeats", type=_repeats, default=9, help="timed rounds, at least 9")
    add("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N", help="of the length sweep")
    add("--surroundings", action="store_true", help="with division by scale and position of keys")
    add("--no-graphs", dest="graphs", action="store_false", help="on a GPU, time without CUDA graphs")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[options.device]
    kernel = KERNELS[options.kernel]
    options.shapes = options.shapes or kernel.shapes[options.device]
    options.backends = options.backends or kernel.backends[options.device]
    there = {*kernel.backends[options.device], "reference"}
    if strange := [name for name in options.backends if name not in there]:
        expected = ", ".join(sorted(there))
        parser.error(f"--backends: {options.kernel} has no {strange[0]} on this device, expected some of {expected}")
    if kernel.rotated and (options.surroundings or options.compile):
        parser.error(f"--surroundings and --compile are not there for {options.kernel}")
    if kernel.rotated and any(d % 2 for *_, d in options.shapes):
        parser.error(f"--shapes: rotary positions of {options.kernel} need an even d")
    return options


def _shape(text: str) -> Shape:
    try:
        B, N, h, d = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: expected four integers B,N,h,d") from None
    return B, N, h, d


def _repeats(text: str) -> int:
    if not text.isdecimal() or int(text) < 9:
        raise argparse.ArgumentTypeError(f"{text!r} repeats: expected an integer of at least 9")
    return int(text)


# ---------------------------------------------------------------------------------------------------------------------
# What is compared
# ---------------------------------------------------------------------------------------------------------------------


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    keys: int | None = None,
    surroundings: bool = False,
    rotated: bool = False,
) -> dict[str, Tensor]:
    """Leaves that require gradients: q, k, v (B, ·, h, d) in `dtype`, and the parameters in float32, as in a model."""
    B, N, h, d = shape
    n = keys or N
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(B, tokens, h, d, generator=generator).to(dtype)
        for name, tokens in (("q", N), ("k", n), ("v", n))
    }
    if rotated:
        inputs |= {name: torch.randn(1, h, 1, 2 * d, generator=generator) for name in ("s1", "s2")}
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
        return common.saved_bytes(self.forward, excluded=parameters)

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


# ---------------------------------------------------------------------------------------------------------------------
# Correctness gate
# ---------------------------------------------------------------------------------------------------------------------


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
        inputs = make_inputs(shape, dtype, device, keys=keys, surroundings=surroundings, rotated=kernel.rotated)
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


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def measure_shape(shape: Shape, setting: Setting, compiled: bool, copy_bytes_per_s: float) -> dict[str, Any]:
    """Times, ratios over the baseline, bytes per second and bytes saved of all contenders at one shape."""
    (B, N, h, d), dtype, device = shape, setting.dtype, setting.device
    ops = setting.sides
    if compiled:
        compiled_backends = {name: torch.compile(op, fullgraph=True) for name, op in setting.backends.items()}
        require_correct(compiled_backends, (h, d), dtype, device, (setting.surroundings,), setting.kernel)
        torch.compiler.reset()  # so that the timed shape is compiled for itself, not as a second one with dynamic sizes
        ops |= {f"{name}, compiled": torch.compile(op, fullgraph=True) for name, op in ops.items()}
    contenders = setting.contenders(shape, ops, softmax=True)
    widths = {"query_features": 2 * d, "key_features": 2 * d, "values": d}
    features = {name: torch.rand(B * h, N, width, device=device).to(dtype) for name, width in widths.items()}
    features = {name: tensor.requires_grad_() for name, tensor in features.items()}
    contenders["materialised features"] = setting.contender(materialised_linear_attention, features)

    samples = setting.samples(contenders)
    tensor_bytes = B * N * h * d * dtype.itemsize
    moved = Seconds(4 * tensor_bytes, 7 * tensor_bytes)  # q, k, v, o; then q, k, v, dO, dq, dk, dv
    byte_counts = {**moved._asdict(), "total": moved.total}
    floors = {name: 1e3 * value / copy_bytes_per_s for name, value in byte_counts.items()}
    record: dict[str, Any] = {"shape": shape, "bytes": byte_counts, "floor_ms": floors, "contenders": {}}
    baseline = [sample.total for sample in samples["baseline"]]
    for name, contender in contenders.items():
        entry: dict[str, Any] = {}
        for part in ("forward", "backward", "total"):
            seconds = [getattr(sample, part) for sample in samples[name]]
            entry[f"{part}_ms"] = Spread.of(seconds, 1e3)
            entry[f"{part}_bytes_per_s"] = byte_counts[part] / Spread.of(seconds).median
        entry["speedup"] = ratios(baseline, [sample.total for sample in samples[name]])
        entry["times_floor"] = entry["total_ms"].median / floors["total"]
        # torch.compile would compile again under the hooks that count
        entry["saved_bytes"] = None if name.endswith("compiled") else contender.saved_bytes()
        entry["peak_bytes"] = contender.peak_bytes()
        record["contenders"][name] = entry
    return record


def measure_lengths(lengths: Sequence[int], setting: Setting) -> list[dict[str, Any]]:
    """Forward + backward time and memory at (1, N, 3, 32): one record for each contender and length.

    Contenders are interleaved at each length; softmax attention takes part as far as it is feasible.
    """
    records = []
    expected_softmax = 0.0  # seconds
    for N in sorted(lengths):
        feasible = expected_softmax <= SOFTMAX_SECONDS
        contenders = setting.contenders((1, N, *HEADS_OF_LENGTHS), setting.sides, softmax=feasible)
        samples = setting.samples(contenders)
        if feasible:  # at twice the length
            expected_softmax = 4 * Spread.of(sample.total for sample in samples["softmax"]).median
        records += [
            {
                "contender": name,
                "N": N,
                "total_ms": Spread.of((sample.total for sample in samples[name]), 1e3),
                "saved_bytes": contender.saved_bytes(),
                "peak_bytes": contender.peak_bytes(),
            }
            for name, contender in contenders.items()
        ]
    return records


def measure_growth(setting: Setting) -> dict[str, Spread]:
    """By backend, forward + backward time at the longer length of GROWTH over that at the shorter, interleaved."""
    contenders = {
        (name, N): contender
        for N in GROWTH
        for name, contender in setting.contenders((1, N, *HEADS_OF_LENGTHS), setting.backends, softmax=False).items()
    }
    totals = {key: [sample.total for sample in each] for key, each in setting.samples(contenders).items()}
    short, long = GROWTH
    return {name: ratios(totals[name, long], totals[name, short]) for name in setting.backends}


# ---------------------------------------------------------------------------------------------------------------------
# Bars
# ---------------------------------------------------------------------------------------------------------------------


def shape_bars(
    record: Mapping[str, Any], device: torch.device, dtype: str, kernel: Kernel = KERNELS["polarity"]
) -> list[Bar]:
    """The bars that apply to one shape on this device in this dtype."""
    shape, contenders = tuple(record["shape"]), record["contenders"]
    label = f"{shape} {dtype}"
    bars: list[Bar] = []
    fastest = "triton" if "triton" in contenders else "eager"
    if fastest not in contenders:
        return bars
    ours = contenders[fastest]

    def faster_than(other: str, bound: float) -> None:
        if other in contenders:
            measured = contenders[other]["total_ms"].median / ours["total_ms"].median
            bars.append(Bar(f"{label}: {fastest}, forward + backward over {other}", measured, bound))

    def speedup(name: str, bound: float | None) -> None:
        if bound is not None and name in contenders:
            what = f"{label}: {name}, forward + backward over baseline"
            bars.append(Bar(what, contenders[name]["speedup"].median, bound))

    if device.type == "cpu" and dtype == "float32":
        speedup(fastest, kernel.speedups.get(shape))
        speedup("eager, compiled", kernel.compiled_speedups.get(shape))
    if device.type == "cuda" and dtype == "bfloat16" and fastest == "triton":
        if shape == GPU_SHAPE:
            bars.append(Bar(f"{label}: triton, times the memory floor", ours["times_floor"], 1.4, "at most"))
            faster_than("baseline", 10.0)
            faster_than("baseline, compiled", 3.0)
        if shape[1] >= 1024 and shape[3] in (32, 64):
            faster_than("softmax", 1.0)
            faster_than("materialised features", 1.0)
    saved = ours["saved_bytes"] / contenders["baseline"]["saved_bytes"]
    bars.append(Bar(f"{label}: {fastest}, bytes saved over baseline", saved, kernel.saved_ratio, "at most"))
    return bars


def growth_bars(growth: Mapping[str, Spread]) -> list[Bar]:
    what = f"{OF_LENGTHS}: {{}}, time at N = {GROWTH[1]} over N = {GROWTH[0]}"
    return [Bar(what.format(name), ratio.median, GROWTH_BAR, "at most") for name, ratio in growth.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def print_gate(errors: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> None:
    rows = []
    for heads, by_op in errors.items():
        for name, entries in by_op.items():
            shares = {tensor: entry["error"] / entry.get("allowed", 1.0) for tensor, entry in entries.items()}
            tensor = max(shares, key=shares.__getitem__)
            worst = entries[tensor]
            limit = f", allowed {worst['allowed']:.1e}" if "allowed" in worst else ""
            rows.append((heads, name, f"{worst['error']:.1e} ({tensor}{limit})"))
    title = "Relative L2 error against the float64 reference, the worst of all tensors"
    common.print_table(title, ("", "op", "error"), rows)


def print_shape(record: Mapping[str, Any]) -> None:
    rows = []
    for name, entry in record["contenders"].items():
        saved = entry["saved_bytes"]
        rows.append(
            (
                name,
                *(entry[f"{part}_ms"].text(digits=2) for part in ("forward", "backward", "total")),
                entry["speedup"].text(digits=2),
                f"{entry['total_bytes_per_s'] / 1e9:.1f}",
                f"{entry['times_floor']:.1f}",
                "" if saved is None else f"{saved / MEBIBYTE:.1f}",
            )
        )
    header = ("", "forward ms", "backward ms", "total ms", "× baseline's speed", "GB/s", "× floor", "saved MiB")
    common.print_table(f"(B, N, h, d) = {tuple(record['shape'])}: {common.SPREAD}", header, rows)


def print_lengths(lengths: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(record["contender"] for record in lengths))
    by_key = {(record["contender"], record["N"]): record for record in lengths}
    rows = []
    for N in dict.fromkeys(record["N"] for record in lengths):
        found = [by_key.get((name, N)) for name in names]
        times = ("" if record is None else f"{record['total_ms'].median:.2f}" for record in found)
        saved = ("" if record is None else f"{record['saved_bytes'] / MEBIBYTE:.2f}" for record in found)
        rows.append((str(N), *times, *saved))
    header = ("N", *(f"{name} ms" for name in names), *(f"{name} saved MiB" for name in names))
    common.print_table(f"{OF_LENGTHS}, forward + backward", header, rows)


def draw_lengths(lengths: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Time and memory against N."""
    memory = "peak_bytes" if all(record["peak_bytes"] for record in lengths) else "saved_bytes"
    headings = {"peak_bytes": "MiB of peak memory beyond the inputs", "saved_bytes": "MiB saved for the backward pass"}
    times: dict[str, dict[int, Spread]] = {}
    sizes: dict[str, dict[int, float]] = {}
    for record in lengths:
        label = LABELS.get(record["contender"], record["contender"])
        times.setdefault(label, {})[record["N"]] = record["total_ms"]
        sizes.setdefault(label, {})[record["N"]] = record[memory] / MEBIBYTE
    common.draw_over_length(path, title, {"ms, forward + backward": times, headings[memory]: sizes})


if __name__ == "__main__":
    main()
