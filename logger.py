"""What a run says: console and log file (rank 0), metrics.jsonl, TensorBoard, and a progress bar on a terminal."""

import json
import logging
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from termcolor import colored
from tqdm import tqdm

from utils.names import printable_lines

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


def get_logger() -> logging.Logger:
    """The run's logger; silent until `setup_logger`."""
    return logging.getLogger("polaformer")


class _Formatter(logging.Formatter):
    """Lines that no name in them can break, and that every file takes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class _ConsoleHandler(logging.Handler):
    """Lines on standard output, coloured on a terminal, that leave a progress bar intact."""

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record)
        if sys.stdout.isatty():
            stamp, _, message = line.partition("] ")
            line = f"{colored(stamp + ']', 'green')} {colored(message, COLOURS.get(record.levelname))}"
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def setup_logger(rank: int, log_file: Path | None = None) -> logging.Logger:
    """Rank 0 logs to the console and appends to `log_file`; other ranks only warn, with their rank."""
    logger = get_logger()
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    who = "" if rank == 0 else f"rank {rank} "
    formatter = _Formatter(f"[%(asctime)s] {who}%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    if rank == 0 and log_file is not None:
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def progress(steps: Iterable[T], total: int, description: str, rank: int, done: int = 0) -> Iterator[T]:
    """`steps` with a bar, rate and remaining time on rank 0's terminal; elsewhere unchanged.

    `done` of the `total` are finished already.
    """
    enabled = rank == 0 and sys.stderr.isatty()
    bar = tqdm(steps, total=total, initial=done, desc=description, disable=not enabled, leave=False, dynamic_ncols=True)
    return iter(bar)


class MetricsWriter:
    """Appends one JSON object per line to metrics.jsonl, and the same scalars to TensorBoard, in rank 0's run folder.

    Every record has `kind` (train, val or ema), `epoch` and `step`; times are seconds per step, memory MiB, and what is
    not finite is null. A run continues at `epoch` after `step` optimizer steps: records from there on, which it will
    write again, are forgotten. A folder of None writes nothing.
    """

    def __init__(self, folder: Path | None, tensorboard: bool = False, *, epoch: int = 0, step: int = 0) -> None:
        self.path = folder / "metrics.jsonl" if folder else None
        self.tensorboard = None
        if self.path and self.path.exists():
            kept = [
                record
                for record in read_metrics(self.path)
                if record["epoch"] < epoch or (record["kind"] == "train" and record["step"] <= step)
            ]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            os.replace(temporary, self.path)
        if folder and tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only runs with TENSORBOARD need it

            self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, epoch: int, step: int, **values: float) -> None:
        if self.path is None:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        record: dict[str, Any] = {"kind": kind, "epoch": epoch, "step": step, **finite}
        with self._losing_records():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            if self.tensorboard:
                for name, value in values.items():
                    self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
                self.tensorboard.flush()

    def write_images(self, name: str, images: "Tensor", step: int) -> None:
        """A grid of images (B, 3, H, W), 0 to 1, for TensorBoard alone."""
        if self.tensorboard:
            with self._losing_records():
                self.tensorboard.add_images(name, images, step)
                self.tensorboard.flush()

    def write_histograms(self, values: Mapping[str, "Tensor"], step: int) -> None:
        """Distributions by name, for TensorBoard alone."""
        if self.tensorboard:
            with self._losing_records():
                for name, each in values.items():
                    self.tensorboard.add_histogram(name, each, step)
                self.tensorboard.flush()

    @contextmanager
    def _losing_records(self) -> Iterator[None]:
        """A full disk costs the record, not the run."""
        try:
            yield
        except OSError as error:
            get_logger().error("%s could not be written: %s", error.filename or self.path, error.strerror or error)

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a crash cut short is left out."""
    return read_records(path)[0]


def read_records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a metrics.jsonl, and the numbers (from 1) of the lines that are none."""
    records, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # no JSON, or no text
            record = None
        whole = isinstance(record, dict) and isinstance(record.get("kind"), str)
        if whole and all(isinstance(record.get(name), int) for name in ("epoch", "step")):
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged
