"""What a run folder holds, read without trust, and what is damaged or missing in it."""

import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from yacs.config import CfgNode

from config import config_from_tree
from logger import read_records
from utils.environment import ENVIRONMENT_FILE

METRICS_FILE = "metrics.jsonl"
PREDICTIONS_FILE = "predictions.npz"
NOTHING = -1
WORDNET_ID = re.compile(r"n\d{8}")
MARKERS = ("STOPPED", "PREEMPTED")  # each says why the run ended early


class ReportError(ValueError):
    """A report that cannot be made: the message says what was received and what to do."""


@dataclass(frozen=True)
class Predictions:
    """Per-image results of a validation, as predictions.npz stores them (docs/report.md); N images, k ≤ 5 guesses.

    Without class names in the file, `classes` are the labels' numbers.
    """

    index: np.ndarray  # (N,) position in the data set
    label: np.ndarray  # (N,)
    guesses: np.ndarray  # (N, k), best first; NOTHING where the logits were not finite
    probability: np.ndarray  # (N, k)
    loss: np.ndarray  # (N,)
    file: np.ndarray  # (N,) names
    classes: list[str]
    epoch: int
    checkpoint: str

    @property
    def correct(self) -> np.ndarray:
        """(N,) whether the best guess is the label."""
        return self.guesses[:, 0] == self.label

    @property
    def among_guesses(self) -> np.ndarray:
        """(N,) whether the label is one of the guesses."""
        return (self.guesses == self.label[:, None]).any(axis=1)


def read_predictions(path: Path) -> Predictions:
    """Raises ReportError where the file is damaged or its arrays do not belong together."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ReportError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    needed = ("index", "label", "top5", "probability", "loss", "file", "classes", "epoch", "checkpoint")
    if absent := [name for name in needed if name not in arrays]:
        raise ReportError(f"{path} lacks the arrays {', '.join(absent)}; expected {', '.join(needed)}")
    label, guesses = arrays["label"], arrays["top5"]
    if not len(label) or guesses.ndim != 2 or not guesses.shape[1]:
        raise ReportError(
            f"{path}: label {label.shape} and top5 {guesses.shape}, expected (N,) and (N, k), N and k > 0"
        )
    shapes = {"index": (len(label),), "top5": (len(label), guesses.shape[1]), "loss": (len(label),)}
    shapes |= {"probability": shapes["top5"], "file": (len(label),), "epoch": (), "checkpoint": ()}
    if wrong := [
        f"{name} {arrays[name].shape} instead of {shape}"
        for name, shape in shapes.items()
        if arrays[name].shape != shape
    ]:
        raise ReportError(f"{path}: arrays of other shapes than its {len(label)} labels ask for: {', '.join(wrong)}")
    highest = int(max(label.max(), guesses.max()))
    classes = readable_classes(arrays["classes"].tolist()) or [str(number) for number in range(highest + 1)]
    if label.min() < 0 or guesses.min() < NOTHING or highest >= len(classes):
        raise ReportError(f"{path}: class {highest} or a negative one, expected 0 to {len(classes) - 1}")
    return Predictions(
        index=arrays["index"],
        label=label,
        guesses=guesses,
        probability=arrays["probability"],
        loss=arrays["loss"],
        file=arrays["file"],
        classes=classes,
        epoch=int(arrays["epoch"]),
        checkpoint=str(arrays["checkpoint"]),
    )


def readable_classes(names: list[str]) -> list[str]:
    """WordNet ids with the word that ImageNet has for them, `tench (n01440764)`; other names as they are."""
    if not names or not all(WORDNET_ID.fullmatch(name) for name in names):
        return names
    from timm.data import ImageNetInfo  # slow to import

    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    return [
        f"{info.label_name_to_description(name).partition(',')[0]} ({name})" if name in known else name
        for name in names
    ]


@dataclass
class Run:
    """A run folder's contents. `notes` are sentences on what is damaged, missing or unusual, for the page."""

    folder: Path
    name: str
    records: list[dict[str, Any]]
    config: CfgNode | None
    config_text: str
    predictions: Predictions | None
    starts: list[dict[str, Any]]  # environment.json: one entry each time the run was started, the newest last
    ending: str | None  # why it ended early
    notes: list[str] = field(default_factory=list)

    @property
    def sequences(self) -> bool:
        """Whether the samples are sequences of tokens (MODEL.TYPE lra), and not images."""
        return self.config is not None and self.config.MODEL.TYPE == "lra"

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

    @cached_property
    def steps_per_epoch(self) -> float:
        """Optimizer steps, from the validations; of a run without one, the most seen in an epoch."""
        for record in self.records:
            if record["kind"] == "val" and record["step"] > 0:
                return record["step"] / (record["epoch"] + 1)
        return max((record["step"] / (record["epoch"] + 1) for record in self.records), default=1.0) or 1.0

    def series(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(epochs since the start, values) of the records that have the value; what was not finite is NaN.

        A training line after only a few steps, as the one at the end of an epoch may be, joins the line before it.
        """
        chosen = [record for record in self.records if record["kind"] == kind and name in record]
        steps = np.array([record["step"] for record in chosen], dtype=float)
        values = [record[name] if isinstance(record[name], int | float) else np.nan for record in chosen]
        series = steps, np.array(values, dtype=float)
        if kind == "train":
            series = _without_short(*series)
        return series[0] / self.steps_per_epoch, series[1]

    def best(self, kind: str = "val") -> dict[str, Any] | None:
        """The record of the highest top-1, the first of equals."""
        found = [r for r in self.records if r["kind"] == kind and isinstance(r.get("top1"), int | float)]
        return max(found, key=lambda record: record["top1"], default=None)

    @property
    def epochs(self) -> int:
        """Finished epochs: those with a validation."""
        return max((record["epoch"] + 1 for record in self.records if record["kind"] == "val"), default=0)

    @cached_property
    def timing(self) -> dict[str, float]:
        """Seconds of training, the share of them spent waiting for data, and images per second, over all log lines."""
        seconds = waiting = images = 0.0
        before = 0
        for record in self.records:
            values = [record.get(name) for name in ("step_time", "data_time", "images_per_s")]
            if record["kind"] == "train" and all(isinstance(value, int | float) for value in values):
                steps = max(record["step"] - before, 0)
                step_time, data_time, rate = values
                seconds += steps * step_time
                waiting += steps * data_time
                images += steps * step_time * rate
                before = record["step"]
        if not seconds:
            return {}
        return {"seconds": seconds, "data_share": waiting / seconds, "images_per_s": images / seconds}


def _without_short(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Training lines, with those of less than half the usual steps averaged into the line before, by their steps."""
    if len(steps) < 2:
        return steps, values
    widths = np.diff(steps, prepend=0.0)
    short = widths < 0.5 * np.median(widths)
    short[0] = False
    starts = np.flatnonzero(~short)
    ends = np.append(starts[1:], len(steps)) - 1
    weights = np.add.reduceat(widths, starts)
    return steps[ends], np.add.reduceat(values * widths, starts) / weights


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
    parts = [folder.resolve().parts for folder in folders]
    if len(folders) == 1:
        return ["/".join(parts[0][-2:])]
    shared = 0
    while len({p[shared] for p in parts if len(p) > shared}) == 1 and all(len(p) > shared + 1 for p in parts):
        shared += 1
    return ["/".join(p[shared:]) for p in parts]


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder. Raises ReportError where its metrics hold no record at all; lesser damage becomes a note."""
    path = folder / METRICS_FILE
    try:
        records, damaged = read_records(path)
    except OSError as error:
        raise ReportError(f"{path} cannot be read ({error.strerror})") from error
    if not records:
        problem = f"none of its {len(damaged)} lines can be read" if damaged else "is empty; the run has logged nothing"
        raise ReportError(f"{path}: {problem}")
    records.sort(key=lambda record: record["step"])
    run = Run(folder, name, records, None, "", None, [], None)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (" …" if len(damaged) > 5 else "")
        lines = "line is" if len(damaged) == 1 else "lines are"
        run.notes.append(f"{len(damaged)} damaged {lines} left out of {METRICS_FILE} (number {shown}).")
    _read_config(run)
    _read_environment(run)
    path = folder / PREDICTIONS_FILE
    if path.is_file():
        try:
            run.predictions = read_predictions(path)
        except ReportError as error:
            run.notes.append(f"No results by class and {run.noun}: {error}.")
    else:
        run.notes.append(
            f"No results by class and {run.noun}: there is no {PREDICTIONS_FILE}. A validation that sets a new best"
            " writes it, and so does main.py --eval."
        )
    for marker in MARKERS:
        if (folder / marker).is_file():
            run.ending = (folder / marker).read_text(encoding="utf-8", errors="replace").strip()
    if not any(record["kind"] == "val" for record in records):
        run.notes.append("No epoch has been validated yet.")
    return run


def _read_config(run: Run) -> None:
    path = run.folder / "config.yaml"
    try:
        run.config_text = path.read_text(encoding="utf-8")
        tree = yaml.safe_load(run.config_text)
        if not isinstance(tree, dict):
            raise ValueError("it holds no keys")
        run.config, ignored = config_from_tree(tree, str(path))
    except FileNotFoundError:
        run.notes.append("There is no config.yaml.")
    except (OSError, ValueError, yaml.YAMLError) as error:
        run.notes.append(f"config.yaml cannot be read: {' '.join(str(error).split())}.")
    else:
        if ignored:
            run.notes.append(f"Keys of config.yaml that are unknown here: {', '.join(ignored[:8])}.")


def _read_environment(run: Run) -> None:
    path = run.folder / ENVIRONMENT_FILE
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(starts, list) or not all(isinstance(start, dict) for start in starts):
            raise ValueError("it is not a list of starts")
        run.starts = starts
    except FileNotFoundError:
        run.notes.append(f"There is no {ENVIRONMENT_FILE}: the run does not say where it was trained.")
    except (OSError, ValueError) as error:
        run.notes.append(f"{ENVIRONMENT_FILE} cannot be read: {error}.")
