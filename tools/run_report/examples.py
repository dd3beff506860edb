"""The hardest validation images of a run as small pictures, with the attention that the model pays to each place.

torch and the data set are loaded here only, when there are predictions to show pictures of.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from tools.run_report.charts import data_uri
from tools.run_report.runs import Predictions, Run

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 160  # pixels of a thumbnail at most


class Gallery(NamedTuple):
    """Rows of the predictions, hardest first, with data: URIs of picture and overlay where they could be made."""

    rows: list[int]
    pictures: list[str]
    overlays: list[str]
    layer: str  # whose attention the overlays show
    notes: list[str]


def hardest(predictions: Predictions, count: int) -> list[int]:
    """The rows with the highest loss: wrong ones first, and before all what has no finite loss."""
    loss = np.where(np.isfinite(predictions.loss), predictions.loss, np.inf)
    order = np.lexsort((np.arange(len(loss)), -loss, predictions.correct))
    return order[:count].tolist()


def gallery(run: Run, count: int, data_path: str | None) -> Gallery:
    """Pictures of the `count` hardest images; what is not reachable is said in the notes."""
    assert run.predictions is not None
    rows, notes = hardest(run.predictions, count), []
    try:
        tensors = _load(run, rows, data_path)
    except (_Unreachable, OSError, ValueError) as error:
        notes.append(f"Without pictures: {error}.")
        return Gallery(rows, [], [], "", notes)
    pictures = [_picture(tensor) for tensor in tensors]
    try:
        layer, overlays = _overlays(run, tensors, pictures[0].size)
    except (_Unreachable, OSError, ValueError) as error:
        notes.append(f"Without attention: {error}.")
        return Gallery(rows, [thumbnail(picture) for picture in pictures], [], "", notes)
    return Gallery(rows, [thumbnail(p) for p in pictures], [thumbnail(o) for o in overlays], layer, notes)


class _Unreachable(Exception):
    """Why pictures or attention cannot be shown."""


def _load(run: Run, rows: list[int], data_path: str | None) -> "list[Tensor]":
    """The images as the model saw them, uint8 (3, H, W) each."""
    from config import image_size
    from data.builders import builder_of
    from data.sources.base import Picture, decode
    from data.sources.shards import ShardSplit
    from data.transforms import evaluation_transform

    assert run.predictions is not None
    if run.config is None:
        raise _Unreachable("config.yaml, which names the data set, is absent or damaged")
    if run.sequences:
        raise _Unreachable("the samples are sequences")
    config = run.config.clone()
    if data_path is not None:
        config.defrost()
        config.DATA.DATA_PATH = data_path
        config.freeze()
    source, transform = builder_of(config).open(config, "val"), evaluation_transform(config, image_size(config))
    loaded = []
    image: Picture
    for row in rows:
        index, file = int(run.predictions.index[row]), str(run.predictions.file[row])
        if isinstance(source, ShardSplit):
            encoded = next(source.read(range(len(source.shards)), index, index + 1))
            name, image = encoded.name, decode(encoded.data, encoded.name)
        else:
            if index >= len(source.labels):
                raise _Unreachable(f"the data set has {len(source.labels)} images, and the predictions are of more")
            name, image = source.name(index), source.load(index)
        if not name.endswith(file):
            raise _Unreachable(f"the data set is not the one evaluated: image {index} is {name}, not {file}")
        loaded.append(transform(image))
    return loaded


def thumbnail(image: Image.Image) -> str:
    """A JPEG's data: URI, with the longer side at most SIDE pixels."""
    small = image.copy()
    small.thumbnail((SIDE, SIDE))
    return data_uri(small, "JPEG", quality=82)


def _picture(pixels: "Tensor") -> Image.Image:
    """The image itself; one of few pixels enlarged, so that they stay the squares that the model sees."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    times = SIDE // max(image.size)
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST) if times > 1 else image


def _overlays(run: Run, images: "list[Tensor]", size: tuple[int, int]) -> tuple[str, list[Image.Image]]:
    """The layer's name, and each image with the attention laid over it that its places receive there."""
    from tools.checkpoints import load_model
    from tools.overlays import last_linear_layer, overlay

    path = checkpoint_of(run)
    if path is None:
        assert run.predictions is not None
        raise _Unreachable(f"there is no checkpoint {run.predictions.checkpoint} in the run folder to compute it from")
    model = load_model(path).model
    layer = last_linear_layer(model)
    return layer, [overlay(model, pixels, layer, size=size) for pixels in images]


def checkpoint_of(run: Run) -> Path | None:
    """The checkpoint that made the predictions: where they say, or of that name in the run folder."""
    assert run.predictions is not None
    named = Path(run.predictions.checkpoint)
    return next((path for path in (run.folder / named.name, named) if path.is_file()), None)
