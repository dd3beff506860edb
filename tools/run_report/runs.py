"""What a run folder holds, read without trust, and what is damaged or missing in it."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode

from config import TOKEN_DATASETS, config_from_tree
from logger import read_records
from tools.run_report.classes import ByClass, by_class
from utils.environment import ENVIRONMENT_FILE
from utils.predictions import PREDICTIONS, Predictions, read_predictions
from utils.yaml_files import parse_yaml

METRICS_FILE = "metrics.jsonl"
MARKERS = ("STOPPED", "PREEMPTED")  # each says why the run ended early


class ReportError(ValueError):
    """A report that cannot be made: the message says what was received and what to do."""


@dataclass
class RunRecord:
    """What a run left in its folder. `notes` are sentences on what is damaged, missing or unusual, for the page."""

    folder: Path
    name: str
    records: list[dict[str, Any]]  # of metrics.jsonl, by step
    config: CfgNode | None = None
    config_text: str = ""
    predictions: Predictions | None = None
    starts: list[dict[str, Any]] = field(default_factory=list)  # environment.json: the newest start is the last
    ending: str | None = None  # why it ended early
    notes: list[str] = field(default_factory=list)
    number: int = 0  # its place among the runs that are compared, and its colour

    @cached_property
    def by_class(self) -> ByClass | None:
        return by_class(self.predictions) if self.predictions else None

    @property
    def sequences(self) -> bool:
        """Whether the samples are sequences of tokens, and not images."""
        return self.config is not None and self.config.DATA.DATASET in TOKEN_DATASETS

    @property
    def noun(self) -> str:
        """What a sample is called."""
        return "sample" if self.sequences else "image"

    @property
    def eval_steps(self) -> int | None:
        """Optimizer steps between validations, of a run that is measured in steps (TRAIN.STEPS)."""
        if self.config is None or self.config.TRAIN.STEPS is None:
            return None
        return self.config.TRAIN.EVAL_STEPS

    def best(self, *kinds: str) -> dict[str, Any] | None:
        """The record of the highest top-1 of these kinds, or of validations of the model or its average; of equals the
        first."""
        wanted = kinds or ("val", "ema")
        found = [r for r in self.records if r["kind"] in wanted and isinstance(r.get("top1"), int | float)]
        return max(found, key=lambda record: record["top1"], default=None)

    @property
    def epochs(self) -> int:
        """Finished epochs: those with a validation."""
        return max((record["epoch"] + 1 for record in self.records if record["kind"] == "val"), default=0)

    @cached_property
    def timing(self) -> dict[str, float]:
        """Seconds of training, the share of them spent waiting for data, and images per second, over all log lines."""
        sums, before = np.zeros(3), 0
        for record in self.records:
            values = [record.get(name) for name in ("step_time", "data_time", "images_per_s")]
            if record["kind"] == "train" and all(isinstance(value, int | float) for value in values):
                step_time, data_time, rate = np.array(values, dtype=float)
                sums += max(record["step"] - before, 0) * np.array([step_time, data_time, step_time * rate])
                before = record["step"]
        seconds, waiting, images = sums.tolist()
        return (
            {"seconds": seconds, "data_share": waiting / seconds, "images_per_s": images / seconds} if seconds else {}
        )


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders among and below `paths`, in that order, each once.

    Raises ReportError for a path that is no folder or holds no run.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            problem = "is no folder" if path.exists() else "does not exist"
            raise ReportError(f"{path} {problem}; expected a run folder (OUTPUT/NAME/TAG) or one that holds some")
        here = [path] if (path / METRICS_FILE).is_file() else sorted(file.parent for file in path.rglob(METRICS_FILE))
        if not here:
            raise ReportError(
                f"{path} holds no run: no {METRICS_FILE} in it or below; main.py writes one into OUTPUT/NAME/TAG"
            )
        found += here
    return list({folder.resolve(): folder for folder in found}.values())


def names_of(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the folders apart: the last parts of their paths, without the ones all share."""
    paths = [folder.resolve() for folder in folders]
    shared = Path(os.path.commonpath([path.parent for path in paths]))
    return [path.relative_to(shared if len(paths) > 1 else shared.parent).as_posix() for path in paths]


def read_run(folder: Path, name: str) -> RunRecord:
    """Read a run folder. Raises ReportError where its metrics hold no record at all; lesser damage becomes a note."""
    path = folder / METRICS_FILE
    try:
        records, damaged = read_records(path)
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror})") from error
    if not records:
        problem = f"none of its {len(damaged)} lines can be read" if damaged else "is empty; the run has logged nothing"
        raise ReportError(f"{path}: {problem}")
    run = RunRecord(folder, name, sorted(records, key=lambda record: record["step"]))
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (" …" if len(damaged) > 5 else "")
        lines = "line is" if len(damaged) == 1 else "lines are"
        run.notes.append(f"{len(damaged)} damaged {lines} left out of {METRICS_FILE} (number {shown}).")
    with _noting(run, "config.yaml cannot be read", "There is no config.yaml."):
        run.config_text = (folder / "config.yaml").read_text(encoding="utf-8")
        tree = parse_yaml(run.config_text, "config.yaml")
        run.config, ignored = config_from_tree(tree, str(folder / "config.yaml"))
        if ignored:
            run.notes.append(f"Keys of config.yaml that are unknown here: {', '.join(ignored[:8])}.")
    absent = f"There is no {ENVIRONMENT_FILE}: the run does not say where it was trained."
    with _noting(run, f"{ENVIRONMENT_FILE} cannot be read", absent):
        starts = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise ValueError("it is not a list of starts")
        run.starts = starts
    lost = f"No results by class and {run.noun}"
    how = "A validation that sets a new best writes it, and so does main.py --eval."
    with _noting(run, lost, f"{lost}: there is no {PREDICTIONS}. {how}"):
        evaluations = (f"eval_{split}_{PREDICTIONS}" for split in ("val", "val_ema", "test", "test_ema"))
        places = [path for name in (PREDICTIONS, *evaluations) if (path := folder / name).is_file()]
        newest = max(places, key=lambda path: path.stat().st_mtime_ns, default=folder / PREDICTIONS)
        run.predictions = read_predictions(newest)
    for marker in MARKERS:
        if (folder / marker).is_file():
            run.ending = (folder / marker).read_text(encoding="utf-8", errors="replace").strip()
    if not run.epochs:
        run.notes.append("No epoch has been validated yet.")
    return run


@contextmanager
def _noting(run: RunRecord, problem: str, absent: str) -> Iterator[None]:
    """Damage is noted, and the rest of the run is read on."""
    try:
        yield
    except FileNotFoundError:
        run.notes.append(absent)
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{problem}: {' '.join(str(error).split())}.")
