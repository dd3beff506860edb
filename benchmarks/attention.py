"""Time the attention op of a kernel against its literal formulation: python -m benchmarks.attention.

A correctness gate comes first: what is wrong is not timed. Then forward and backward of the baseline, of every backend
and of softmax attention, interleaved in one process, at each shape; the bytes each saves for the backward pass; and
time and memory against the sequence length. README.md beside this file says what is counted and how results are named.

Letters: B batch, N tokens (as many queries as keys), h heads, d channels per head.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import DTYPES, MEBIBYTE, Bar, Outcome, Spread, interleaved, ratios
from benchmarks.contenders import (
    KERNELS,
    Contender,
    GraphedContender,
    Kernel,
    Op,
    Seconds,
    Shape,
    make_inputs,
    materialised_linear_attention,
    require_correct,
    softmax_attention,
)
from models.ops.polarity_attention import native

LENGTHS = [2**power for power in range(8, 17)]
HEADS_OF_LENGTHS = (3, 32)
OF_LENGTHS = f"(1, N, {HEADS_OF_LENGTHS[0]}, {HEADS_OF_LENGTHS[1]})"
# The length sweep leaves out softmax attention from where one forward and backward pass would take longer.
SOFTMAX_SECONDS = 2.0
LABELS = {"baseline": "literal formulation", "softmax": "softmax (SDPA)"}  # in the picture
GPU_SHAPE: Shape = (128, 3136, 3, 32)  # of the bars against memory floor and baseline, bfloat16
GROWTH = (4096, 65536)  # tokens
GROWTH_BAR = 20.0


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

    def contender(self, function: Op, inputs: Mapping[str, Tensor]) -> Contender:
        return (GraphedContender if self.graphs else Contender)(function, inputs, self.dtype)

    def contenders(self, shape: Shape, ops: Mapping[str, Op], *, softmax: bool) -> dict[str, Contender]:
        """Each op on the same inputs, and softmax attention."""
        inputs = make_inputs(shape, self.dtype, self.device, self.kernel, surroundings=self.surroundings)
        contenders = {name: self.contender(op, inputs) for name, op in ops.items()}
        if softmax:
            contenders["softmax"] = self.contender(softmax_attention, {name: inputs[name] for name in "qkv"})
        return contenders

    def samples(self, contenders: Mapping[common.Name, Contender]) -> dict[common.Name, list[Seconds]]:
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
    add("--kernel", choices=KERNELS, default="polarity", help="default: polarity")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    add("--shapes", nargs="+", type=_shape, metavar="B,N,h,d", help="default: those of the bars")
    add(
        "--backends",
        nargs="+",
        metavar="NAME",
        help="default: eager, and native where it was built, or triton on a GPU",
    )
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
    if options.backends is None:
        left_out = () if native.is_loaded() else ("native",)
        options.backends = [name for name in kernel.backends[options.device] if name not in left_out]
    there = {*kernel.backends[options.device], "reference"}
    if strange := [name for name in options.backends if name not in there]:
        expected = ", ".join(sorted(there))
        parser.error(f"--backends: {options.kernel} has no {strange[0]} on this device, expected some of {expected}")
    if kernel.rotated and (options.surroundings or options.compile):
        parser.error(f"--surroundings and --compile are not there for {options.kernel}")
    if kernel.rotated and any(d % 4 for *_, d in options.shapes):
        parser.error(f"--shapes: rotary positions of {options.kernel} need a d that divides by 4")
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


# -- Measurements


def measure_shape(shape: Shape, setting: Setting, compiled: bool, copy_bytes_per_s: float) -> dict[str, Any]:
    """Times, ratios over the baseline, bytes per second and bytes saved of all contenders at one shape."""
    (B, N, h, d), dtype, device = shape, setting.dtype, setting.device
    ops = setting.sides
    if compiled:
        compilable = {name: op for name, op in ops.items() if name != "native"}  # compiled, that is eager
        compiled_backends = {
            name: torch.compile(op, fullgraph=True) for name, op in compilable.items() if name != "baseline"
        }
        require_correct(compiled_backends, (h, d), dtype, device, (setting.surroundings,), setting.kernel)
        torch.compiler.reset()  # so that the timed shape is compiled for itself, not as a second one with dynamic sizes
        ops |= {f"{name}, compiled": torch.compile(op, fullgraph=True) for name, op in compilable.items()}
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


# -- Bars


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

    if device.type == "cpu" and dtype == "float32":
        for name, bounds in kernel.speedups.items():
            if shape in bounds and name in contenders:
                what = f"{label}: {name}, forward + backward over baseline"
                bars.append(Bar(what, contenders[name]["speedup"].median, bounds[shape]))
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


# -- Output


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
