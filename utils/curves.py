"""Training curves, drawn in one place: curves.png, redrawn while a run goes on, and the charts of the run report.

python -m utils.curves RUN    draws RUN/curves.png once, at the lowest priority
"""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from logger import get_logger, read_metrics
from utils.files import remove_temporary, written

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Records = Sequence[dict[str, Any]]  # of metrics.jsonl, by step

# What can be drawn: title, unit ({noun}: what a sample is called), and factor from what metrics.jsonl holds.
METRICS: dict[str, tuple[str, str, float]] = {
    "loss": ("Loss", "cross-entropy", 1),
    "top1": ("Top-1 accuracy", "%", 1),
    "top5": ("Top-5 accuracy", "%", 1),
    "lr": ("Learning rate", "", 1),
    "grad_norm": ("Gradient norm", "before clipping", 1),
    "images_per_s": ("Throughput", "{noun}s/s, all processes", 1),
    "data_time": ("Waiting for data", "ms per step", 1000),
    "step_time": ("Step time", "ms", 1000),
    "communication_time": ("Waiting for gradients of other processes", "ms per step", 1000),
    "memory_mb": ("Largest memory use so far", "MiB, rank 0", 1),
}
SPIKES = ("grad_norm", "data_time", "communication_time")  # whose outliers would flatten everything else
LOG_RANGE = 50  # spikes over more than this get a logarithmic axis
KINDS = {"train": ("training", "faint"), "val": ("validation", "solid"), "ema": ("validation, EMA", "dashed")}
PICTURE = ("loss", "top1", "top5", "lr")  # what curves.png shows
POINTS = 200  # of a line at most, so that a long run's picture costs what a short one's does
PAUSE = 120.0  # seconds at least between two drawings of a running run
ROOT = Path(__file__).resolve().parents[1]

# Lines after Okabe and Ito, told apart with any colour vision; darker where white would swallow them.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b85f95", "#a97a00", "#4a9fd4", "#5b4a9e", "#6d6d6d")
MUTED, GRID = "#62666d", "#dfdfda"
FONT_SIZE = 11
FEW = 30  # points of stairs that are marked one by one
STEPS = (1, 2, 2.5, 5, 10)  # between ticks
LINES: dict[str, dict[str, Any]] = {
    "solid": {"linewidth": 1.6},
    "faint": {"linewidth": 1.1, "alpha": 0.6, "zorder": 1.9},  # below those that it accompanies
    "dashed": {"linewidth": 1.6, "linestyle": (0, (3, 2.4)), "markerfacecolor": "none"},
    "stairs": {"linewidth": 1.6, "drawstyle": "steps-mid", "markeredgecolor": "none"},
}


class Line(NamedTuple):
    """One line of a panel; `colour` is its place in PALETTE, `style` one of LINES."""

    label: str
    x: np.ndarray
    y: np.ndarray  # NaN breaks the line
    colour: int = 0
    style: str = "solid"


class Panel(NamedTuple):
    """Lines over one pair of axes."""

    title: str
    unit: str
    lines: Sequence[Line]
    x_label: str = "epoch"
    logarithmic: bool = False
    y_range: tuple[float, float] | None = None

    @property
    def gaps(self) -> str:
        """How many points each line lacks, where it lacks any."""
        gaps = {line.label: int(np.isnan(line.y).sum()) for line in self.lines}
        return ", ".join(f"{label}: {count}" for label, count in gaps.items() if count)


def series(records: Records, kind: str, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """(epochs since the start, values) of the records that have the value; what was not finite is NaN.

    An epoch's steps are those of the validations; of a run without one, the most seen in an epoch. A training line
    after only a few steps, as the one at the end of an epoch may be, joins the line before it.
    """
    chosen = [record for record in records if record["kind"] == kind and metric in record]
    steps = np.array([record["step"] for record in chosen], dtype=float)
    numbers = [record[metric] if isinstance(record[metric], int | float) else np.nan for record in chosen]
    values = np.array(numbers, dtype=float)
    values[~np.isfinite(values)] = np.nan
    if kind == "train" and len(steps) > 1:
        widths = np.diff(steps, prepend=0.0)
        short = widths < 0.5 * np.median(widths)
        short[0] = False
        starts = np.flatnonzero(~short)
        values = np.add.reduceat(values * widths, starts) / np.add.reduceat(widths, starts)
        steps = steps[np.append(starts[1:], len(steps)) - 1]
    known = [record for record in records if record["kind"] == "val"] or records
    steps_per_epoch = max((record["step"] / max(record["epoch"] + 1, 1) for record in known), default=0.0) or 1.0
    return steps / steps_per_epoch, values


def thin(x: np.ndarray, y: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points of a line: the means of equally many neighbours; NaN counts only where all are NaN."""
    if len(x) <= limit:
        return x, y
    edges = np.linspace(0, len(x), limit, endpoint=False).astype(int)
    sizes = np.diff([*edges, len(x)])
    finite = np.isfinite(y)
    counts = np.add.reduceat(finite.astype(int), edges)
    sums = np.add.reduceat(np.where(finite, y, 0.0), edges)
    means = np.divide(sums, counts, out=np.full(limit, np.nan), where=counts > 0)
    return np.add.reduceat(x, edges) / sizes, means


def training_panels(runs: Sequence[tuple[str, Records]], metrics: Sequence[str], noun: str = "image") -> list[Panel]:
    """The panels of some METRICS, of runs given as (name, records); a metric without a finite value has none.

    Of one run, training and validation share a panel; of several, each has its own, with a line per run.
    """
    panels = []
    for metric in metrics:
        title, unit, factor = METRICS[metric]
        kinds = [k for k in KINDS if any(r["kind"] == k and metric in r for _, records in runs for r in records)]
        groups: dict[str, list[Line]] = {}
        for kind in kinds:
            word, style = KINDS[kind]
            for colour, (name, records) in enumerate(runs):
                x, y = thin(*series(records, kind, metric), POINTS)
                if len(runs) == 1:
                    line = Line(word, x, factor * y, colour, style if len(kinds) > 1 else "solid")
                    groups.setdefault(title, []).append(line)
                elif len(x):
                    panel = title if kinds == ["train"] else f"{title}, {word}"
                    groups.setdefault(panel, []).append(Line(name, x, factor * y, colour))
        for panel, lines in groups.items():
            values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
            if len(values):
                wide = metric in SPIKES and 0 < LOG_RANGE * values.min() < values.max()
                shown = unit.format(noun=noun) + (", log scale" if wide else "")
                panels.append(Panel(panel, shown, lines, logarithmic=wide))
    return panels


def number(value: float) -> str:
    """A value for people: about four digits, thousands as k, very small ones as powers of ten."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.4g} M"
    if size >= 1e4:
        return f"{value / 1e3:.4g} k"
    if size and size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def draw_panels(figure: "Figure", panels: Sequence[Panel], *, captions: bool = True) -> None:
    """Draw panels side by side. `captions`: with title, unit and legend, which a page may say beside the picture."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator  # slow, and only needed for drawing

    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(row, panels, strict=True):
        for line in panel.lines:
            gap = np.pad(~np.isfinite(line.y), 1, constant_values=True)
            dotted = gap[:-2] & ~gap[1:-1] & gap[2:]  # no line leads there: a dot
            if line.style == "stairs" and len(line.x) <= FEW:
                dotted[:] = True
            dots = {"marker": "o", "markersize": 4, "markevery": dotted} if dotted.any() else {}
            axes.plot(line.x, line.y, label=line.label, color=PALETTE[line.colour], **LINES[line.style], **dots)
        if panel.logarithmic:
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,), numticks=7))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=STEPS))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=STEPS, integer=True))  # epochs and classes are whole
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: number(value))
        axes.margins(x=0.01)
        if panel.x_label == "epoch":
            axes.set_xlim(0, 1.01 * max([1.0, *(line.x.max() for line in panel.lines if len(line.x))]))
        if panel.y_range:
            axes.set_ylim(*panel.y_range)
        axes.grid(axis="y", color=GRID)
        axes.tick_params(axis="y", length=0)
        plain_axes(axes, panel.x_label, panel.unit if captions else "")
        if captions:
            axes.set_title(panel.title)
            if len(panel.lines) > 1:
                axes.legend(frameon=False)


def plain_axes(axes: "Axes", x_label: str, y_label: str) -> None:
    """Axes that stay in the background: a line below, no frame, everything in MUTED."""
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelsize=FONT_SIZE)
    axes.set_xlabel(x_label, color=MUTED, fontsize=FONT_SIZE)
    axes.set_ylabel(y_label, color=MUTED, fontsize=FONT_SIZE)


def draw_curves(folder: Path) -> Path | None:
    """Draw `folder`/curves.png, replacing it at once, and return its path; None where nothing has been logged yet."""
    metrics_file = folder / "metrics.jsonl"
    records = read_metrics(metrics_file) if metrics_file.exists() else []
    panels = training_panels([(folder.name, records)], PICTURE)
    if not panels:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    draw_panels(figure, panels)
    path = folder / "curves.png"
    with written(path, folder / f".curves-{os.getpid()}.tmp") as file:
        figure.savefig(file, dpi=120, format="png")
    return path


class CurvesInBackground:
    """Redraws a running run's curves.png in a process of its own, at the lowest priority, so that training never waits.

    An epoch that ends less than PAUSE seconds after the last drawing began (or the run did), or while one is still
    being made, is left to the next. A drawing that fails is named once in the log, and the run goes on.
    """

    def __init__(self, folder: Path, pause: float = PAUSE) -> None:
        self.folder, self.pause = folder, pause
        self.started = time.monotonic()
        self.drawing: subprocess.Popen | None = None
        self.failed = self.told = False

    def epoch_ended(self) -> None:
        """Start a drawing if one is due."""
        if not self._idle() or time.monotonic() - self.started < self.pause:
            return
        self.started = time.monotonic()
        if not self.told:
            self.told = True
            get_logger().info("curves so far, from now on beside the run: %s", self.folder / "curves.png")
        try:
            self.drawing = subprocess.Popen(
                [sys.executable, "-m", "utils.curves", str(self.folder.resolve())],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            self._report(error.strerror or str(error))

    def draw(self) -> Path | None:
        """Draw in this process, and wait for it; returns the picture's path where there is one."""
        self.close()
        try:
            return draw_curves(self.folder)
        except Exception as error:  # whatever matplotlib or the disk has: a picture is not worth a run
            self._report(str(error))
            return None

    def close(self) -> None:
        """End a drawing that is still being made, which would replace a later one by an older state."""
        if self.drawing and self.drawing.poll() is None:
            self.drawing.kill()
        if self.drawing:
            self.drawing.communicate()
            self.drawing = None
            for path in self.folder.glob(".curves-*.tmp"):
                remove_temporary(path)

    def _idle(self) -> bool:
        if self.drawing is None:
            return True
        if self.drawing.poll() is None:
            return False
        lines = self.drawing.communicate()[1].decode(errors="replace").strip().splitlines()
        if self.drawing.returncode:
            self._report(lines[-1] if lines else f"exit status {self.drawing.returncode}")
        self.drawing = None
        return True

    def _report(self, why: str) -> None:
        if not self.failed:
            get_logger().warning("curves.png could not be drawn, the run goes on: %s", why)
        self.failed = True


if __name__ == "__main__":
    if hasattr(os, "nice"):  # not on Windows
        os.nice(19)
    draw_curves(Path(sys.argv[1]))
