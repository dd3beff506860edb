"""Where images come from: an image folder, a zip with a map file, scikit-learn's digits, or Fashion-MNIST.

A source knows its samples' names and labels and decodes one image at a time. `TrainDataset` and `EvalDataset` add the
transform, the reproducible randomness of a sample, and what happens to an unreadable file.
"""

import gzip
import io
import math
import os
import random
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset, get_worker_info
from torchvision.datasets import FashionMNIST
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms.functional import pil_to_tensor

from data.index import PackedNames, ZipError, ZipIndex
from data.samplers import Draw


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


# ---------------------------------------------------------------------------------------------------------------------
# Image folder
# ---------------------------------------------------------------------------------------------------------------------


class FolderSource:
    """`root/<class>/…/image`: one class per folder.

    `classes` fixes the order of the labels (the training set's for validation); by default the folders' names, sorted.
    Raises DataError where the folder is absent, empty, has no class folders, or folders that are no known class.
    """

    def __init__(self, root: Path, classes: tuple[str, ...] | None = None, decoder: Decoder = decode) -> None:
        require_folder(root)
        # names that start with a dot are tools' folders, such as .ipynb_checkpoints
        folders = tuple(sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith(".")))
        if not folders:
            loose = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in os.scandir(root))
            if loose:
                raise DataError(
                    f"{root} holds {loose} images but no class folders; expected {root}/<class>/<image>: move every"
                    " image into a folder named after its class (tools.prepare_imagenet does that for ImageNet's val/)"
                )
            raise DataError(f"{root} is empty; expected {root}/<class>/<image>")
        if classes is not None and (strange := sorted(set(folders) - set(classes))):
            raise DataError(
                f"{root} has {len(strange)} class folders that the training set lacks: {', '.join(strange[:5])}"
            )
        self.classes = classes or folders
        self.num_classes = len(self.classes)
        index = {name: i for i, name in enumerate(self.classes)}
        present = {name: index[name] for name in folders}
        prefix, labels = os.path.join(root, ""), array("i")

        def files() -> Iterator[bytes]:
            for folder in folders:  # one by one, so that only one folder's names are Python objects at a time
                one_class = {folder: index[folder]}
                for path, label in make_dataset(str(root), one_class, extensions=IMG_EXTENSIONS, allow_empty=True):
                    labels.append(label)
                    yield os.fsencode(path.removeprefix(prefix))

        self._prefix, self._decoder = prefix, decoder
        self._names = PackedNames(files())
        self.labels = np.array(labels)
        if empty := sorted(set(present.values()).difference(np.unique(self.labels).tolist())):
            names = ", ".join(self.classes[i] for i in empty[:5])
            raise DataError(f"{root}: {len(empty)} class folders hold no image ({names}); fill or remove them")

    def name(self, index: int) -> str:
        return self._prefix + os.fsdecode(self._names[index])

    def load(self, index: int) -> Picture:
        name = self.name(index)
        try:
            data = Path(name).read_bytes()
        except OSError as error:
            raise UnreadableImage(f"{name}: {error.strerror}") from error
        return self._decoder(data, name)


# ---------------------------------------------------------------------------------------------------------------------
# Zip with a map file
# ---------------------------------------------------------------------------------------------------------------------


class ZipSource:
    """`<split>.zip` with `<split>_map.txt`, whose lines are `path in the zip<TAB>label`.

    Class names are the images' folders where every label has exactly one of its own, else None. Each process opens
    the zip once. Raises DataError for a missing file, a malformed map line, or a member the zip does not have.
    """

    def __init__(self, zip_path: Path, map_path: Path, decoder: Decoder = decode) -> None:
        for path in (zip_path, map_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist; --zip needs train.zip, train_map.txt, val.zip and val_map.txt")
        self.path, self._decoder = zip_path, decoder
        self._handle: tuple[int, BinaryIO] | None = None
        try:
            index = ZipIndex.of(zip_path)
        except (ZipError, OSError) as error:
            raise DataError(f"{zip_path} is not a readable zip file: {error}") from error
        positions, labels = array("q"), array("i")
        with map_path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                line = line.removesuffix("\n")
                name, tab, label = line.rpartition("\t")
                if not tab or not label.strip().isdecimal():
                    raise DataError(f"{map_path} line {number}: expected `path<TAB>label`, received {line!r}")
                position = index.find(name.encode())
                if position is None:
                    raise DataError(f"{map_path} line {number} names {name!r}, which {zip_path} does not contain")
                positions.append(position)
                labels.append(int(label))
        if not labels:
            raise DataError(f"{map_path} is empty; expected lines `path<TAB>label`")
        self._index = index.take(positions)
        self.labels = np.array(labels)
        self.num_classes = int(self.labels.max()) + 1
        self.classes = self._class_names()

    def _class_names(self) -> tuple[str, ...] | None:
        folders: list[set[bytes]] = [set() for _ in range(self.num_classes)]
        for name, label in zip(self._index.names, self.labels, strict=True):
            folders[label].add(name.rpartition(b"/")[0].rpartition(b"/")[2])
        names = [next(iter(found)).decode() for found in folders if len(found) == 1]
        unique = len(names) == self.num_classes == len(set(names)) and all(names)
        return tuple(names) if unique else None

    @property
    def index_bytes(self) -> int:
        """Memory that names, labels and places of all images take together."""
        return self._index.nbytes + self.labels.nbytes

    def name(self, index: int) -> str:
        return f"{self.path}:{self._index.names[index].decode()}"

    def load(self, index: int) -> Picture:
        if self._handle is None or self._handle[0] != os.getpid():  # each forked worker has a handle of its own
            self._handle = (os.getpid(), self.path.open("rb", buffering=0))
        try:
            data = self._index.read(self._handle[1].fileno(), index)
        except (OSError, ZipError, zlib.error) as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        return self._decoder(data, self.name(index))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}


def warm_page_cache(path: Path, *, share: int = 0, shares: int = 1) -> None:
    """Read one of `shares` equal parts of a file once, so that later reads come from memory."""
    size = path.stat().st_size
    start, end = size * share // shares, size * (share + 1) // shares
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end and (block := file.read(min(1 << 24, end - start))):
            start += len(block)


# ---------------------------------------------------------------------------------------------------------------------
# Bundled digits
# ---------------------------------------------------------------------------------------------------------------------


class DigitsSource:
    """The 1,797 handwritten digits of scikit-learn (UCI optical recognition, 8×8, 17 grey levels).

    A fixed stratified split: of each class's images, in the file's order, every fifth is validation. Images are
    enlarged bicubically to `size` (height, width).
    """

    classes: tuple[str, ...] | None = tuple(str(digit) for digit in range(10))
    num_classes = 10

    def __init__(self, split: str, size: tuple[int, int]) -> None:
        from sklearn.datasets import load_digits  # slow to import, and only this source needs it

        digits = load_digits()
        position = np.zeros(len(digits.target), dtype=int)
        for digit in range(10):
            members = digits.target == digit
            position[members] = np.arange(members.sum())
        chosen = np.flatnonzero((position % 5 == 4) == (split == "val"))
        self.labels = [int(label) for label in digits.target[chosen]]
        grey = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._images = [
            Image.fromarray(image).resize(size[::-1], Image.Resampling.BICUBIC).convert("RGB") for image in grey
        ]
        self._names = [f"digits/{i}" for i in chosen]

    def name(self, index: int) -> str:
        return self._names[index]

    def load(self, index: int) -> Image.Image:
        return self._images[index].copy()


# ---------------------------------------------------------------------------------------------------------------------
# Fashion-MNIST
# ---------------------------------------------------------------------------------------------------------------------

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist installs it
FASHION_MNIST_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "val": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class FashionMnistSource:
    """Fashion-MNIST (Xiao et al. 2017, arXiv 1708.07747): grey 28×28 pictures of ten kinds of clothing.

    60,000 are the training set, the published test set of 10,000 is the validation set. Images are enlarged bicubically
    to `size` (height, width).

    Raises DataError where `root`, or torchvision's FashionMNIST/raw in it, lacks the idx files, plain or with .gz, or
    where one of them is damaged.
    """

    classes: tuple[str, ...] | None = tuple(FashionMNIST.classes)
    num_classes = 10

    def __init__(self, root: Path, split: str, size: tuple[int, int]) -> None:
        images, labels = (self._find(root, name) for name in FASHION_MNIST_FILES[split])
        self._images, self.labels = read_idx(images, 3), read_idx(labels, 1)
        if len(self._images) != len(self.labels):
            raise DataError(f"{images} holds {len(self._images)} images, {labels} {len(self.labels)} labels")
        if self.labels.max(initial=0) >= self.num_classes:
            raise DataError(f"{labels} holds the label {self.labels.max()}, expected 0 to {self.num_classes - 1}")
        self._split, self._size = split, size

    @staticmethod
    def _find(root: Path, name: str) -> Path:
        for folder in (root, root / "FashionMNIST" / "raw"):
            for path in (folder / f"{name}.gz", folder / name):
                if path.is_file():
                    return path
        names = ", ".join(f"{name}.gz" for pair in FASHION_MNIST_FILES.values() for name in pair)
        raise DataError(
            f"{root} holds no {name}.gz: on Debian and Ubuntu `apt install dataset-fashion-mnist` puts Fashion-MNIST"
            f" into {FASHION_MNIST}; elsewhere --data-path names a folder with its four files {names}"
        )

    def name(self, index: int) -> str:
        return f"fashion_mnist/{self._split}/{index}"

    def load(self, index: int) -> Image.Image:
        image = Image.fromarray(self._images[index])
        return image.resize(self._size[::-1], Image.Resampling.BICUBIC).convert("RGB")


def read_idx(path: Path, axes: int) -> np.ndarray:
    """The bytes of an idx file, the format of MNIST and its relatives, or of one in gzip.

    Raises DataError unless it is complete, of unsigned bytes, and has that many axes.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if data[:4] != bytes([0, 0, 8, axes]):  # 8: unsigned bytes
        raise DataError(f"{path} is no idx file of unsigned bytes with {axes} axes: it starts with {data[:4].hex(' ')}")
    shape = np.frombuffer(data, dtype=">u4", count=min(axes, (len(data) - 4) // 4), offset=4).tolist()
    if len(shape) < axes or len(data) != 4 + 4 * axes + math.prod(shape):
        raise DataError(f"{path} is damaged: {len(data)} bytes, which do not hold what its header says, {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


# ---------------------------------------------------------------------------------------------------------------------
# A part of a source
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Data sets
# ---------------------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    image: torch.Tensor  # uint8 (3, H, W)
    label: int
    unreadable: tuple[str, ...] = ()  # what was skipped to find it
    position: int = -1  # in the data set; of evaluation only, and so is the name
    name: str = ""


class EvalDataset(Dataset[Sample]):
    """Every image as it is; an unreadable one raises, because a count over fewer images is not the result."""

    def __init__(self, source: Source, transform: Callable[[Picture], torch.Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.transform(self.source.load(index)), int(self.source.labels[index])
        return Sample(image, label, position=index, name=self.source.name(index))


class TrainDataset(Dataset[Sample]):
    """Augmented images. A sample's randomness is a function of (seed, epoch, index) alone, whichever worker draws it.

    An unreadable image is replaced by the next readable one and reported in `Sample.unreadable`; more than
    `max_unreadable` in a row raise.
    """

    def __init__(
        self, source: Source, transform: Callable[[Picture], torch.Tensor], *, seed: int, max_unreadable: int
    ) -> None:
        self.source, self.transform, self.seed, self.max_unreadable = source, transform, seed, max_unreadable

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, draw: Draw) -> Sample:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Draw]) -> list[Sample]:
        """The samples of a batch, as DataLoader asks for them: the main process's generators are kept once for all."""
        with SampleRandomness(self.seed) as randomness:
            return [self._sample(draw, randomness) for draw in draws]

    def _sample(self, draw: Draw, randomness: "SampleRandomness") -> Sample:
        unreadable: list[str] = []
        index = draw.position
        while True:
            try:
                image = self.source.load(index)
                break
            except UnreadableImage as error:
                unreadable.append(str(error))
                if len(unreadable) > self.max_unreadable:
                    raise DataError(
                        too_many_unreadable(len(unreadable), len(self), self.max_unreadable, unreadable)
                    ) from error
                index = (index + 1) % len(self)
        randomness.start(draw)
        return Sample(self.transform(image), int(self.source.labels[index]), tuple(unreadable))


def too_many_unreadable(count: int, size: int, allowed: int, names: Iterable[str]) -> str:
    return (
        f"{count} of {size} training images are unreadable, {allowed} are allowed (DATA.MAX_UNREADABLE); for example"
        f" {next(iter(names), 'on another process')}"
    )


class SampleRandomness:
    """Python's, NumPy's and torch's generators seeded for one draw after another (or the one that is given).

    At the end the main process gets its own states back; a worker has no use for them.
    """

    def __init__(self, seed: int, draw: Draw | None = None) -> None:
        self.seed, self.draw = seed, draw

    def __enter__(self) -> "SampleRandomness":
        self.states = None
        if get_worker_info() is None:
            self.states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        if self.draw is not None:
            self.start(self.draw)
        return self

    def start(self, draw: Draw) -> None:
        """Seed for `draw`."""
        words = np.random.SeedSequence((self.seed, draw.epoch, draw.position)).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]))

    def __exit__(self, *exception: object) -> None:
        if self.states is not None:
            random.setstate(self.states[0])
            np.random.set_state(self.states[1])
            torch.set_rng_state(self.states[2])
