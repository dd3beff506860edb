"""The harness of the benchmarks. Each module holds what it measures; here are the course of a program (arguments,
process, gate, bars, result file), timing, bytes saved for backward, tables and pictures."""

import argparse
import gc
import importlib.metadata
import json
import multiprocessing
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from yacs.config import CfgNode

from config import load_config
from utils.curves import PALETTE, plain_axes
from utils.environment import commit, cpu_field
from utils.precision import autocast

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEBIBYTE = 2**20
# Larger than the last-level cache of any GPU; written before each timed call, so that none finds its inputs there.
FLUSHED_BYTES = 256 * MEBIBYTE
# CPU features that decide how fast float32 and bfloat16 products are.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
SPREAD = "median (smallest to largest)"  # what Spread.text shows

Name = TypeVar("Name", bound=Hashable)
Sample = TypeVar("Sample")
Returned = TypeVar("Returned")


class WrongResultError(RuntimeError):
    """What was to be timed computes something else than the baseline."""


# -- The course of a program


@dataclass(frozen=True)
class Bar:
    """A figure that the project promises: `measured` is to be at least, or at most, `bound`."""

    what: str
    measured: float
    bound: float
    direction: str = "at least"

    @property
    def met(self) -> bool:
        return self.measured >= self.bound if self.direction == "at least" else self.measured <= self.bound


@dataclass(frozen=True)
class Outcome:
    """What a benchmark has found: what its result file holds, bars, and a picture that `draw` puts beside the file."""

    content: Mapping[str, Any]
    bars: Sequence[Bar]
    draw: Callable[[Path], None] | None = None


NUMBERS = {"repeats": "timed rounds", "batch_size": "", "image_size": "pixels of a side"}


def argument_parser(
    program: str, doc: str | None, *, device: bool = False, threads: int | None = None, **numbers: int
) -> argparse.ArgumentParser:
    """A parser with the arguments that programs share, described by the first paragraph of the module's `doc`.

    --device where the program is more than one of a CPU, --threads unless their number is given, and of NUMBERS those
    that have a default in `numbers`.
    """
    parser = argparse.ArgumentParser(f"python -m benchmarks.{program}", description=(doc or "").split("\n\n")[0])
    parser.set_defaults(program=program, device="cpu", threads=threads)
    if device:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    if threads is None:
        parser.add_argument("--threads", type=int, help="default: what PyTorch chooses")
    for name, default in numbers.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=NUMBERS[name])
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    return parser


def run(
    options: argparse.Namespace,
    measure: Callable[[argparse.Namespace], Outcome],
    *,
    recorded: str = "",
    packages: Sequence[str] = (),
    variant: str = "",
) -> None:
    """Gate and measure, print the bars, write the result file with the environment and the `recorded` options.

    Exits with the reason, before anything is written, where a gate in `measure` finds a wrong result.

    Args:
        packages: whose versions the reader of the result must know.
        variant: follows the program in the file's name.
    """
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no NVIDIA GPU here; --device cpu measures on the processor")
    try:
        options.output.mkdir(parents=True, exist_ok=True)  # first, for nothing measured to be lost
    except OSError as error:
        raise SystemExit(f"--output {options.output}: {error.strerror}, expected a folder to write to") from error
    prepare_process(options.threads)
    try:
        outcome = measure(options)
    except WrongResultError as error:
        raise SystemExit(f"nothing is timed that is wrong: {error}") from error
    bars = [(bar, "≥" if bar.direction == "at least" else "≤", "met" if bar.met else "NOT MET") for bar in outcome.bars]
    rows = [(bar.what, f"{bar.measured:.2f}", f"{sign} {bar.bound:g}", verdict) for bar, sign, verdict in bars]
    print_table("Bars", ("what", "measured", "bar", ""), rows)
    name = f"{options.program}{variant}-{device_slug(device)}-{date.today().isoformat()}"
    path, written = options.output / f"{name}.json", f"{name}.json"
    record = {
        "program": f"benchmarks.{options.program}",
        "environment": environment(device) | {name: importlib.metadata.version(name) for name in packages},
        **{name: getattr(options, name) for name in recorded.split()},
        **outcome.content,
        "bars": [asdict(bar) | {"met": bar.met} for bar in outcome.bars],
    }
    path.write_text(json.dumps(record, indent=1, default=asdict) + "\n")  # the default: of Spread
    if outcome.draw:
        outcome.draw(path.with_suffix(".png"))
        written += f" and {name}.png"
    print(f"\nwrote {written} to {options.output}")


def prepare_process(threads: int | None = None) -> None:
    """Flush denormals and set the number of threads; must come before the first tensor operation of the process."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # worker threads inherit it when they start


def in_fresh_process(function: Callable[..., Returned], *arguments: Any, threads: int | None) -> Returned:
    """What it returns in a prepared process that has compiled nothing and holds no memory yet."""
    torch.cuda.empty_cache()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=prepare_process, initargs=(threads,)) as pool:
        return pool.submit(function, *arguments).result()


def configuration(name: str, options: str = "", **values: object) -> CfgNode:
    """Of configs/`name`.yaml with `KEY VALUE` pairs, and values whose keys are SECTION__KEY; a step is one pass."""
    words = [str(word) for key, value in values.items() for word in (key.replace("__", "."), value)]
    return load_config(str(ROOT / "configs" / f"{name}.yaml"), ["TRAIN.GLOBAL_BATCH", "null", *options.split(), *words])


def device_slug(device: torch.device) -> str:
    """The device as part of a file name: `cpu-2-threads`, `nvidia-h100-80gb-hbm3`."""
    if device.type == "cpu":
        return f"cpu-{torch.get_num_threads()}-threads"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the machine and the code; no paths, no host name."""
    return {
        "date": date.today().isoformat(),
        "device": device_slug(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_field("model name"),
        "threads": torch.get_num_threads(),
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in cpu_flags()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "git_revision": commit(),
    }


def cpu_flags() -> set[str]:
    """The processor's feature flags as Linux names them; empty elsewhere."""
    return set(cpu_field("flags").split())


# -- Timing


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float], factor: float = 1.0) -> "Spread":
        """Of the values times `factor`."""
        values = [value * factor for value in values]
        return cls(statistics.median(values), min(values), max(values))

    def text(self, factor: float = 1.0, digits: int = 1) -> str:
        """`median (low to high)`, each times `factor`."""
        median, low, high = (f"{value * factor:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} ({low} to {high})"


def timed(device: torch.device, function: Callable[[], Returned]) -> tuple[float, Returned]:
    """Seconds that one call takes on the device, and what it returned."""
    if device.type != "cuda":
        start = time.perf_counter()
        result = function()
        return time.perf_counter() - start, result
    torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device).zero_()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    result = function()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3, result


def seconds(device: torch.device, function: Callable[[], object]) -> float:
    return timed(device, function)[0]


def interleaved(
    contenders: Mapping[Name, Callable[[], Sample]], repeats: int, warmup: int = 1
) -> dict[Name, list[Sample]]:
    """Run all contenders in turn, `repeats` times over after `warmup` rounds; entry i of each list is from round i.

    Every other round runs backwards, so that none always follows the same neighbour.
    """
    samples: dict[Name, list[Sample]] = {name: [] for name in contenders}
    gc.collect()
    gc.disable()  # a collection would fall on whoever is being timed
    try:
        for round_number in range(-warmup, repeats):
            names = list(contenders)
            for name in names if round_number % 2 == 0 else reversed(names):
                sample = contenders[name]()
                if round_number >= 0:
                    samples[name].append(sample)
    finally:
        gc.enable()
    return samples


def interleaved_seconds(
    device: torch.device, calls: Mapping[Name, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[Name, list[float]]:
    """Of every call on the device, by round."""
    return interleaved({name: partial(seconds, device, call) for name, call in calls.items()}, repeats, warmup)


class TrainingStep:
    """Forward pass under autocast, cross entropy, backward pass and update on a fixed batch; one call is one step."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor, dtype: torch.dtype
    ) -> None:
        self.model, self.optimizer, self.inputs, self.labels = model, optimizer, inputs, labels
        self.autocast_dtype = None if dtype == torch.float32 else dtype

    def attention(self) -> AbstractContextManager[object]:
        """What the forward pass runs in."""
        return nullcontext()

    def forward(self) -> Tensor:
        with self.attention(), autocast(self.inputs.device, self.autocast_dtype):
            return self.model(self.inputs)

    def __call__(self) -> None:
        cross_entropy(self.forward().float(), self.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratio within each round, then median and spread over rounds: a slow moment of the machine meets both sides."""
    return Spread.of(a / b for a, b in zip(numerators, denominators, strict=True))


def copy_bandwidth(device: torch.device, repeats: int = 9) -> Spread:
    """Bytes per second of copying a large tensor on the device, counting each byte read and each byte written."""
    size = (1024 if device.type == "cuda" else 256) * MEBIBYTE
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    samples = interleaved_seconds(device, {"copy": lambda: target.copy_(source)}, repeats, warmup=2)
    return Spread.of(2 * size / each for each in samples["copy"])


# -- Memory


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖ in float64."""
    expected = expected.double()
    return ((value.double() - expected).norm() / expected.norm()).item()


# -- Tables and pictures


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table, its columns padded for reading in a terminal."""
    lines = [list(header), *(list(row) for row in rows)]
    if len(lines) == 1:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    padded.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(f"\n{title}\n", *padded, sep="\n", flush=True)


def draw_over_length(path: Path, title: str, panels: Mapping[str, Mapping[str, Mapping[int, Spread | float]]]) -> None:
    """A panel for each heading, with a line for each contender over the number of tokens; both axes logarithmic."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    for axes, (heading, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for name, values in lines.items():
            colour = PALETTE[names.index(name) % len(PALETTE)]
            spreads = [value if isinstance(value, Spread) else Spread.of([value]) for value in values.values()]
            axes.plot(list(values), [spread.median for spread in spreads], "o-", color=colour, label=name)
            ends = [spread.low for spread in spreads], [spread.high for spread in spreads]
            axes.fill_between(list(values), *ends, color=colour, alpha=0.15, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        plain_axes(axes, "tokens N", heading)
        ticks = sorted({N for values in lines.values() for N in values})
        ticks = ticks[:: len(ticks) // 6 + 1]
        axes.set_xticks(ticks, [f"{N:,}" for N in ticks])
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)
