"""What a run says: console and log file (rank 0), metrics.jsonl, TensorBoard, and a progress bar on a terminal."""

import errno
import io
import json
import logging
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from termcolor import colored
from tqdm import tqdm

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
KEPT = 10_000  # items that a place which refuses them still gets when it takes them again
BINS = 30  # of a histogram
COLOURS = {"WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


def get_logger() -> logging.Logger:
    """The run's logger; silent until `setup_logger`."""
    return logging.getLogger("polaformer")


# Control characters, separators of lines, marks that turn the direction of writing, and what stands for bytes that are
# no UTF-8 (surrogates): each of them breaks a line, a terminal, or the writing of a file.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(name: object) -> str:
    r"""`name` on one line and in UTF-8: what does not belong there is escaped, as `\n`, `\x1b`, or `\xff` for a byte.

    Every name that reaches a log, a terminal or a file goes through here; files are opened by the name itself.
    """
    return _UNPRINTABLE.sub(_escaped, str(name))


def printable_lines(text: object) -> str:
    """A message that may have lines, each of them printable."""
    return "\n".join(map(printable, str(text).split("\n")))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    byte = 0xDC80 <= code <= 0xDCFF  # how Python keeps a byte that is no UTF-8
    return f"\\x{code - 0xDC00:02x}" if byte else found[0].encode("unicode_escape").decode()


def duration(seconds: float) -> str:
    """A time for people, in two digits or more of the unit that fits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.95 * size:
            return f"{seconds / size:.1f} {unit}" if seconds < 9.95 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class _Formatter(logging.Formatter):
    """Lines that no name in them can break, and that every file takes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


class Sink:
    """Takes what a run says to a place that may refuse it: a terminal that is gone, a full disk, a folder removed.

    Such a place never ends a run. What it refused is kept, and tried again, in its order, with all that follows and at
    the end. The first failure is one warning, which every other place gets; "not now" (EAGAIN) is none.
    """

    def __init__(self, name: str, write: Callable[[Any], None]) -> None:
        """`write` delivers one item, or nothing of it. Raises OSError or ValueError (a closed stream)."""
        self.name, self._write = name, write
        self._kept: deque[Any] = deque(maxlen=KEPT)
        self._lost, self._warned = 0, False

    def put(self, item: Any) -> None:
        self._lost += len(self._kept) == KEPT  # the oldest goes
        self._kept.append(item)
        self.flush()

    def drop(self) -> None:
        """Forget what is kept."""
        self._kept.clear()

    def flush(self) -> None:
        """Deliver what is kept, as far as it is taken."""
        try:
            while self._kept:
                self._write(self._kept[0])
                self._kept.popleft()
        except (OSError, ValueError) as error:
            if not self._warned and not isinstance(error, BlockingIOError):
                self._warned = True
                why = getattr(error, "strerror", None) or error
                get_logger().warning(
                    "%s could not be written: %s. The run goes on, and it is tried again", self.name, why
                )

    def close(self) -> None:
        """The last attempt; says what is missing in the end."""
        self.flush()
        if missing := self._lost + len(self._kept):
            get_logger().warning("%s lacks %d records, which could not be written", self.name, missing)


def append(path: Path, content: bytes) -> None:
    """Append all of `content` to a file, or nothing. Raises OSError naming it."""
    if path.exists() and not path.is_file():  # a pipe or device would block, or be endless
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def append_line(path: Path, line: str) -> None:
    """Append a line to a text file; one before it that a crash cut short is ended, so that it spoils itself alone."""
    content = (line + "\n").encode(errors="backslashreplace")
    if path.is_file():
        with path.open("rb") as file:
            if file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                content = b"\n" + content
    append(path, content)


def _print(line: str) -> None:
    """Write a line to standard output and leave a progress bar intact; a character that it cannot show is escaped.

    Past the stream's buffer: what stayed there would be written again when the program ends, which then fails.
    """
    if sys.stdout is None:  # a program without a console
        return
    with tqdm.external_write_mode(file=sys.stdout):
        if not hasattr(sys.stdout, "buffer"):  # a stand-in, such as a notebook's
            sys.stdout.write(line + "\n")
            return
        content = (line + "\n").encode(sys.stdout.encoding, "backslashreplace")
        file = getattr(sys.stdout.buffer, "raw", sys.stdout.buffer)
        while content:
            if (count := file.write(content)) is None:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            content = content[count:]


def _is_terminal(stream: Any) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False


class _SinkHandler(logging.Handler):
    """Log lines to a sink."""

    def __init__(self, sink: Sink) -> None:
        super().__init__()
        self.sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        self.sink.put(self.format(record))

    def close(self) -> None:
        self.sink.flush()
        super().close()


class _ConsoleHandler(_SinkHandler):
    """Lines on standard output, coloured on a terminal."""

    def __init__(self) -> None:
        super().__init__(Sink("the console", _print))

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if not _is_terminal(sys.stdout):
            return line
        stamp, _, message = line.partition("] ")
        return f"{colored(stamp + ']', 'green')} {colored(message, COLOURS.get(record.levelname))}"


def open_streams() -> None:
    """Give a program that was started without standard streams some that take everything.

    Else the first file that it opens would get their numbers, and all that libraries print.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def setup_logger(rank: int, log_file: Path | None = None, check: Callable[[], None] = lambda: None) -> logging.Logger:
    """Rank 0 logs to the console and appends to `log_file`; other ranks only warn, with their rank.

    `check` raises OSError where the file must not be written now.
    """
    logger = get_logger()
    for handler in logger.handlers:
        handler.close()
    logger.handlers.clear()
    logger.propagate = False
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    who = "" if rank == 0 else f"rank {rank} "
    formatter = _Formatter(f"[%(asctime)s] {who}%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    handlers: list[_SinkHandler] = [_ConsoleHandler()]
    if rank == 0 and log_file is not None:

        def write(line: str) -> None:
            check()
            append_line(log_file, line)

        handlers.append(_SinkHandler(Sink(str(log_file), write)))
    for handler in handlers:
        handler.lock = handlers[0].lock  # one for all: each may warn of itself through the others
        handler.setFormatter(formatter)
        logger.addHandler(handler)
    return logger


def progress(steps: Iterable[T], total: int, description: str, rank: int, done: int = 0) -> Iterator[T]:
    """`steps` with a bar, rate and remaining time on rank 0's terminal; elsewhere unchanged.

    `done` of the `total` are finished already.
    """
    enabled = rank == 0 and _is_terminal(sys.stderr)
    bar = tqdm(steps, total=total, initial=done, desc=description, disable=not enabled, leave=False, dynamic_ncols=True)
    return iter(bar)


class MetricsWriter:
    """Appends one JSON object per line to metrics.jsonl, and the same scalars to TensorBoard, in rank 0's run folder.

    Every record has `kind` (train, val or ema), `epoch` and `step`; times are seconds per step, memory MiB, and what is
    not finite is null. A run continues at `epoch` after `step` optimizer steps: records from there on, which it will
    write again, are forgotten. A folder of None writes nothing. `check` raises OSError where nothing may be written.
    """

    def __init__(
        self,
        folder: Path | None,
        tensorboard: bool = False,
        *,
        epoch: int = 0,
        step: int = 0,
        check: Callable[[], None] = lambda: None,
        follow: Callable[[Mapping[str, float], int], None] = lambda values, step: None,
    ) -> None:
        """`follow` is told the values of every record, by names such as train/loss, and its step."""
        self._follow = follow
        self.path = folder / "metrics.jsonl" if folder else None
        self.tensorboard = TensorBoard(folder / "tensorboard", step, check) if folder and tensorboard else None
        self._check = check
        self._written: list[str] = []
        self.best: dict[str, tuple[float, int]] = {}  # by kind: top-1 and, the first of equals, after how many epochs
        self._whole = False  # the file holds what was written, and nothing else
        self._sink = Sink(str(self.path), self._append)
        if self.path and self.path.is_file():
            try:
                records, damaged = read_records(self.path)
            except OSError as error:
                get_logger().warning("%s could not be read: %s", self.path, error.strerror)
                records, damaged = [], []
            kept = [r for r in records if r["epoch"] < epoch or (r["kind"] == "train" and r["step"] <= step)]
            self._written = [json.dumps(record) for record in kept]
            for record in kept:
                self._compare(record["kind"], record["epoch"], record.get("top1"))
            self._whole = not damaged and len(kept) == len(records)
            if not self._whole:
                self._sink.put(None)

    def _compare(self, kind: str, epoch: int, top1: object) -> None:
        if isinstance(top1, int | float) and (kind not in self.best or top1 > self.best[kind][0]):
            self.best[kind] = float(top1), epoch + 1

    def write(self, kind: str, epoch: int, step: int, **values: float) -> None:
        if self.path is None:
            return
        self._compare(kind, epoch, values.get("top1"))
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._sink.put(json.dumps({"kind": kind, "epoch": epoch, "step": step, **finite}))
        self._show(kind, step, values)
        self._follow({f"{kind}/{name}": value for name, value in values.items()}, step)

    def _append(self, line: str | None) -> None:
        assert self.path is not None
        self._check()
        lines = [line] if line else []
        if self._whole and self.path.is_file():
            for each in lines:
                append_line(self.path, each)
        else:  # at the start, and where somebody removed it
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(f"{each}\n" for each in [*self._written, *lines]), encoding="utf-8")
            os.replace(temporary, self.path)
            self._whole = True
        self._written += lines

    def restore(self) -> None:
        """Write everything again into a folder that lost it."""
        self._sink.put(None)
        if self.tensorboard and not self.tensorboard.path.exists():
            self.tensorboard.sink.drop()  # those records are in metrics.jsonl now
            for record in map(json.loads, self._written):
                kind, _, step = (record.pop(name) for name in ("kind", "epoch", "step"))
                self._show(kind, step, {name: math.nan if each is None else each for name, each in record.items()})

    def _show(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        if self.tensorboard:
            self.tensorboard.write_scalars({f"{kind}/{name}": value for name, value in values.items()}, step)

    def close(self) -> None:
        self._sink.close()
        if self.tensorboard:
            self.tensorboard.close()


class TensorBoard:
    """An event file of a run that continues after `step` optimizer steps; what was shown of later ones is forgotten.

    Its records are made by TensorBoard's functions and appended by a sink of ours: TensorBoard's own writer is a thread
    that a disk which is full for a moment ends for good.
    """

    def __init__(self, folder: Path, step: int, check: Callable[[], None]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # slow, and only runs with TENSORBOARD need it

        self._event, self._check = Event, check
        self.path = folder / f"events.out.tfevents.{time.time_ns() // 1000:016d}.{os.getpid()}"
        self.sink = Sink(str(self.path), self._append)
        self._first = self._record(file_version="brain.Event:2")
        self.sink.put(self._record(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def _record(self, **content: Any) -> bytes:
        from tensorboard.summary.writer.record_writer import RecordWriter

        buffer = io.BytesIO()
        RecordWriter(buffer).write(self._event(wall_time=time.time(), **content).SerializeToString())
        return buffer.getvalue()

    def _append(self, record: bytes) -> None:
        self._check()
        self.path.parent.mkdir(exist_ok=True)
        append(self.path, record if self.path.exists() and self.path.stat().st_size else self._first + record)

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        from torch.utils.tensorboard.summary import scalar

        self.sink.put(b"".join(self._record(step=step, summary=scalar(*item)) for item in values.items()))

    def write_images(self, name: str, images: "Tensor", step: int) -> None:
        """A grid of images (B, 3, H, W), 0 to 1."""
        from torch.utils.tensorboard.summary import image

        self.sink.put(self._record(step=step, summary=image(name, images)))

    def write_histograms(self, values: Mapping[str, "Tensor"], step: int) -> None:
        """Distributions by name."""
        from torch.utils.tensorboard.summary import histogram

        finite = {name: each[each.isfinite()].numpy() for name, each in values.items()}
        summaries = [histogram(name, each, BINS) for name, each in finite.items() if len(each)]
        self.sink.put(b"".join(self._record(step=step, summary=each) for each in summaries))

    def close(self) -> None:
        self.sink.close()


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
