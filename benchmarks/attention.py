"""Time the polarity attention op against the literal formulation: python -m benchmarks.attention.

A correctness gate comes first: what is wrong is not timed. Then forward and backward of the baseline, of every backend
and of softmax attention, interleaved in one process, at each shape; the bytes each saves for the backward pass; and
time and memory against the sequence length. README.md beside this file says what is counted and how results are named.

Letters: B batch, N tokens (as many queries as keys), h heads, d channels per head.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.baseline import literal_polarity_attention
from benchmarks.common import (
    DTYPES,
    MEBIBYTE,
    Bar,
    Spread,
    WrongResultError,
    argument_parser,
    copy_bandwidth,
    environment,
    gated,
    interleaved,
    prepare_process,
    print_bars,
    print_table,
    ratios,
    relative_error,
    saved_bytes,
    timed,
    write_result,
)
from models.ops.polarity_attention import polarity_attention
from utils.precision import autocast, exact_float32

Shape = tuple[int, int, int, int]
Op = Callable[..., Tensor]

SHAPES: dict[str, list[Shape]] = {
    "cpu": [(8, 3136, 3, 32), (8, 3136, 1, 64), (8, 784, 6, 32), (8, 196, 5, 64)],
    "cuda": [(128, 3136, 3, 32), (128, 3136, 1, 64), (128, 1024, 3, 32), (128, 1024, 2, 64), (8, 16384, 3, 32)],
}
BACKENDS = {"cpu": ["eager"], "cuda": ["eager", "triton"]}
LENGTHS = [2**power for power in range(8, 17)]
HEADS_OF_LENGTHS = (3, 32)
# The length sweep leaves out softmax attention from where one forward and backward pass would take longer.
SOFTMAX_SECONDS = 2.0
# Queries and keys of the correctness gate: neither divides by a block size, and they differ.
GATE_BATCH, GATE_QUERIES, GATE_KEYS = 2, 500, 333

# Forward + backward of the eager backend over the baseline, float32, two cores.
CPU_SPEEDUPS: dict[Shape, float] = {
    (8, 3136, 3, 32): 2.4,
    (8, 3136, 1, 64): 2.4,
    (8, 784, 6, 32): 2.0,
    (8, 196, 5, 64): 2.0,
}
CPU_COMPILED_SPEEDUPS: dict[Shape, float] = {(8, 3136, 3, 32): 4.0}
GPU_SHAPE: Shape = (128, 3136, 3, 32)  # of the bars against memory floor and baseline, bfloat16
SAVED_BYTES_RATIO = 0.25
GROWTH = (4096, 65536)  # tokens
GROWTH_BAR = 20.0


class Seconds(NamedTuple):
    forward: float
    backward: float

    @property
    def total(self) -> float:
        return self.forward + self.backward


def main(arguments: Sequence[str] | None = None) -> None:
    """Gate, measure, print, write. Exits with the reason, before anything is timed, when the gate finds an error."""
    options = parse_arguments(arguments)
    prepare_process(options.threads)
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    backends: dict[str, Op] = {name: partial(polarity_attention, backend=name) for name in options.backends}
    with gated():
        errors = {
            f"{h} heads of {d}": require_correct(backends, (h, d), dtype, device) for _, _, h, d in options.shapes
        }
        print_gate(errors)
        copied = copy_bandwidth(device)
        print(f"\nmeasured copy: {copied.text(1e-9)} GB/s, bytes read and written", flush=True)
        shapes = []
        for index, shape in enumerate(options.shapes):
            compiled = options.compile == "all" or (options.compile == "first" and index == 0)
            shapes.append(measure_shape(shape, backends, dtype, device, options, compiled, copied.median))
            print_shape(shapes[-1])
    lengths = measure_lengths(options.lengths, backends, dtype, device, options)
    print_lengths(lengths)
    bars = [bar for record in shapes for bar in shape_bars(record, device, options.dtype)]
    growth = measure_growth(backends, dtype, device, options) if set(GROWTH) <= set(options.lengths) else {}
    bars += growth_bars(growth)
    print_bars(bars)

    variant = f"-{options.dtype}"
    content = {
        "dtype": options.dtype,
        "backends": options.backends,
        "repeats": options.repeats,
        "surroundings": options.surroundings,
        "cuda_graphs": device.type == "cuda" and options.graphs,
        "gate": errors,
        "copy_bytes_per_s": asdict(copied),
        "shapes": shapes,
        "lengths": lengths,
        "growth": growth,
    }
    path = write_result(options.output, "attention", device, content, bars, variant=variant)
    picture = path.with_suffix(".png")
    draw_lengths(lengths, picture, f"{environment(device)['device_name']}, {options.dtype}")
    print(f"\nwrote {path.name} and {picture.name} to {options.output}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argument_parser("attention", __doc__, device=True)
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--shapes", nargs="+", type=_shape, metavar="B,N,h,d", help="default: those of the bars")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: eager, and triton on a GPU")
    parser.add_argument(
        "--compile",
        nargs="?",
        choices=("first", "all"),
        const="all",
        help="also time baseline and backends under torch.compile, at all shapes or only at the first",
    )
    parser.add_argument("--repeats", type=_repeats, default=9, help="timed rounds, at least 9")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="N", help="of the length sweep")
    parser.add_argument("--surroundings", action="store_true", help="with division by scale and position of keys")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="on a GPU, time without CUDA graphs")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or {"cpu": "float32", "cuda": "bfloat16"}[options.device]
    options.shapes = options.shapes or SHAPES[options.device]
    options.backends = options.backends or BACKENDS[options.device]
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
    shape: Shape, dtype: torch.dtype, device: torch.device, *, keys: int | None = None, surroundings: bool = False
) -> dict[str, Tensor]:
    """Leaves that require gradients: q, k, v (B, ·, h, d) in `dtype`, and the parameters in float32, as in a model."""
    B, N, h, d = shape
    n = keys or N
    generator = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.randn(B, tokens, h, d, generator=generator).to(dtype)
        for name, tokens in (("q", N), ("k", n), ("v", n))
    }
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
        """For the backward pass; exponent, scale and position are parameters and not counted."""
        parameters = [tensor for name, tensor in self.inputs.items() if name in ("exponent", "scale", "position")]
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


# ---------------------------------------------------------------------------------------------------------------------
# Correctness gate
# ---------------------------------------------------------------------------------------------------------------------


def require_correct(
    ops: Mapping[str, Op],
    heads: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    with_surroundings: Sequence[bool] = (False, True),
) -> dict[str, dict[str, dict[str, float]]]:
    """Compare output and every gradient of each op with the float64 reference, at a moderate size with `heads` (h, d).

    Returns, by op (`baseline` among them) and then by tensor, the relative L2 error and, for ops, the largest that is
    allowed: twice the baseline's in the same dtype, or 8 ε of the dtype where that is more.

    Raises:
        WrongResultError: an error beyond that, or a result that is not finite.
    """
    errors: dict[str, dict[str, dict[str, float]]] = {name: {} for name in ("baseline", *ops)}
    shape = (GATE_BATCH, GATE_QUERIES, *heads)
    for surroundings in with_surroundings:
        inputs = make_inputs(shape, dtype, device, keys=GATE_KEYS, surroundings=surroundings)
        exact_inputs = {name: tensor.detach().double().requires_grad_() for name, tensor in inputs.items()}
        exact = Contender(partial(polarity_attention, backend="reference"), exact_inputs, torch.float32)
        cotangent = exact.cotangent.to(dtype)
        exact.cotangent = cotangent.double()
        expected = _results(exact)
        for name, op in {"baseline": literal_polarity_attention, **ops}.items():
            contender = Contender(op, inputs, dtype)
            contender.cotangent = cotangent
            with exact_float32():
                results = _results(contender)
            for tensor, result in results.items():
                key = f"{tensor}, with scale and position" if surroundings else tensor
                entry = {"error": relative_error(result, expected[tensor])}
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


def measure_shape(
    shape: Shape,
    backends: Mapping[str, Op],
    dtype: torch.dtype,
    device: torch.device,
    options: argparse.Namespace,
    compiled: bool,
    copy_bytes_per_s: float,
) -> dict[str, Any]:
    """Times, ratios over the baseline, bytes per second and bytes saved of all contenders at one shape."""
    B, N, h, d = shape
    ops: dict[str, Op] = {"baseline": literal_polarity_attention, **backends}
    if compiled:
        compiled_backends = {name: torch.compile(op, fullgraph=True) for name, op in backends.items()}
        require_correct(compiled_backends, (h, d), dtype, device, (options.surroundings,))
        torch.compiler.reset()  # so that the timed shape is compiled for itself, not as a second one with dynamic sizes
        ops |= {f"{name}, compiled": torch.compile(op, fullgraph=True) for name, op in ops.items()}
    make = GraphedContender if device.type == "cuda" and options.graphs else Contender
    inputs = make_inputs(shape, dtype, device, surroundings=options.surroundings)
    contenders = {name: make(op, inputs, dtype) for name, op in ops.items()}
    contenders["softmax"] = make(softmax_attention, {name: inputs[name] for name in "qkv"}, dtype)
    widths = {"query_features": 2 * d, "key_features": 2 * d, "values": d}
    materialised = {name: torch.rand(B * h, N, width, device=device).to(dtype) for name, width in widths.items()}
    materialised = {name: tensor.requires_grad_() for name, tensor in materialised.items()}
    contenders["materialised features"] = make(materialised_linear_attention, materialised, dtype)

    samples = interleaved({name: contender.seconds for name, contender in contenders.items()}, options.repeats)
    tensor_bytes = B * N * h * d * dtype.itemsize
    moved = Seconds(4 * tensor_bytes, 7 * tensor_bytes)  # q, k, v, o; then q, k, v, dO, dq, dk, dv
    record: dict[str, Any] = {
        "shape": shape,
        "bytes": {**moved._asdict(), "total": moved.total},
        "floor_ms": {name: 1e3 * value / copy_bytes_per_s for name, value in moved._asdict().items()},
        "contenders": {},
    }
    record["floor_ms"]["total"] = 1e3 * moved.total / copy_bytes_per_s
    baseline = [sample.total for sample in samples["baseline"]]
    for name, contender in contenders.items():
        entry: dict[str, Any] = {}
        for part in ("forward", "backward", "total"):
            seconds = [getattr(sample, part) for sample in samples[name]]
            entry[f"{part}_ms"] = asdict(Spread.of(1e3 * each for each in seconds))
            entry[f"{part}_bytes_per_s"] = getattr(moved, part) / Spread.of(seconds).median
        entry["speedup"] = asdict(ratios(baseline, [sample.total for sample in samples[name]]))
        entry["times_floor"] = entry["total_ms"]["median"] / record["floor_ms"]["total"]
        # torch.compile would compile again under the hooks that count
        entry["saved_bytes"] = None if name.endswith("compiled") else contender.saved_bytes()
        entry["peak_bytes"] = contender.peak_bytes()
        record["contenders"][name] = entry
    return record


def measure_lengths(
    lengths: Sequence[int],
    backends: Mapping[str, Op],
    dtype: torch.dtype,
    device: torch.device,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Forward + backward time and memory at (1, N, 3, 32): one record for each contender and length.

    Contenders are interleaved at each length; softmax attention takes part as far as it is feasible.
    """
    make = GraphedContender if device.type == "cuda" and options.graphs else Contender
    ops: dict[str, Op] = {"baseline": literal_polarity_attention, **backends}
    records = []
    expected_softmax = 0.0  # seconds
    for N in sorted(lengths):
        inputs = make_inputs((1, N, *HEADS_OF_LENGTHS), dtype, device)
        contenders = {name: make(op, inputs, dtype) for name, op in ops.items()}
        if expected_softmax <= SOFTMAX_SECONDS:
            contenders["softmax"] = make(softmax_attention, {name: inputs[name] for name in "qkv"}, dtype)
        samples = interleaved({name: contender.seconds for name, contender in contenders.items()}, options.repeats)
        if "softmax" in samples:
            expected_softmax = (
                4 * Spread.of(sample.total for sample in samples["softmax"]).median
            )  # at twice the length
        records += [
            {
                "contender": name,
                "N": N,
                "total_ms": asdict(Spread.of(1e3 * sample.total for sample in samples[name])),
                "saved_bytes": contender.saved_bytes(),
                "peak_bytes": contender.peak_bytes(),
            }
            for name, contender in contenders.items()
        ]
    return records


def measure_growth(
    backends: Mapping[str, Op], dtype: torch.dtype, device: torch.device, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """By backend, forward + backward time at the longer length of GROWTH over that at the shorter, interleaved."""
    make = GraphedContender if device.type == "cuda" and options.graphs else Contender
    inputs = {N: make_inputs((1, N, *HEADS_OF_LENGTHS), dtype, device) for N in GROWTH}
    contenders = {(name, N): make(op, inputs[N], dtype) for name, op in backends.items() for N in GROWTH}
    samples = interleaved({key: contender.seconds for key, contender in contenders.items()}, options.repeats)
    totals = {key: [sample.total for sample in each] for key, each in samples.items()}
    short, long = GROWTH
    return {name: asdict(ratios(totals[name, long], totals[name, short])) for name in backends}


# ---------------------------------------------------------------------------------------------------------------------
# Bars
# ---------------------------------------------------------------------------------------------------------------------


def shape_bars(record: Mapping[str, Any], device: torch.device, dtype: str) -> list[Bar]:
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
            measured = contenders[other]["total_ms"]["median"] / ours["total_ms"]["median"]
            bars.append(Bar(f"{label}: {fastest}, forward + backward over {other}", measured, bound))

    if device.type == "cpu" and dtype == "float32":
        if shape in CPU_SPEEDUPS:
            what = f"{label}: {fastest}, forward + backward over baseline"
            bars.append(Bar(what, ours["speedup"]["median"], CPU_SPEEDUPS[shape]))
        if shape in CPU_COMPILED_SPEEDUPS and "eager, compiled" in contenders:
            speedup = contenders["eager, compiled"]["speedup"]["median"]
            what = f"{label}: eager, compiled, forward + backward over baseline"
            bars.append(Bar(what, speedup, CPU_COMPILED_SPEEDUPS[shape]))
    if device.type == "cuda" and dtype == "bfloat16" and fastest == "triton":
        if shape == GPU_SHAPE:
            bars.append(Bar(f"{label}: triton, times the memory floor", ours["times_floor"], 1.4, "at most"))
            faster_than("baseline", 10.0)
            faster_than("baseline, compiled", 3.0)
        if shape[1] >= 1024 and shape[3] in (32, 64):
            faster_than("softmax", 1.0)
            faster_than("materialised features", 1.0)
    saved = ours["saved_bytes"] / contenders["baseline"]["saved_bytes"]
    bars.append(Bar(f"{label}: {fastest}, bytes saved over baseline", saved, SAVED_BYTES_RATIO, "at most"))
    return bars


def growth_bars(growth: Mapping[str, Mapping[str, float]]) -> list[Bar]:
    heads, channels = HEADS_OF_LENGTHS
    what = f"(1, N, {heads}, {channels}): {{}}, time at N = {GROWTH[1]} over N = {GROWTH[0]}"
    return [Bar(what.format(name), ratio["median"], GROWTH_BAR, "at most") for name, ratio in growth.items()]


# ---------------------------------------------------------------------------------------------------------------------
# Output
# ---------------------------------------------------------------------------------------------------------------------


def print_gate(errors: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]]) -> None:
    def worst(name: str, entries: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
        share = max(entries, key=lambda tensor: entries[tensor]["error"] / entries[tensor].get("allowed", 1.0))
        allowed = entries[share].get("allowed")
        limit = "" if allowed is None else f", allowed {allowed:.1e}"
        return f"{entries[share]['error']:.1e} ({share}{limit})", name

    rows = [
        (heads, name, worst(name, entries)[0]) for heads, by_op in errors.items() for name, entries in by_op.items()
    ]
    print_table("Relative L2 error against the float64 reference, the worst of all tensors", ("", "op", "error"), rows)


def print_shape(record: Mapping[str, Any]) -> None:
    rows = []
    for name, entry in record["contenders"].items():
        saved = entry["saved_bytes"]
        rows.append(
            (
                name,
                *(Spread(**entry[f"{part}_ms"]).text(digits=2) for part in ("forward", "backward", "total")),
                Spread(**entry["speedup"]).text(digits=2),
                f"{entry['total_bytes_per_s'] / 1e9:.1f}",
                f"{entry['times_floor']:.1f}",
                "" if saved is None else f"{saved / MEBIBYTE:.1f}",
            )
        )
    header = ("", "forward ms", "backward ms", "total ms", "× baseline's speed", "GB/s", "× floor", "saved MiB")
    print_table(f"(B, N, h, d) = {tuple(record['shape'])}: median (smallest to largest)", header, rows)


def print_lengths(lengths: Sequence[Mapping[str, Any]]) -> None:
    names = list(dict.fromkeys(record["contender"] for record in lengths))
    by_key = {(record["contender"], record["N"]): record for record in lengths}
    rows = []
    for N in dict.fromkeys(record["N"] for record in lengths):
        found = [by_key.get((name, N)) for name in names]
        times = ("" if record is None else f"{record['total_ms']['median']:.2f}" for record in found)
        saved = ("" if record is None else f"{record['saved_bytes'] / MEBIBYTE:.2f}" for record in found)
        rows.append((str(N), *times, *saved))
    header = ("N", *(f"{name} ms" for name in names), *(f"{name} saved MiB" for name in names))
    print_table(f"(1, N, {HEADS_OF_LENGTHS[0]}, {HEADS_OF_LENGTHS[1]}), forward + backward", header, rows)


def draw_lengths(lengths: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Time and memory against N, log-log."""
    import matplotlib  # slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "baseline": ("literal formulation", "#888888", "s"),
        "eager": ("eager", "#1f6fb2", "o"),
        "triton": ("triton", "#1a8a4a", "D"),
        "softmax": ("softmax (SDPA)", "#c8442f", "^"),
    }
    memory = "peak_bytes" if all(record["peak_bytes"] for record in lengths) else "saved_bytes"
    labels = {"peak_bytes": "peak memory beyond the inputs", "saved_bytes": "saved for the backward pass"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name in dict.fromkeys(record["contender"] for record in lengths):
        label, colour, marker = styles.get(name, (name, "#7a4fb0", "v"))
        records = [record for record in lengths if record["contender"] == name]
        N = [record["N"] for record in records]
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 4.5, "linewidth": 1.8}
        left.plot(N, [record["total_ms"]["median"] for record in records], label=label, **style)
        low, high = ([record["total_ms"][end] for record in records] for end in ("low", "high"))
        left.fill_between(N, low, high, color=colour, alpha=0.15, linewidth=0)
        right.plot(N, [record[memory] / MEBIBYTE for record in records], label=label, **style)
    for axes, heading, unit in ((left, "Time, forward + backward", "ms"), (right, f"Memory, {labels[memory]}", "MiB")):
        axes.set(yscale="log", title=heading, xlabel="tokens N", ylabel=unit)
        axes.set_xscale("log", base=2)
        ticks = sorted({record["N"] for record in lengths})[::2]
        axes.set_xticks(ticks, [f"{N:,}" for N in ticks])
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    figure.suptitle(f"(B, N, h, d) = (1, N, {HEADS_OF_LENGTHS[0]}, {HEADS_OF_LENGTHS[1]}), {title}", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
