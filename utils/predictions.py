"""What a model said about every image of an evaluation, as one file of arrays: `predictions.npz`."""

import io
import os
import zipfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils import distributed
from utils.files import write_atomically

PREDICTIONS = "predictions.npz"  # in the run folder: those of the best validation so far
BEST_CLASSES = 5
NOTHING = -1  # in `top5`, for an image with logits that are not finite


@dataclass(frozen=True, eq=False)
class Predictions:
    """One row per image, in the order of the data set.

    `index` int64 (N,) position in the data set; `label` int64 (N,); `top5` int64 (N, k) the k = min(5, classes) best
    classes, best first, equal logits by class index; `probability` float32 (N, k) their softmax; `loss` float32 (N,)
    cross-entropy; `file` str (N,). An image with logits that are not finite has `top5` NOTHING: it counts as wrong.
    """

    index: np.ndarray
    label: np.ndarray
    top5: np.ndarray
    probability: np.ndarray
    loss: np.ndarray
    file: np.ndarray

    def correct(self, k: int) -> np.ndarray:
        """(N,) bool: whether the label is among the k best."""
        return (self.top5[:, :k] == self.label[:, None]).any(axis=1)


class PredictionRecorder:
    """Keeps this process's predictions on the device, without waiting for it, until they are gathered."""

    def __init__(self) -> None:
        self._rows: list[tuple[Tensor, ...]] = []
        self._positions: list[int] = []
        self._names: list[str] = []

    def update(self, logits: Tensor, labels: Tensor, positions: list[int], names: list[str]) -> None:
        """logits (B, classes), labels (B,), and where the images stand in the data set."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        finite = logits.isfinite().all(dim=1, keepdim=True)
        k = min(BEST_CLASSES, logits.shape[1])
        top5 = logits.argsort(dim=1, descending=True, stable=True)[:, :k]  # topk leaves the order of ties open
        probability = logits.softmax(dim=1).gather(1, top5).float()
        loss = F.cross_entropy(logits, labels, reduction="none").float()
        self._rows.append((labels, torch.where(finite, top5, NOTHING), probability, loss))
        self._positions += positions
        self._names += names

    def gather(self, num_images: int) -> Predictions:
        """The predictions of all processes, on every process; collective.

        Raises RuntimeError unless each of the data set's `num_images` was seen exactly once.
        """
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
    path: Path,
    predictions: Predictions,
    *,
    root: str,
    classes: tuple[str, ...] | None,
    epoch: int,
    checkpoint: str,
) -> None:
    """Write predictions atomically: `path` holds a complete file, the old or the new one.

    Args:
        root: of the data set; the names in the file are relative to it.
        classes: names by label, none where the data set has none.
        epoch: finished epochs of the model, −1 where unknown.
        checkpoint: the file that holds, or will hold, the model's weights.
    """
    prefix = os.path.join(Path(root), "") if root else ""
    files = np.array([name.removeprefix(prefix) for name in predictions.file.tolist()], dtype=np.str_)
    predictions = replace(predictions, file=files)
    arrays = {field.name: getattr(predictions, field.name) for field in fields(predictions)}
    arrays |= {"classes": np.array(classes or (), dtype=np.str_)}
    arrays |= {"epoch": np.array(epoch, dtype=np.int64), "checkpoint": np.array(checkpoint, dtype=np.str_)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:  # numpy's savez has a `file` of its own
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy")  # with a fixed date: equal predictions are equal files
            entry.compress_type = archive.compression
            with archive.open(entry, "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())
