"""What a model said about every image of an evaluation, as one file of arrays: `predictions.npz`.

Readers of the file need no torch, which is imported only where predictions are recorded.
"""

import io
import os
import zipfile
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from logger import printable
from utils.files import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

PREDICTIONS = "predictions.npz"  # in the run folder: those of the best validation so far
BEST_CLASSES = 5
LARGEST = 1 << 31  # bytes of all arrays: those of millions of images have less
NOTHING = -1  # in `top5`, for an image with logits that are not finite


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row per image, in the order of the data set.

    `index` int64 (N,) position in the data set; `label` int64 (N,); `top5` int64 (N, k) the k = min(5, classes) best
    classes, best first, equal logits by class index; `probability` float32 (N, k) their softmax; `loss` float32 (N,)
    cross-entropy; `file` str (N,). An image with logits that are not finite has `top5` NOTHING: it counts as wrong.
    `classes` are names by label, `epoch` the finished epochs of the model, −1 where unknown, `checkpoint` the file that
    holds its weights.
    """

    index: np.ndarray
    label: np.ndarray
    top5: np.ndarray
    probability: np.ndarray
    loss: np.ndarray
    file: np.ndarray
    classes: tuple[str, ...] = ()
    epoch: int = -1
    checkpoint: str = ""

    def correct(self, k: int) -> np.ndarray:
        """(N,) bool: whether the label is among the k best."""
        return (self.top5[:, :k] == self.label[:, None]).any(axis=1)

    def answers(self, classes: int) -> np.ndarray:
        """(classes,) int64: how often each class was the best one."""
        return np.bincount(self.top5[self.top5[:, 0] != NOTHING, 0], minlength=classes)


NAMES = [field.name for field in fields(Predictions)]  # of the file's arrays


def _best(logits: "Tensor", k: int) -> "Tensor":
    """The classes (B, k) of the largest logits (B, C), which are finite, equal ones by class index.

    torch.topk leaves the order of ties open, and sorting all classes takes 15 to 25 times as long as k maxima, each of
    which is the first of equals.
    """
    import torch

    rest, best = logits.clone(), []
    for _ in range(k):
        best.append(rest.max(dim=1, keepdim=True).indices)
        rest.scatter_(1, best[-1], -torch.inf)
    return torch.cat(best, dim=1)


def f1_by_class(images: np.ndarray, correct: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """(C,) harmonic mean of precision and recall, from how often each class is the label, right, and the answer.

    NaN for a class that is neither a label nor an answer.
    """
    total = images + answers
    return np.divide(2.0 * correct, total, out=np.full(len(total), np.nan), where=total > 0)


class PredictionRecorder:
    """Keeps this process's predictions on the device, without waiting for it, until they are gathered."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, ...]] = []
        self._positions: list[int] = []
        self._names: list[str] = []

    def update(self, logits: "Tensor", labels: "Tensor", positions: list[int], names: list[str]) -> None:
        """logits (B, classes), labels (B,), and where the images stand in the data set."""
        import torch
        from torch.nn import functional as F

        logits = logits if logits.dtype == torch.float64 else logits.float()
        finite = logits.isfinite().all(dim=1, keepdim=True)
        k = min(BEST_CLASSES, logits.shape[1])
        top5 = _best(logits, k)
        probability = logits.softmax(dim=1).gather(1, top5).float()
        loss = F.cross_entropy(logits, labels, reduction="none").float()
        self._rows.append((labels, torch.where(finite, top5, NOTHING), probability, loss))
        self._positions += positions
        self._names += names

    def gather(self, num_images: int) -> Predictions:
        """The predictions of all processes, on every process; collective.

        Raises RuntimeError unless each of the data set's `num_images` was seen exactly once.
        """
        import torch

        from utils import distributed

        columns = [torch.cat(column).cpu().numpy() for column in zip(*self._rows, strict=True)]
        mine = (self._positions, self._names, columns)
        parts = [part for part in distributed.gather_objects(mine) if part[0]]
        index = np.array([position for positions, _, _ in parts for position in positions], dtype=np.int64)
        order = index.argsort(kind="stable")
        if not np.array_equal(index[order], np.arange(num_images)):
            raise RuntimeError(
                f"{len(index)} predictions of {len(np.unique(index))} images, the data set has {num_images}"
            )
        names = np.array([name for _, names, _ in parts for name in names])
        label, top5, probability, loss = (
            np.concatenate(columns) for columns in zip(*(p[2] for p in parts), strict=True)
        )
        return Predictions(index[order], label[order], top5[order], probability[order], loss[order], names[order])


def write_predictions(
    path: Path, predictions: Predictions, *, root: str, classes: tuple[str, ...] | None, epoch: int, checkpoint: str
) -> None:
    """Write predictions atomically: `path` holds a complete file, the old or the new one.

    Args:
        root: of the data set; the names in the file are relative to it.
        classes: names by label, none where the data set has none.
        epoch: finished epochs of the model, −1 where unknown.
        checkpoint: the file that holds, or will hold, the model's weights.
    """
    prefix = printable(os.path.join(Path(root), "")) if root else ""
    files = np.array([name.removeprefix(prefix) for name in predictions.file.tolist()], dtype=np.str_)
    arrays = vars(predictions) | {
        "file": files,
        "classes": np.array(classes or (), dtype=np.str_),
        "epoch": np.array(epoch, dtype=np.int64),
        "checkpoint": np.array(checkpoint, dtype=np.str_),
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:  # numpy's savez has a `file` of its own
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date: equal predictions are equal files
            entry.compress_type = archive.compression
            with archive.open(entry, "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def read_predictions(path: Path) -> Predictions:
    """Read what `write_predictions` wrote; without names in the file, `classes` are the labels' numbers.

    Raises FileNotFoundError, and ValueError where the file is damaged or its arrays do not belong together.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            if sum(entry.file_size for entry in file.zip.infolist()) > LARGEST:
                raise ValueError(f"its arrays have more than {LARGEST:,} bytes")
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    if absent := [name for name in NAMES if name not in arrays]:
        raise ValueError(f"{path} lacks the arrays {', '.join(absent)}; expected {', '.join(NAMES)}")
    label, top5 = arrays["label"], arrays["top5"]
    if label.ndim != 1 or not len(label) or top5.ndim != 2 or not top5.shape[1]:
        raise ValueError(f"{path}: label {label.shape} and top5 {top5.shape}, expected (N,) and (N, k), N and k > 0")
    N = len(label)
    shapes = {"index": (N,), "top5": (N, top5.shape[1]), "probability": top5.shape, "loss": (N,), "file": (N,)}
    shapes |= {"epoch": (), "checkpoint": ()}
    if wrong := [
        f"{name} {arrays[name].shape} instead of {s}" for name, s in shapes.items() if arrays[name].shape != s
    ]:
        raise ValueError(f"{path}: arrays of other shapes than its {N} labels ask for: {', '.join(wrong)}")
    kinds = {"index": "iu", "label": "iu", "top5": "iu", "probability": "f", "loss": "f", "classes": "U", "epoch": "iu"}
    if wrong := [f"{name} {arrays[name].dtype}" for name, kind in kinds.items() if arrays[name].dtype.kind not in kind]:
        raise ValueError(f"{path}: arrays of other types than a validation writes: {', '.join(wrong)}")
    highest = int(max(label.max(), top5.max()))
    classes = tuple(map(printable, arrays["classes"].tolist())) or tuple(str(number) for number in range(highest + 1))
    if label.min() < 0 or top5.min() < NOTHING or highest >= len(classes):
        raise ValueError(f"{path}: class {highest} or a negative one, expected 0 to {len(classes) - 1}")
    arrays |= {"classes": classes, "epoch": int(arrays["epoch"]), "checkpoint": str(arrays["checkpoint"])}
    return Predictions(**{name: arrays[name] for name in NAMES})
