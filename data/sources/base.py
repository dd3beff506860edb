"""What every source of samples offers, and how one image is decoded.

A source knows its samples' names and labels and decodes one image at a time.
"""

import hashlib
import io
import math
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor
from yacs.config import CfgNode

from data.findings import Report
from logger import printable

# What the extensions of images promise. Pillow's other decoders are never started, whatever a file is called: that for
# EPS runs another program.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP")
MOST_CLASSES = 1_000_000  # a label beyond is damage, and would size what is kept for each class
LARGEST_FILE = 1 << 28  # bytes of an encoded image: the pixels of the largest that Pillow takes without a warning
WIDE, TURNED = "wide", "turned"  # what `decode` notes
# By the value of a key that needs it: the key, another value of it, the module, and what pip calls it.
OPTIONAL = {
    "simplejpeg": ("DATA.DECODER", "pillow", "simplejpeg", "simplejpeg"),
    "opencv": ("AUG.BACKEND", "pillow", "cv2", "opencv-python-headless"),
    "parquet": ("DATA.FORMAT", "folder", "datasets", "datasets"),
}


class DataError(ValueError):
    """A data set that cannot be used as it is: the message names the path and how to mend it."""


class UnreadableImage(DataError):
    """A file that is no complete image."""


Picture = Image.Image | torch.Tensor  # RGB; a tensor is uint8 (3, H, W)
Decoder = Callable[[bytes, str], Picture]  # of a whole file and its name; raises UnreadableImage


class Source(Protocol):
    """Images with labels. `classes` are their names, "" for a label without images, or None where the format stores
    none; like every name they are printable (logger.printable)."""

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
    function_keys: tuple[str, ...]  # that change what a model is given, but no shape: compared when a file is loaded

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

    def inputs(
        self, config: CfgNode, device: torch.device, dtype: torch.dtype
    ) -> Callable[[torch.Tensor], torch.Tensor]:
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
        raise DataError(
            f"data set folder {path} {problem}; --data-path names the folder that holds train/ and val/ (without val/,"
            " DATA.VAL_FRACTION 0.2 divides the images)"
        )


def label_of(text: str | bytes) -> int | None:
    """The label that a map or a shard writes, from 0 to below MOST_CLASSES; None for anything else."""
    text = text.strip()
    return int(text) if text.isdigit() and text.isascii() and len(text) < len(str(MOST_CLASSES)) else None


def read_file(path: str | Path) -> bytes:
    """An image file. Raises UnreadableImage, with its name, for what cannot be read or is no regular file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever, reading a device may
            raise UnreadableImage(f"{printable(path)}: is no regular file")
        if status.st_size > LARGEST_FILE:
            raise UnreadableImage(f"{printable(path)}: {status.st_size:,} bytes, expected at most {LARGEST_FILE:,}")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UnreadableImage(f"{printable(path)}: {error.strerror}") from error


def decode(data: bytes, name: str, *, exif: bool = False, notes: list[str] | None = None) -> Image.Image:
    """Decode a whole image file to RGB. Raises UnreadableImage, with its name, if it is truncated or no image.

    Of 16-bit grey levels the upper 8 bits are taken; wider ones are refused.

    Args:
        exif: turn and mirror the image as its EXIF data say (DATA.EXIF).
        notes: WIDE is appended for 16-bit grey levels, TURNED for an image whose EXIF data were not obeyed.
    """
    noted = [] if notes is None else notes
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            file.load()
            image: Image.Image = file
            if exif:
                image = ImageOps.exif_transpose(file) if orientation(file) != 1 else file
            elif notes is not None and orientation(file) != 1:
                noted.append(TURNED)
            if file.mode.startswith(("I", "F")):
                image = _narrow(image, file)
                noted.append(WIDE)
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"{name}: not an image in any format that is read ({', '.join(FORMATS)})") from error
    except Exception as error:  # a decoder may fail in any way
        raise UnreadableImage(f"{name}: {printable(error) or type(error).__name__}") from error


def orientation(image: Image.Image) -> int:
    """How an image's EXIF data say that it is turned, 1 to 8; 1: not at all."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF data say nothing
        return 1


def _narrow(image: Image.Image, file: ImageFile.ImageFile) -> Image.Image:
    """The 16-bit grey levels of an image as 8-bit ones; Pillow would cut them at 255. Raises ValueError for wider ones.

    `file` is where it comes from, perhaps turned.
    """
    tags = getattr(file, "tag_v2", {})  # of a TIFF file
    if image.mode == "F" or (image.mode == "I" and file.format not in ("PNG", "PPM")):
        raise ValueError(
            "grey levels of 32 bits or signed ones have no range that is known; store the image with 8 or 16 bits"
        )
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))[0]
    levels = np.asarray(image) >> (bits - 8)
    inverted = tags.get(ExifTags.Base.PhotometricInterpretation) == 0  # which Pillow does for 8 bits alone
    return Image.fromarray((255 - levels if inverted else levels).astype(np.uint8))


def decode_fast(data: bytes, name: str, *, exif: bool = False) -> torch.Tensor:
    """Decode a whole image file to uint8 (3, H, W), a JPEG by simplejpeg: the same pixels as `decode`, sooner.

    What simplejpeg refuses or converts in its own way (other formats, CMYK, damaged files, huge ones) is left to
    `decode`, which also decides what counts as unreadable; so is what EXIF data turn.
    """
    import simplejpeg  # optional: decoder_for has looked for it

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        turned = exif and orientation(Image.open(io.BytesIO(data), formats=FORMATS)) != 1
        same = colours in ("YCbCr", "RGB", "Gray") and not turned
        if same and height * width <= (Image.MAX_IMAGE_PIXELS or height * width):
            return torch.from_numpy(simplejpeg.decode_jpeg(data)).permute(2, 0, 1)
    except Exception:  # refused: Pillow decides
        pass
    return pil_to_tensor(decode(data, name, exif=exif))


def require_package(value: str) -> None:
    """Raise DataError where the optional package behind this value of a key is not installed, or damaged."""
    key, other, module, package = OPTIONAL[value]
    if find_spec(module) is None:
        problem = "is not installed"
    else:
        try:
            import_module(module)
            return
        except ImportError as error:  # of a system's library that it needs
            problem = f"cannot be imported ({printable(error)})"
    raise DataError(f"{key} is {value}, which {problem}; `pip install {package}` or set {key} {other}")


def decoder_for(config: CfgNode, split: str) -> Decoder:
    """What decodes the images of a split: DATA.DECODER those of train, Pillow the others, because that is exact."""
    fast = split == "train" and config.DATA.DECODER == "simplejpeg"
    if fast:
        require_package("simplejpeg")
    return partial(decode_fast if fast else decode, exif=config.DATA.EXIF)


class SubsetSource:
    """Some images of `source`, in its order."""

    def __init__(self, source: Source, chosen: np.ndarray) -> None:
        self._source, self._chosen = source, chosen
        self.classes, self.num_classes = source.classes, source.num_classes
        self.labels = np.asarray(source.labels)[chosen]

    def name(self, index: int) -> str:
        return self._source.name(int(self._chosen[index]))

    def load(self, index: int) -> Picture:
        return self._source.load(int(self._chosen[index]))


def _by_class(source: Source) -> list[np.ndarray]:
    labels = np.asarray(source.labels)
    return [np.flatnonzero(labels == label) for label in range(source.num_classes)]


class FractionSource(SubsetSource):
    """The first images of every class of `source`, in its order: their share of the class, rounded up."""

    def __init__(self, source: Source, fraction: float) -> None:
        chosen = [members[: math.ceil(fraction * len(members))] for members in _by_class(source)]
        super().__init__(source, np.sort(np.concatenate(chosen)))


class SplitSource(SubsetSource):
    """The training or the validation images of a `source` that has no such split.

    Of each class `fraction` is for validation, rounded, and of two or more images at least one for either side. Which
    ones, their file names decide: an image added to the class or to another moves few others across.
    """

    def __init__(self, source: Source, fraction: float, *, validation: bool) -> None:
        def digest(index: int) -> bytes:
            return hashlib.blake2b(os.path.basename(source.name(index)).encode(), digest_size=8).digest()

        held = np.zeros(len(source.labels), dtype=bool)
        for members in _by_class(source):
            count = min(max(1, round(fraction * len(members))), len(members) - 1)
            held[sorted(members.tolist(), key=digest)[: max(0, count)]] = True
        if not held.any():
            raise DataError("DATA.VAL_FRACTION: every class has one image, and none is left to validate on")
        super().__init__(source, np.flatnonzero(held == validation))
