"""Fashion-MNIST from idx files, and training on a share of each class.

pytest tests/test_fashion_mnist.py
"""

import gzip
import struct
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import config_file

from config import load_config, make_plan
from data.builders import builder_of
from data.findings import Report
from data.loaders import build_loaders
from data.sources.base import DataError, FractionSource
from data.sources.bundled import FASHION_MNIST_FILES, DigitsSource, FashionMnistSource, read_idx

SIZE = (32, 32)


def idx(array: np.ndarray) -> bytes:
    """The array as an idx file: two zeros, the type (8: unsigned bytes), the axes, their lengths, the bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (count, 28, 28)), np.arange(count) % 10


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 training and 20 test pictures in the four files as Debian's package has them."""
    for split, count in (("train", 40), ("val", 20)):
        for name, array in zip(FASHION_MNIST_FILES[split], pictures(count, count), strict=True):
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path


def config(root: Path, *options: str):
    options = ("DATA.DATASET", "fashion_mnist", "DATA.DATA_PATH", str(root), "DATA.IMG_SIZE", "32", *options)
    small = "TRAIN.GLOBAL_BATCH null DATA.BATCH_SIZE 10 DATA.NUM_WORKERS 0"
    return load_config(config_file("pola_swin_t"), [*options, *small.split()])


def test_pictures_and_labels_are_those_of_the_files(folder):
    source = FashionMnistSource(folder, "val", (28, 28))
    images, labels = pictures(20, 20)
    assert source.labels.tolist() == labels.tolist()
    assert source.classes[0] == "T-shirt/top" and source.classes[9] == "Ankle boot"
    for i in (0, 19):
        image = source.load(i)
        assert image.mode == "RGB"
        assert (np.asarray(image) == images[i][..., None]).all()
    assert source.name(3) == "fashion_mnist/val/3"
    assert FashionMnistSource(folder, "train", (48, 32)).load(0).size == (32, 48)


def test_torchvision_s_layout_without_compression_is_read_too(folder):
    raw = folder / "elsewhere" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in FASHION_MNIST_FILES["val"]:
        (raw / name).write_bytes(gzip.decompress((folder / f"{name}.gz").read_bytes()))
    source, same = FashionMnistSource(folder / "elsewhere", "val", SIZE), FashionMnistSource(folder, "val", SIZE)
    assert (np.asarray(source.load(7)) == np.asarray(same.load(7))).all() and (source.labels == same.labels).all()


def test_loaders_deliver_three_channels_of_the_size_and_the_class_names(folder):
    loaders = build_loaders(config(folder), make_plan(config(folder)))
    assert (loaders.train.num_images, loaders.val.num_images, loaders.num_classes) == (40, 20, 10)
    assert "Sandal" in loaders.classes
    images, labels = next(iter(loaders.val))
    assert images.shape == (10, 3, 32, 32) and labels.tolist() == list(range(10))
    assert (images[:, 0] == images[:, 1]).all() and images.float().std() > 0


def test_absent_files_are_answered_with_how_to_get_them(tmp_path):
    absent = config(tmp_path)
    with pytest.raises(DataError) as error:
        build_loaders(absent, make_plan(absent))
    message = str(error.value)
    assert str(tmp_path) in message and "apt install dataset-fashion-mnist" in message and "--data-path" in message
    for pair in FASHION_MNIST_FILES.values():
        assert all(f"{name}.gz" in message for name in pair)


LABELS = FASHION_MNIST_FILES["train"][1]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"not gzip", "cannot be read"),
        (gzip.compress(idx(np.zeros(40)))[:-9], "cannot be read"),
        (gzip.compress(idx(np.zeros(40))[:-1]), "is damaged: 47 bytes"),
        (gzip.compress(idx(np.zeros(40))[:6]), "is damaged: 6 bytes"),
        (gzip.compress(idx(np.zeros((40, 1)))), "is no idx file of unsigned bytes with 1 axes"),
        (gzip.compress(b"\x00\x00\x0d\x01" + bytes(44)), "it starts with 00 00 0d 01"),
        (gzip.compress(idx(np.zeros(39))), "holds 40 images"),
        (gzip.compress(idx(np.full(40, 10))), "holds the label 10, expected 0 to 9"),
    ],
    ids=["no gzip", "cut gzip", "cut data", "cut header", "axes", "type", "count", "label"],  # gzip stores the time
)
def test_a_damaged_file_is_named(folder, content, problem):
    (folder / f"{LABELS}.gz").write_bytes(content)
    with pytest.raises(DataError, match=f"{LABELS}.gz.*{problem}|{problem}.*{LABELS}.gz"):
        FashionMnistSource(folder, "train", SIZE)
    report = Report()
    builder_of(config(folder)).check(config(folder), report)
    assert len(report.findings) == 1 and problem in report.findings[0].text


def test_a_file_that_inflates_without_end_is_bounded(folder, monkeypatch):
    monkeypatch.setattr("data.sources.bundled.LARGEST_IDX", 1 << 20)
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress(bytes([0, 0, 8, 1]) + bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"is damaged: 1048577 bytes"):
        read_idx(folder / f"{LABELS}.gz", 1)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_idx_files_of_any_shape_are_read(tmp_path):
    array = np.arange(24).reshape(2, 3, 4)
    (tmp_path / "file").write_bytes(idx(array))
    assert (read_idx(tmp_path / "file", 3) == array).all()


def test_a_fraction_is_the_first_images_of_every_class():
    whole = DigitsSource("train", (8, 8))
    part = FractionSource(whole, 0.1)
    total, chosen = Counter(whole.labels), Counter(part.labels.tolist())
    assert all(chosen[digit] == -(-total[digit] // 10) for digit in range(10))
    names = [whole.name(i) for i in range(len(whole.labels))]
    for digit in range(10):
        of_class = [name for name, label in zip(names, whole.labels, strict=True) if label == digit]
        kept = [part.name(i) for i, label in enumerate(part.labels) if label == digit]
        assert kept == of_class[: chosen[digit]]
    index = names.index(part.name(5))
    assert (np.asarray(part.load(5)) == np.asarray(whole.load(index))).all()


def test_the_fraction_shortens_training_and_not_validation(folder):
    loaders = build_loaders(half := config(folder, "DATA.TRAIN_FRACTION", "0.5"), make_plan(half))
    assert (loaders.train.num_images, loaders.val.num_images) == (20, 20)
