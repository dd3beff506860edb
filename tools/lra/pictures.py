"""The files of the tasks whose symbols are grey levels: image (CIFAR-10 or Fashion-MNIST) and Pathfinder.

Readers take what `--source` names and return a `Content`. They raise DataError, which names file and line, for what is
absent, damaged, or not what it should be.
"""

import io
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from data.sources.base import FORMATS, DataError, UnreadableImage, read_file
from data.sources.bundled import FASHION_MNIST_FILES, FashionMnistSource
from data.sources.token_cache import FileRecord
from logger import printable
from tools.lra import files
from tools.lra.cache import Content, Sample
from tools.lra.files import find, label_of, new_source, note, record_of
from tools.prepared_folder import FolderDigest
from utils.parallel import parallel

# -- CIFAR-10, and Fashion-MNIST in its place

CIFAR_ARCHIVE, CIFAR_FOLDER = "cifar-10-python.tar.gz", "cifar-10-batches-py"
CIFAR_BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
CIFAR_SIZES = {"train": 45_000, "val": 5_000, "test": 10_000}
FASHION_MNIST_SIZES = {"train": 54_000, "val": 6_000, "test": 10_000}
TENTH_FOR_VAL = {"train": 0.9, "val": 0.1}
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
LUMA = np.array([0.2989, 0.5870, 0.1140], dtype=np.float32)  # of red, green, blue


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain values and NumPy arrays, and nothing else: a pickle may otherwise run any code."""

    ALLOWED = {  # noqa: RUF012 - a table
        **dict.fromkeys(
            [("numpy.core.multiarray", "_reconstruct"), ("numpy._core.multiarray", "_reconstruct")],
            np.zeros(0).__reduce__()[0],
        ),
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which CIFAR-10 does not need") from None


def _cifar_batch(data: bytes, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey images uint8 (n, 1024) and labels of a batch. Raises DataError for what is no such batch."""
    try:
        batch = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = batch[b"data"], batch[b"labels"]
    except Exception as error:  # a damaged pickle may fail in any way
        raise DataError(f"{where} is no batch of CIFAR-10: {type(error).__name__}: {error}") from error
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), 3 * 1024)):
        raise DataError(f"{where} does not hold uint8 images (n, 3072) with as many labels")
    for place, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < len(CIFAR_CLASSES):
            raise DataError(f"{where} image {place}: the label is {label!r}, expected 0 to {len(CIFAR_CLASSES) - 1}")
    return official_grey(pixels.reshape(-1, 3, 1024)), np.array(labels, dtype=np.uint8)


def official_grey(planes: np.ndarray) -> np.ndarray:
    """uint8 (n, pixels) of red, green and blue, uint8 (n, 3, pixels), as the published pipeline makes it.

    That converts to float32 in 0 to 1, weighs, multiplies by 255.5 and truncates: up to a level from a rounded grey.
    """
    red, green, blue = np.moveaxis(planes, 1, 0).astype(np.float32) * np.float32(1 / 255)
    luminance = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    return (luminance * np.float32(255.5)).astype(np.uint8)


def read_cifar(path: Path, seed: int) -> Content:
    """CIFAR-10 for Python, from its archive or its folder, as grey images; `seed` draws a tenth of train as val."""
    candidates = [CIFAR_ARCHIVE, f"{CIFAR_FOLDER}/data_batch_1", "data_batch_1"]
    if path.is_file():
        candidates = [""]
    found = find("image", path, candidates, f"{CIFAR_ARCHIVE} or {CIFAR_FOLDER}")
    source, batches = new_source("cifar-10-python"), {}
    if found.name in CIFAR_BATCHES:
        for name in CIFAR_BATCHES:
            file = find("image", found.parent, [name], name)
            files.require_md5(file, name)
            batches[name] = _cifar_batch(file.read_bytes(), str(file))
            note(source, name, record_of(file))
    else:
        files.require_md5(found, CIFAR_ARCHIVE)
        for name, data in files.archive_members(found):
            if (base := os.path.basename(name)) in CIFAR_BATCHES:
                batches[base] = _cifar_batch(data, f"{found}:{name}")
        note(source, found.name, record_of(found))
        if absent := sorted(set(CIFAR_BATCHES) - set(batches)):
            raise DataError(f"{found} holds no {absent[0]}: {files.ADVICE['image']}")
    images, labels = (np.concatenate([batches[name][i] for name in CIFAR_BATCHES[:-1]]) for i in (0, 1))
    content = _content("image", "CIFAR-10, grey", CIFAR_CLASSES, source, images, labels, seed, TENTH_FOR_VAL)
    _add_split(content, "test", *batches["test_batch"])
    content.published = CIFAR_SIZES
    return content


def read_fashion_mnist(path: Path, seed: int) -> Content:
    """Fashion-MNIST's idx files in place of CIFAR-10; `seed` draws a tenth of train as val."""
    source, arrays = new_source("fashion-mnist"), {}
    for split, names in FASHION_MNIST_FILES.items():
        pictures = FashionMnistSource(path, split, (28, 28))
        pixels = np.stack([np.asarray(pictures.load(i))[..., 0] for i in range(len(pictures.labels))])
        arrays[split] = pixels.reshape(len(pixels), -1), pictures.labels
        for name in names:
            note(source, name, record_of(FashionMnistSource._find(path, name)))
    assert FashionMnistSource.classes is not None
    title = "Fashion-MNIST, a stand-in for CIFAR-10"
    content = _content("image", title, FashionMnistSource.classes, source, *arrays["train"], seed, TENTH_FOR_VAL)
    _add_split(content, "test", *arrays["val"])
    content.published = FASHION_MNIST_SIZES
    return content


def _content(
    task: str,
    title: str,
    classes: tuple[str, ...],
    source: dict[str, Any],
    images: Sequence[np.ndarray] | np.ndarray,
    labels: np.ndarray,
    seed: int,
    shares: Mapping[str, float],
) -> Content:
    """Splits that are consecutive shares of an order that `seed` draws."""
    content = Content(task, title, classes, {}, source)
    ends = np.rint(np.cumsum(list(shares.values())) * len(labels)).astype(int)
    order = np.random.default_rng(seed).permutation(len(labels))
    for split, places in zip(shares, np.split(order, ends[:-1]), strict=True):
        _add_split(content, split, images, labels, places)
    return content


def _add_split(
    content: Content,
    split: str,
    images: Sequence[np.ndarray] | np.ndarray,
    labels: np.ndarray,
    places: np.ndarray | None = None,
) -> None:
    """These places of the images, all by default, in this order, as a split."""
    chosen = range(len(labels)) if places is None else places.tolist()
    content.splits[split] = (Sample(int(labels[i]), (images[i],)) for i in chosen)
    content.sizes[split] = len(chosen)


# -- Pathfinder

PATHFINDER_FOLDER = "pathfinder32"
PATHFINDER_SIZES = {"train": 160_000, "val": 20_000, "test": 20_000}
PATHFINDER_SIDE = 32
PATHFINDER_SHARES = {"train": 0.8, "val": 0.1, "test": 0.1}
METADATA_COLUMNS = 11


@dataclass(frozen=True)
class PathfinderBatch:
    """What one metadata file leads to: images uint8 (n, 1024), labels, empty image files, the digest of all images."""

    images: np.ndarray
    labels: np.ndarray
    empty: int
    metadata: FileRecord
    files: FileRecord


def read_pathfinder_batch(metadata: Path) -> PathfinderBatch:
    """Read `metadata/<batch>.npy`, which is text, and the images that it names. Raises DataError."""
    root, images, labels, empty, digest = metadata.parents[1], [], [], 0, FolderDigest()
    try:
        lines = metadata.read_text(encoding="ascii").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{metadata} is no text, which Pathfinder's metadata is in spite of its name") from error
    for number, line in enumerate(lines, start=1):
        where, columns = f"{metadata} line {number}", line.split()
        if len(columns) != METADATA_COLUMNS:
            raise DataError(f"{where} has {len(columns)} columns, expected {METADATA_COLUMNS}; is the file truncated?")
        label = label_of(columns[3].encode(), 2, where)
        path = root / columns[0] / columns[1]
        if not os.path.abspath(path).startswith(os.path.join(os.path.abspath(root), "")):
            raise DataError(f"{where} names {printable(path)}, which lies outside of {root}")
        try:
            data = read_file(path)
        except UnreadableImage as error:
            raise DataError(f"{where} names {error}") from error
        if not data:  # the release has such a file
            empty += 1
            continue
        digest.add(columns[1], data)
        images.append(_grey_image(data, path))
        labels.append(label)
    return PathfinderBatch(
        np.array(images, dtype=np.uint8).reshape(-1, PATHFINDER_SIDE**2),
        np.array(labels, dtype=np.uint8),
        empty,
        record_of(metadata),
        files.record_of_all(digest),
    )


def _grey_image(data: bytes, path: Path) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
    except Exception as error:  # a decoder may fail in any way
        raise DataError(f"{path} is no complete image: {error}") from error
    if image.mode != "L" or image.size != (PATHFINDER_SIDE, PATHFINDER_SIDE):
        raise DataError(
            f"{path} is {image.mode} {image.size}, expected 8-bit grey, {PATHFINDER_SIDE}×{PATHFINDER_SIDE}"
        )
    return np.asarray(image).reshape(-1)


def read_pathfinder(path: Path, folder: str, contour_length: int, seed: int, workers: int) -> Content:
    """The images of one of pathfinder32's folders; `seed` draws 80 % train, 10 % val, 10 % test."""
    candidates = [*files.below_release(f"{PATHFINDER_FOLDER}/{folder}", "metadata"), f"{folder}/metadata"]
    if path.resolve().name != folder:  # the folder of another contour length is none
        candidates.remove("metadata")
    found = find("pathfinder", path, candidates, f"{PATHFINDER_FOLDER}/{folder}/metadata")
    by_number = {}
    for file in found.glob("*.npy"):
        if not file.stem.isdecimal():
            raise DataError(f"{file}: expected a number as the file's name")
        by_number[int(file.stem)] = file
    if not by_number:
        raise DataError(f"{found} holds no <batch>.npy: {files.ADVICE['pathfinder']}")
    metadata = [by_number[number] for number in sorted(by_number)]
    source, read = new_source(f"{PATHFINDER_FOLDER}/{folder}"), []
    batches = parallel(read_pathfinder_batch, metadata, workers)
    for file, batch in zip(metadata, tqdm(batches, desc="reading", total=len(metadata), disable=None), strict=True):
        read.append(batch)
        note(source, f"metadata/{file.name}", batch.metadata)
        note(source, f"imgs/{file.stem}", batch.files)
    source["empty_images_left_out"] = sum(batch.empty for batch in read)
    images = [image for batch in read for image in batch.images]  # views: the batches stay as they are
    labels = np.concatenate([batch.labels for batch in read])
    title = f"Pathfinder32, contour length {contour_length}"
    content = _content("pathfinder", title, ("apart", "connected"), source, images, labels, seed, PATHFINDER_SHARES)
    content.published = PATHFINDER_SIZES
    return content
