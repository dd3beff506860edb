"""What the benchmarks share: arguments, process setup, timing, bytes saved for backward, bars, tables, result files."""

import argparse
import gc
import importlib.metadata
import json
import platform
import re
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.environment import commit, cpu_field

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEBIBYTE = 2**20
# Larger than the last-level cache of any GPU; written before each timed call, so that none finds its inputs there.
FLUSHED_BYTES = 256 * MEBIBYTE
# CPU features that decide how fast float32 and bfloat16 products are.
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

Name = TypeVar("Name", bound=Hashable)
Sample = TypeVar("Sample")
Returned = TypeVar("Returned")


class WrongResultError(RuntimeError):
    """What was to be timed computes something else than the baseline."""


@contextmanager
def gated() -> Iterator[None]:
    """End the program with the reason where a gate inside finds a wrong result."""
    try:
        yield
    except WrongResultError as error:
        raise SystemExit(f"nothing is timed that is wrong: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Arguments, process and device
# ---------------------------------------------------------------------------------------------------------------------


def argument_parser(program: str, doc: str, *, device: bool = False, threads: bool = True) -> argparse.ArgumentParser:
    """A parser with the arguments that programs share; its description is the first paragraph of the module's `doc`."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{program}", description=doc.split("\n\n")[0])
    if device:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    if threads:
        parser.add_argument("--threads", type=int, help="default: what PyTorch chooses")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    return parser


def prepare_process(threads: int | None = None) -> None:
    """Flush denormals and set the number of threads; must come before the first tensor operation of the process."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)  # worker threads inherit it when they start


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


# ---------------------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of repeated measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
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


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Ratio within each round, then median and spread over rounds: a slow moment of the machine meets both sides."""
    return Spread.of(a / b for a, b in zip(numerators, denominators, strict=True))


def copy_bandwidth(device: torch.device, repeats: int = 9) -> Spread:
    """Bytes per second of copying a large tensor on the device, counting each byte read and each byte written."""
    size = (1024 if device.type == "cuda" else 256) * MEBIBYTE
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)
    seconds = interleaved({"copy": lambda: timed(device, lambda: target.copy_(source))[0]}, repeats, warmup=2)["copy"]
    return Spread.of(2 * size / each for each in seconds)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def saved_bytes(function: Callable[[], object], excluded: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd holds for the backward pass of `function()`.

    Whole storages, each once however many saved tensors share it; those of `excluded` (parameters) do not count, those
    of inputs do when an operation saves them.
    """
    not_counted = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    storages: dict[int, torch.UntypedStorage] = {}

    def see(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_counted:
            storages[storage.data_ptr()] = storage  # keeps it alive: no other storage takes the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(see, lambda tensor: tensor):
        result = function()
    total = sum(storage.nbytes() for storage in storages.values())
    del result  # until here, so that the graph outlives the count
    return total


def relative_error(value: Tensor, expected: Tensor) -> float:
    """‖value − expected‖ / ‖expected‖ in float64."""
    expected = expected.double()
    return ((value.double() - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------------------------------------------------------------
# Bars, tables, files
# ---------------------------------------------------------------------------------------------------------------------


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

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "met": self.met}


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A Markdown table, its columns padded for reading in a terminal."""
    lines = [list(header), *(list(row) for row in rows)]
    if len(lines) == 1:
        return
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines]
    padded.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(f"\n{title}\n", *padded, sep="\n", flush=True)


def print_bars(bars: Sequence[Bar]) -> None:
    print_table(
        "Bars",
        ("what", "measured", "bar", ""),
        (
            (
                bar.what,
                f"{bar.measured:.2f}",
                f"{'≥' if bar.direction == 'at least' else '≤'} {bar.bound:g}",
                "met" if bar.met else "NOT MET",
            )
            for bar in bars
        ),
    )


def result_path(folder: Path, program: str, device: torch.device, suffix: str) -> Path:
    """`folder`/<program>-<device>-<date>.<suffix>; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{program}-{device_slug(device)}-{date.today().isoformat()}.{suffix}"


def write_result(
    folder: Path,
    program: str,
    device: torch.device,
    content: Mapping[str, Any],
    bars: Sequence[Bar],
    *,
    variant: str = "",
    packages: Sequence[str] = (),
) -> Path:
    """Write what a program measured, with its environment (versions of `packages` too) and bars; returns the file."""
    path = result_path(folder, program + variant, device, "json")
    record = {
        "program": f"benchmarks.{program}",
        "environment": environment(device) | {name: importlib.metadata.version(name) for name in packages},
        **content,
        "bars": [bar.as_json() for bar in bars],
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
