"""curves.png: loss, accuracy and learning rate of a run, from its metrics.jsonl; redrawn while the run goes on.

python -m utils.curves RUN    draws it once, at the lowest priority
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from logger import get_logger, read_metrics

POINTS = 600  # of a line at most, so that a long run's picture costs what a short one's does
PAUSE = 120.0  # seconds at least between two drawings of a running run
ROOT = Path(__file__).resolve().parents[1]


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


def draw_curves(folder: Path) -> Path | None:
    """Draw `folder`/curves.png, replacing it at once, and return its path; None where nothing has been logged yet."""
    metrics_file = folder / "metrics.jsonl"
    records = read_metrics(metrics_file) if metrics_file.exists() else []
    if not records:
        return None
    from matplotlib.figure import Figure  # slow to import, and not needed by whoever only wants `thin`

    def series(kind: str, field: str) -> tuple[np.ndarray, np.ndarray]:
        chosen = [record for record in records if record["kind"] == kind and record.get(field) is not None]
        steps, values = ([record[name] for record in chosen] for name in ("step", field))
        return thin(np.array(steps, dtype=float), np.array(values, dtype=float), POINTS)

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    loss, accuracy, rate = figure.subplots(1, 3)
    labels = {"train": "training (as optimised)", "val": "validation", "ema": "validation (EMA)"}
    for kind, label in labels.items():
        steps, values = series(kind, "loss")
        if len(steps):
            loss.plot(steps, values, label=label)
        for field, style in (("top1", "-"), ("top5", ":")):
            steps, values = series(kind, field)
            if len(steps):
                accuracy.plot(steps, values, style, label=f"{label} {field.replace('top', 'top-')}")
    rate.plot(*series("train", "lr"), color="tab:green")
    for axes, title, unit in (
        (loss, "Loss", "cross-entropy"),
        (accuracy, "Accuracy", "%"),
        (rate, "Learning rate", ""),
    ):
        axes.set(title=title, xlabel="optimizer step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    path = folder / "curves.png"
    temporary = folder / f".curves-{os.getpid()}.tmp"
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)
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
        self.failed = False

    def epoch_ended(self) -> None:
        """Start a drawing if one is due."""
        if not self._idle() or time.monotonic() - self.started < self.pause:
            return
        self.started = time.monotonic()
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
                path.unlink(missing_ok=True)

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
    os.nice(19)
    draw_curves(Path(sys.argv[1]))
