"""The hardest validation images of a run as small pictures, with the attention that the model pays to each place.

torch and the data set are loaded here only, when there are predictions to show pictures of.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from tools.pages import data_uri
from tools.run_report.runs import RunRecord
from utils.predictions import Predictions

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 160  # pixels of a thumbnail at most


class Gallery(NamedTuple):
    """Rows of the predictions, hardest first, with data: URIs of the pictures of each: itself, attention, or none."""

    rows: list[int]
    pictures: list[list[str]]
    layer: str  # whose attention is shown
    note: str  # what could not be shown, and why


def hardest(predictions: Predictions, count: int) -> list[int]:
    """The rows with the highest loss: wrong ones first, and before all what has no finite loss."""
    loss = np.where(np.isfinite(predictions.loss), predictions.loss, np.inf)
    order = np.lexsort((np.arange(len(loss)), -loss, predictions.correct(1)))
    return order[:count].tolist()


def gallery(run: RunRecord, count: int, data_path: str | None) -> Gallery:
    """Pictures of the `count` hardest images, as far as they can be reached."""
    assert run.predictions is not None
    rows, groups, layer = hardest(run.predictions, count), [], ""
    note, missing = "", "pictures"
    try:
        tensors = _load(run, run.predictions, rows, data_path)
        groups.append([_picture(tensor) for tensor in tensors])
        missing = "attention"
        layer, overlays = _overlays(run.folder, run.predictions.checkpoint, tensors, groups[0][0].size)
        groups.append(overlays)
    except (OSError, ValueError) as error:
        note = f"Without {missing}: {error}."
    return Gallery(rows, [[thumbnail(group[i]) for group in groups] for i in range(len(rows))], layer, note)


def _load(run: RunRecord, predictions: Predictions, rows: list[int], data_path: str | None) -> "list[Tensor]":
    """The images as the model saw them, uint8 (3, H, W) each. Raises ValueError where they are not to be had."""
    if run.config is None:
        raise ValueError("config.yaml, which names the data set, is absent or damaged")
    if run.sequences:
        raise ValueError("the samples are sequences")
    from config import image_size
    from data.builders import builder_of
    from data.sources.base import Picture
    from data.sources.shards import ShardSplit
    from data.transforms import evaluation_transform

    config = run.config.clone()
    if data_path is not None:
        config.defrost()
        config.DATA.DATA_PATH = data_path
        config.freeze()
    source, transform = builder_of(config).open(config, "val"), evaluation_transform(config, image_size(config))
    loaded = []
    image: Picture
    for index, file in zip(predictions.index[rows].tolist(), predictions.file[rows].tolist(), strict=True):
        if isinstance(source, ShardSplit):
            encoded = next(source.read(range(len(source.shards)), index, index + 1))
            name, image = encoded.name, source.decoder(encoded.data, encoded.name)
        elif index < len(source.labels):
            name, image = source.name(index), source.load(index)
        else:
            raise ValueError(f"the data set has {len(source.labels)} images, and the predictions are of more")
        if not name.endswith(file):
            raise ValueError(f"the data set is not the one evaluated: image {index} is {name}, not {file}")
        loaded.append(transform(image))
    return loaded


def thumbnail(image: Image.Image) -> str:
    """A JPEG's data: URI, with the longer side at most SIDE pixels."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return data_uri(small, quality=82)


def _picture(pixels: "Tensor") -> Image.Image:
    """The image itself; one of few pixels enlarged, so that they stay the squares that the model sees."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    times = SIDE // max(image.size)
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST) if times > 1 else image


def _overlays(
    folder: Path, checkpoint: str, images: "list[Tensor]", size: tuple[int, int]
) -> tuple[str, list[Image.Image]]:
    """The layer's name, and each image with the attention laid over it that its places receive there.

    The checkpoint is where the predictions say, or of that name in the run folder; ValueError where it is not.
    """
    import torch

    from data.transforms import Normalise
    from tools.checkpoints import load_model
    from tools.overlays import last_linear_layer, overlay

    path = next((path for path in (folder / Path(checkpoint).name, Path(checkpoint)) if path.is_file()), None)
    if path is None:
        raise ValueError(f"there is no checkpoint {checkpoint} in the run folder to compute it from")
    loaded = load_model(path)
    layer, normalise = last_linear_layer(loaded.model), Normalise.of(loaded.config, torch.device("cpu"))
    return layer, [overlay(loaded.model, pixels, layer, size=size, normalise=normalise) for pixels in images]
