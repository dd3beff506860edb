"""Small real data sets that need no download of ours: scikit-learn's digits, and Fashion-MNIST."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST
from yacs.config import CfgNode

from config import image_size
from data.findings import Report
from data.sources.base import DataError, DatasetBuilder
from data.transforms import Images


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


FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist installs it
LARGEST_IDX = 1 << 28  # bytes: what inflates beyond is not one of these files
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
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(LARGEST_IDX + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if data[:4] != bytes([0, 0, 8, axes]):  # 8: unsigned bytes
        raise DataError(f"{path} is no idx file of unsigned bytes with {axes} axes: it starts with {data[:4].hex(' ')}")
    shape = np.frombuffer(data, dtype=">u4", count=min(axes, (len(data) - 4) // 4), offset=4).tolist()
    if len(shape) < axes or len(data) != 4 + 4 * axes + math.prod(shape):
        raise DataError(f"{path} is damaged: {len(data)} bytes, which do not hold what its header says, {shape}")
    return np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * axes).reshape(shape)


class Digits(DatasetBuilder):
    """DATA.DATASET digits."""

    name, modality = "digits", Images()

    def open(self, config: CfgNode, split: str, classes: tuple[str, ...] | None = None) -> DigitsSource:
        return DigitsSource(split, image_size(config))

    def check(self, config: CfgNode, report: Report) -> None:
        report.facts.append("the digits ship with scikit-learn: there are no files to check")


class FashionMnist(DatasetBuilder):
    """DATA.DATASET fashion_mnist."""

    name, modality = "fashion_mnist", Images()

    def open(self, config: CfgNode, split: str, classes: tuple[str, ...] | None = None) -> FashionMnistSource:
        return FashionMnistSource(Path(config.DATA.DATA_PATH or FASHION_MNIST), split, image_size(config))

    def check(self, config: CfgNode, report: Report) -> None:
        for split in ("train", "val"):
            try:
                source = self.open(config, split)
                report.facts.append(f"{split}: {len(source.labels):,} images of {source.num_classes} classes")
            except DataError as error:
                report.error(str(error))
