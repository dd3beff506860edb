"""One benchmark evaluated, scored as its authors do, and written down: what `--eval` reports."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from yacs.config import CfgNode

from config import KEYS, Plan, evaluation_config, image_size, make_plan, value_of
from data.builders import builder_of
from data.imagenet import class_words, imagenet_ids
from data.loaders import Loaders, build_loaders
from data.sources.base import DataError
from data.test_sets import (
    ALEXNET_ERRORS,
    PUBLISHED_IMAGES,
    SEVERITIES,
    TITLES,
    EvaluationSet,
    image_number,
    open_test_set,
    output_ids,
    own_images,
)
from engine.evaluation import EvaluatedModel, evaluate
from engine.state import check_classes, configuration_in, differing_function, stored_classes
from engine.training import place
from logger import get_logger
from models import build_model
from models.files import CheckpointError, load_checkpoint, num_classes_of, weights_of
from models.loading import load_resized, load_weights
from utils import distributed
from utils.checkpoints.naming import BEST_FILE
from utils.files import file_digest, write_atomically
from utils.metrics import Accuracy
from utils.precision import autocast_dtype
from utils.predictions import PREDICTIONS, PredictionRecorder, Predictions, f1_by_class, write_predictions

PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")


class PartResult(NamedTuple):
    """`per_class` int64 (classes, 4): images, correct at 1, correct at 5, how often the class was the answer."""

    name: str
    accuracy: Accuracy
    per_class: np.ndarray


@dataclass(frozen=True)
class RealScore:
    """Accuracy with the ReaL labels: a prediction is right where it is one of the image's labels.

    Beyer et al., "Are we done with ImageNet?", arXiv 2006.07159. Images without labels do not count. There is no top-5:
    an image may have more than one right label, so that five guesses mean something else on every image.
    """

    images: int
    correct: int
    unlabelled: int
    per_class: np.ndarray  # int64 (classes, 2), by the original label: images, correct

    @property
    def accuracy(self) -> float:
        """Percent."""
        return 100 * self.correct / self.images


@dataclass(frozen=True)
class CorruptionScore:
    """Errors under corruption in percent: Hendrycks & Dietterich, arXiv 1903.12261.

    `errors`: the mean error over the five severities, of every corruption that has all five. `mean_error` is the mean
    of the 15 errors that count, `mce` that of their ratios to AlexNet's; both None unless all 75 parts are there.
    """

    errors: dict[str, float]
    mean_error: float | None
    mce: float | None


@dataclass(frozen=True)
class Evaluation:
    """The result of one set of weights on one benchmark.

    `accuracy` is over all images, of ImageNet-C those of the 15 corruptions of mCE; `remarks` say in what the data are
    not the published benchmark; `predictions` are None for ImageNet-C, whose 75 parts have one each.
    """

    benchmark: EvaluationSet
    parts: tuple[PartResult, ...]
    accuracy: Accuracy
    per_class: np.ndarray
    predictions: Predictions | None
    remarks: tuple[str, ...]
    real: RealScore | None = None
    corruption: CorruptionScore | None = None

    @property
    def macro_f1(self) -> float:
        """Percent: the mean F1 of the classes that have images or were an answer."""
        return 100 * float(np.nanmean(f1_by_class(*self.per_class.T[[0, 1, 3]])))

    def __str__(self) -> str:
        if self.real:
            return (
                f"{self.real.images} images with ReaL labels, accuracy {self.real.accuracy:.3f} %; with the original"
                f" labels {self.accuracy}"
            )
        if self.corruption:
            mce, mean = self.corruption.mce, self.corruption.mean_error
            scores = "no mCE" if mce is None else f"mCE {mce:.3f} %, mean error {mean:.3f} %"
            return f"{scores}; {self.accuracy}"
        return f"{self.accuracy}, macro-F1 {self.macro_f1:.3f} %"


def run_evaluation(config: CfgNode, plan: Plan, device: torch.device) -> Accuracy:
    """Evaluate exactly the --resume file: the weights that MODEL.WEIGHTS names, by default all that it holds.

    Returns the accuracy of the first of them, the model's where they are evaluated.
    """
    logger, path = get_logger(), config.MODEL.RESUME
    checkpoint = load_checkpoint(path)
    if differing := differing_function(checkpoint, config, builder_of(config).modality, path):
        raise CheckpointError("; ".join(differing))
    _log_other_transform(checkpoint, config, path)
    sized = evaluation_config(config)
    benchmark = build_evaluation_set(sized, make_plan(sized, plan.world_size), checkpoint, path)
    model = build_model(sized, num_classes_of(checkpoint, path, config))
    amp_dtype = autocast_dtype(config.AMP_DTYPE, device) if config.TEST.AMP else None
    precision = str(amp_dtype or torch.float32).removeprefix("torch.")
    log_reference(benchmark)
    digest, epoch = file_digest(path), checkpoint.get("epoch")
    results = []
    for kind, weights in weights_of(checkpoint, config.MODEL.WEIGHTS, path).items():
        if image_size(sized) != image_size(config):
            load_resized(model, weights, config, path)
        else:
            with _naming_the_size(checkpoint, config, path):
                load_weights(model, weights, path)
        evaluated = EvaluatedModel(place(model, device), benchmark.outputs, config.TEST.FLIP)
        result = evaluate_set(benchmark, evaluated, device, amp_dtype)
        title = {"model": "", "ema": "EMA weights of "}[kind]
        logger.info("evaluated %s%s (sha256 %s), %s: %s", title, path, digest, precision, result)
        if distributed.rank() == 0:
            subject = Subject(path, digest, kind, epoch if isinstance(epoch, int) else -1, precision)
            logger.info("written: %s", write_evaluation(plan.folder, result, subject, sized))
        results.append(result.accuracy)
    return results[0]


def _log_other_transform(checkpoint: dict[str, Any], config: CfgNode, source: str) -> None:
    """A line where the file was validated on images that were resized and cropped in another way."""
    stored = configuration_in(checkpoint, source)
    keys = ("TEST.CROP", "TEST.CROP_RATIO", "TEST.RESIZE", "DATA.INTERPOLATION")
    other = [] if stored is None else [key for key in keys if value_of(stored, key) != value_of(config, key)]
    if other:
        pairs = "; ".join(f"{key} {value_of(stored, key)}, here {value_of(config, key)}" for key in other)
        get_logger().warning("%s was validated on images made in another way: %s", source, pairs)


@contextmanager
def _naming_the_size(checkpoint: dict[str, Any], config: CfgNode, source: str) -> Iterator[None]:
    """Weights that do not fit because the file was trained at another size: the message tells the key for that."""
    try:
        yield
    except CheckpointError as error:
        stored = configuration_in(checkpoint, source)
        if stored is None or image_size(stored) == image_size(config):
            raise
        theirs, ours = stored.DATA.IMG_SIZE, config.DATA.IMG_SIZE
        raise CheckpointError(
            f"{error}\n  it was trained at {theirs} pixels: --opts DATA.IMG_SIZE {theirs} TEST.IMG_SIZE {ours}"
            f" evaluates it at {ours}"
        ) from None


def log_reference(data: Loaders | EvaluationSet) -> None:
    """What validation or evaluation is on, and what answers without a model score there, where the data say so."""
    if data.description:
        scores = ", ".join(f"{name} {100 * accuracy:.1f} %" for name, accuracy in (data.reference or {}).items())
        get_logger().info("evaluated on %s%s", data.description, f"; for comparison: {scores}" if scores else "")


def build_evaluation_set(config: CfgNode, plan: Plan, checkpoint: dict[str, Any], source: str) -> EvaluationSet:
    """What TEST.BENCHMARK names, for the classes of a checkpoint. Raises CheckpointError or DataError."""
    names = checkpoint.get("classes")
    if config.TEST.BENCHMARK in ("val", "real"):
        outputs = num_classes_of(checkpoint, source, config)
        nameless = imagenet_ids() if outputs == len(imagenet_ids()) else ()
        loaders = build_loaders(config, plan, train=False, trained_on=stored_classes(checkpoint) or nameless)
        check_classes(checkpoint, config, loaders, source)
        return own_images(config, loaders, names, source)
    return open_test_set(config, plan, output_ids(names, num_classes_of(checkpoint, source, config), source), source)


def evaluate_set(
    benchmark: EvaluationSet, model: nn.Module, device: torch.device, amp_dtype: torch.dtype | None
) -> Evaluation:
    """Evaluate a model whose outputs are the benchmark's classes on every part of it; collective.

    Raises DataError where the images are not those that the benchmark is about.
    """
    parts, predictions = [], None
    for part in benchmark.parts:
        batches = part.open()
        recorder = PredictionRecorder()
        accuracy = evaluate(model, batches, device, amp_dtype, recorder=recorder)
        predictions = recorder.gather(batches.num_images)
        parts.append(PartResult(part.name, accuracy, class_counts(predictions, benchmark.num_classes)))
        if part.name:
            get_logger().info("%s: %s", part.name, accuracy)
    assert predictions is not None, "a benchmark has a part"
    counted = [part for part in parts if part.name.partition("/")[0] in ("", *ALEXNET_ERRORS)] or parts
    evaluation = Evaluation(
        benchmark,
        tuple(parts),
        accuracy=pooled([part.accuracy for part in counted]),
        per_class=np.sum([part.per_class for part in counted], axis=0),
        predictions=None if benchmark.name == "c" else predictions,
        remarks=tuple(remarks(benchmark, parts)),
        real=real_score(benchmark, predictions) if benchmark.real_labels else None,
        corruption=corruption_score({part.name: part.accuracy for part in parts}) if benchmark.name == "c" else None,
    )
    for remark in evaluation.remarks:
        get_logger().warning("%s: %s", TITLES[benchmark.name], remark)
    return evaluation


def pooled(accuracies: Sequence[Accuracy]) -> Accuracy:
    """The accuracy over the images of all of them."""
    images, correct1, correct5, non_finite = (
        sum(getattr(a, field) for a in accuracies) for field in ("images", "correct1", "correct5", "non_finite")
    )
    loss = sum(a.loss * a.images for a in accuracies) / images if images else float("nan")
    return Accuracy(images, correct1, correct5, non_finite, loss, accuracies[0].classes)


def class_counts(predictions: Predictions, num_classes: int) -> np.ndarray:
    """int64 (classes, 4): each class's images, how many of them are right at 1 and at 5, and those taken for it."""
    masks = (slice(None), predictions.correct(1), predictions.correct(5))
    counts = [np.bincount(predictions.label[mask], minlength=num_classes) for mask in masks]
    return np.stack([*counts, predictions.answers(num_classes)], axis=1)


def real_score(benchmark: EvaluationSet, predictions: Predictions) -> RealScore:
    """Score with the ReaL labels, by the numbers in the images' names. Raises DataError for other names or numbers."""
    assert benchmark.real_labels is not None
    numbers = [image_number(name) for name in predictions.file.tolist()]
    if (highest := max(numbers)) > len(benchmark.real_labels):
        raise DataError(
            f"validation image {highest} has no entry among the {len(benchmark.real_labels)} ReaL labels;"
            " TEST.REAL_LABELS names another file"
        )
    labels = [benchmark.real_labels[number - 1] for number in numbers]
    scored = np.array([bool(own) for own in labels])
    correct = np.array([best in own for best, own in zip(predictions.top5[:, 0].tolist(), labels, strict=True)])
    # NOTHING is the class of an image with non-finite logits, and of labels that the model does not know
    correct &= predictions.top5[:, 0] >= 0
    if not scored.any():
        raise DataError("none of the validation images has a ReaL label; TEST.REAL_LABELS names another file")
    per_class = [np.bincount(predictions.label[mask], minlength=benchmark.num_classes) for mask in (scored, correct)]
    return RealScore(int(scored.sum()), int(correct.sum()), int((~scored).sum()), np.stack(per_class, axis=1))


def corruption_score(parts: dict[str, Accuracy]) -> CorruptionScore:
    """Mean errors and mCE from the accuracy of each `corruption/severity`."""
    errors = {}
    for corruption in dict.fromkeys(name.partition("/")[0] for name in parts):
        severities = [parts.get(f"{corruption}/{severity}") for severity in SEVERITIES]
        if all(severities):
            errors[corruption] = sum(100 - a.top1 for a in severities if a) / len(SEVERITIES)
    if not errors.keys() >= ALEXNET_ERRORS.keys():
        return CorruptionScore(errors, None, None)
    ratios = [100 * errors[corruption] / alexnet for corruption, alexnet in ALEXNET_ERRORS.items()]
    mean_error = sum(errors[corruption] for corruption in ALEXNET_ERRORS) / len(ALEXNET_ERRORS)
    return CorruptionScore(errors, mean_error, sum(ratios) / len(ratios))


def remarks(benchmark: EvaluationSet, parts: Sequence[PartResult]) -> list[str]:
    """In what these images are not the benchmark as it is published; of own data, which classes have none."""
    if benchmark.name == "val":
        return _absent_classes(benchmark, parts) if benchmark.classes else []
    found = []
    if benchmark.missing:
        shown = ", ".join(benchmark.missing[:5]) + (", …" if len(benchmark.missing) > 5 else "")
        found.append(f"{len(benchmark.missing)} of the 75 parts are missing ({shown}): there is no mCE")
    expected = PUBLISHED_IMAGES[benchmark.name]
    other = [part for part in parts if part.accuracy.images != expected]
    if other:
        where = f" in {len(other)} parts, the first {other[0].name}" if other[0].name else ""
        found.append(f"{other[0].accuracy.images} images instead of the published {expected}{where}")
    return found + _absent_classes(benchmark, parts)


def _absent_classes(benchmark: EvaluationSet, parts: Sequence[PartResult]) -> list[str]:
    """Which classes the first part without images of some lacks."""
    assert benchmark.classes is not None
    for part in parts:
        empty = [name for name, row in zip(benchmark.classes, part.per_class, strict=True) if row[0] == 0]
        if empty:
            where = f" in {part.name}" if part.name else ""
            return [f"{len(empty)} of {len(benchmark.classes)} classes have no image{where} ({', '.join(empty[:5])})"]
    return []


# -- Files


class Subject(NamedTuple):
    """What was evaluated: a checkpoint's weights (`model` or `ema`), after how many epochs (−1: unknown), and how."""

    checkpoint: str
    sha256: str
    weights: str
    epoch: int
    precision: str


def write_evaluation(folder: Path, evaluation: Evaluation, subject: Subject, config: CfgNode) -> Path:
    """Write `eval_<benchmark>.json`, `…_per_class.csv` and, but for ImageNet-C, `…_predictions.npz`; atomically, each.

    Those of the averaged weights are called `eval_<benchmark>_ema`, a data set's own test split `test`. Returns the
    JSON file's path.
    """
    benchmark = evaluation.benchmark
    name = f"eval_{benchmark.split}" + ("" if subject.weights == "model" else f"_{subject.weights}")
    path = folder / f"{name}.json"
    if evaluation.predictions:
        write_predictions(
            folder / f"{name}_predictions.npz",
            evaluation.predictions,
            root=config.DATA.DATA_PATH,
            classes=benchmark.classes,
            epoch=subject.epoch,
            checkpoint=subject.checkpoint,
        )
    write_atomically(folder / f"{name}_per_class.csv", per_class_table(evaluation).encode())
    write_atomically(path, (json.dumps(summary(evaluation, subject, config), indent=1) + "\n").encode())
    return path


def summary(evaluation: Evaluation, subject: Subject, config: CfgNode) -> dict[str, Any]:
    """The content of the JSON file: counts are integers, accuracies and errors percent."""
    benchmark = evaluation.benchmark
    size = list(image_size(config))
    keys = [key for key in KEYS if key.startswith(("MODEL.", "TEST."))]
    keys += ["DATA.DATASET", "DATA.DATA_PATH", "DATA.IMG_SIZE", "DATA.INTERPOLATION"]
    result: dict[str, Any] = {
        "benchmark": benchmark.split,
        "title": TITLES[benchmark.name],
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "subject": subject._asdict(),
        "classes": benchmark.num_classes,
        "restricted": benchmark.outputs is not None,
        "image_size": size,
        "flip": config.TEST.FLIP,
        "as_published": None if benchmark.name == "val" else not evaluation.remarks,
        "remarks": list(evaluation.remarks),
        "result": _numbers(evaluation.accuracy) | {"macro_f1": evaluation.macro_f1},
    }
    if benchmark.description:
        result |= {"title": benchmark.description, "reference": {k: 100 * v for k, v in benchmark.reference.items()}}
    if real := evaluation.real:
        result["original_labels"] = result["result"]
        result["result"] = {
            "images": real.images,
            "correct1": real.correct,
            "top1": real.accuracy,
            "unlabelled": real.unlabelled,
        }
    if corruption := evaluation.corruption:
        result["result"] |= {"mce": corruption.mce, "mean_error": corruption.mean_error}
        result["corruptions"] = _corruption_table(evaluation, corruption)
    result["config"] = {key: value_of(config, key) for key in keys}
    result["versions"] = {"python": python_version(), **{package: version(package) for package in PACKAGES}}
    return result


def _numbers(accuracy: Accuracy) -> dict[str, Any]:
    loss = accuracy.loss if np.isfinite(accuracy.loss) else None  # JSON has no NaN
    counts = {name: value for name, value in asdict(accuracy).items() if name != "classes"}
    return counts | {"loss": loss, "top1": accuracy.top1, "top5": accuracy.top5}


def _corruption_table(evaluation: Evaluation, score: CorruptionScore) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for part in evaluation.parts:
        corruption, _, severity = part.name.partition("/")
        row = table.setdefault(
            corruption,
            {
                "error": score.errors.get(corruption),
                "alexnet_error": ALEXNET_ERRORS.get(corruption),
                "in_mce": corruption in ALEXNET_ERRORS,
                "severities": {},
            },
        )
        row["severities"][severity] = _numbers(part.accuracy)
    return table


def per_class_table(evaluation: Evaluation) -> str:
    """CSV: a row per class. With ReaL labels, the original label's class, n its scored images, top-5 and F1 empty."""
    benchmark, words = evaluation.benchmark, class_words()
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["label", "class", "name", "n", "correct_top1", "correct_top5", "accuracy", "f1"])
    counts = evaluation.real.per_class if evaluation.real else evaluation.per_class
    f1 = None if evaluation.real else f1_by_class(*counts.T[[0, 1, 3]])
    for label, (images, correct1, *others) in enumerate(counts.tolist()):
        name = benchmark.classes[label] if benchmark.classes else ""
        accuracy = f"{100 * correct1 / images:.3f}" if images else ""
        score = "" if f1 is None or np.isnan(f1[label]) else f"{100 * f1[label]:.3f}"
        rows.writerow([label, name, words.get(name, name), images, correct1, *(others[:1] or [""]), accuracy, score])
    return text.getvalue()


def best_predictions(
    config: CfgNode, folder: Path, loaders: Loaders, recorder: PredictionRecorder, epoch: int
) -> Mapping[str, Callable[[], None]]:
    """The file in the run's folder, and how to write it, of the predictions after `epoch` epochs; collective."""
    write = partial(
        write_predictions,
        folder / PREDICTIONS,
        recorder.gather(loaders.val.num_images),
        root=config.DATA.DATA_PATH,
        classes=loaders.classes,
        epoch=epoch,
        checkpoint=BEST_FILE,
    )
    return {PREDICTIONS: write}
