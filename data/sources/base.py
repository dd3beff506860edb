"""What every source of samples offers, and how one image is decoded.

A source knows its samples' names and labels and decodes one image at a time.
"""

import io
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor
from yacs.config import CfgNode

from data.findings import Report


class DataError(ValueError):
    """A data set that cannot be used as it is: the message names the path and how to mend it."""


class UnreadableImage(DataError):
    """A file that is no complete image."""


Picture = Image.Image | torch.Tensor  # RGB; a tensor is uint8 (3, H, W)
Decoder = Callable[[bytes, str], Picture]  # of a whole file and its name; raises UnreadableImage


class Source(Protocol):
    """Images with labels. `classes` are their names, or None where the format stores none."""

    @property
    def labels(self) -> Sequence[int] | np.ndarray: ...

    @property
    def classes(self) -> tuple[str, ...] | None: ...

    @property
    def num_classes(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int) -> Picture:
        """RGB image; raises UnreadableImage."""
        ...


class Modality(Protocol):
    """What the samples of a data set are, images or sequences, and all that follows from it on their way to a model."""

    reads: str  # models.registry's word for a body that takes them
    noun: str  # what samples are called in messages
    function_keys: tuple[
        str, ...
    ]  # keys that change what a model is given but no shape: compared when a file is loaded

    def training_transform(self, config: CfgNode, size: tuple[int, int]) -> Callable[[Any], torch.Tensor]:
        """From what a source loads to a sample of a training batch, on the CPU."""
        ...

    def evaluation_transform(
        self, config: CfgNode, size: tuple[int, int], *, cropped: bool = False
    ) -> Callable[[Any], torch.Tensor]:
        """The same for evaluation; `cropped`: of images that are centre crops already."""
        ...

    def train_batch(
        self, config: CfgNode, num_classes: int, device: torch.device, dtype: torch.dtype
    ) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
        """From a training batch and its labels to the model's input and target, on the device."""
        ...

    def inputs(self, device: torch.device, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        """From an evaluation batch to the model's input, on the device."""
        ...

    def require(self, config: CfgNode) -> None:
        """Raise DataError where the configuration asks for what these samples cannot have."""
        ...


class DatasetBuilder(ABC):
    """What a value of DATA.DATASET names."""

    name: str
    modality: Modality
    evaluation_split = "val"  # what --eval evaluates on

    @abstractmethod
    def open(self, config: CfgNode, split: str, classes: tuple[str, ...] | None = None) -> Any:
        """The samples of train, val or test: a Source, or a ShardSplit. `classes`: of the training split.

        Raises DataError for a data set that is absent, empty or badly laid out.
        """

    @abstractmethod
    def check(self, config: CfgNode, report: Report) -> None:
        """Examine what is on the disk. Raises DataError where the configuration names no data set."""


def require_folder(path: Path) -> None:
    """Raise DataError unless `path` is a folder."""
    if not path.is_dir():
        problem = "is no folder" if path.exists() else "does not exist"
        raise DataError(f"data set folder {path} {problem}; --data-path names the folder that holds train/ and val/")


def decode(data: bytes, name: str) -> Image.Image:
    """Decode a whole image file to RGB. Raises UnreadableImage, with its name, if it is truncated or no image."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}: not an image in any format Pillow knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{name}: {error}") from error


def decode_fast(data: bytes, name: str) -> torch.Tensor:
    """Decode a whole image file to uint8 (3, H, W), a JPEG by simplejpeg: the same pixels as `decode`, sooner.

    What simplejpeg refuses or converts in its own way (other formats, CMYK, damaged files, huge ones) is left to
    `decode`, which also decides what counts as unreadable.
    """
    import simplejpeg  # optional: training_decoder has looked for it

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in ("YCbCr", "RGB", "Gray") and height * width <= (Image.MAX_IMAGE_PIXELS or height * width):
            return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except ValueError:  # refused: Pillow decides
        pass
    return pil_to_tensor(decode(data, name))


def training_decoder(name: str) -> Decoder:
    """The decoder that DATA.DECODER names. Raises DataError where it is not installed."""
    if name == "pillow":
        return decode
    if find_spec("simplejpeg") is None:
        raise DataError(
            "DATA.DECODER is simplejpeg, which is not installed; `pip install simplejpeg` or set DATA.DECODER pillow"
        )
    return decode_fast


class FractionSource:
    """The first images of every class of `source`, in its order: their share of the class, rounded up."""

    def __init__(self, source: Source, fraction: float) -> None:
        self._source = source
        self.classes, self.num_classes = source.classes, source.num_classes
        labels = np.asarray(source.labels)
        members = (np.flatnonzero(labels == label) for label in range(source.num_classes))
        self._chosen = np.sort(np.concatenate([m[: math.ceil(fraction * len(m))] for m in members]))
        self.labels = labels[self._chosen]

    def name(self, index: int) -> str:
        return self._source.name(int(self._chosen[index]))

    def load(self, index: int) -> Picture:
        return self._source.load(int(self._chosen[index]))
