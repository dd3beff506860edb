"""DATA.FORMAT parquet: image data sets as the Hugging Face Hub stores them, through the optional package `datasets`.

pytest tests/test_parquet.py
"""

import shutil
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, config_file, folder_of, jpeg, run, run_main, write_tiny
from run_files import epoch_file

from config import load_config, make_plan
from data.builders import builder_of
from data.findings import Report
from data.loaders import DataError, build_loaders
from data.sources.base import UnreadableImage
from models.files import load_checkpoint

NAMES = ["ant", "bee", "cat"]
FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def images(count: int, start: int = 0) -> list[dict]:
    return [{"bytes": jpeg(start + i), "path": f"IMG_{start + i:04}.jpg"} for i in range(count)]


def write(path: Path, rows: dict, features=FEATURES) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture
def hub(tmp_path) -> Path:
    """A data set in the Hub's layout: two files of training images, one of validation images."""
    for part in range(2):
        rows = {"image": images(12, 12 * part), "label": [i % 3 for i in range(12)]}
        write(tmp_path / "hub" / "data" / f"train-0000{part}-of-00002.parquet", rows)
    write(
        tmp_path / "hub" / "data" / "validation-00000-of-00001.parquet",
        {"image": images(6, 50), "label": [0, 1, 2] * 2},
    )
    return tmp_path / "hub"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The same images in class folders, whose order is another one."""
    for split, start, count in (("train", 0, 24), ("val", 50, 6)):
        for i, image in enumerate(images(count, start)):
            path = tmp_path / "folder" / split / NAMES[i % 3] / image["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image["bytes"])
    return tmp_path / "folder"


def configuration(root, *options):
    fixed = f"DATA.DATA_PATH {root} DATA.IMG_SIZE 64 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 TRAIN.GLOBAL_BATCH null"
    return load_config(config_file("pola_swin_t"), [*fixed.split(), *options])


def opened(root, *options, split="train"):
    return builder_of(config := configuration(root, *options)).open(config, split)


def test_images_labels_and_names_are_those_of_the_folder(hub, folder, cache, log):
    log.set_level("INFO", logger="polaformer")
    config, plain = configuration(hub, "DATA.NUM_WORKERS", "2"), configuration(folder)
    built = build_loaders(config, make_plan(config))
    assert built.classes == tuple(NAMES) and (built.train.num_images, built.val.num_images) == (24, 6)
    assert "train: 2 parquet files are converted once" in log.text and str(cache) in log.text
    theirs = build_loaders(plain, make_plan(plain)).val
    seen = [
        sorted((int(label), int(image.sum())) for pair in batches for image, label in zip(*pair, strict=True))
        for batches in (built.val, theirs)
    ]
    assert seen[0] == seen[1]
    built.train.set_epoch(0)
    assert sorted(torch.cat([labels for _, labels in built.train]).tolist()) == [0] * 8 + [1] * 8 + [2] * 8
    assert opened(hub).name(13) == "train/13/IMG_0013.jpg"
    log.clear()
    build_loaders(config, make_plan(config))
    assert "converted" not in log.text  # the cache is there


def test_a_run_continues_inside_an_epoch_to_the_same_bits(hub, tmp_path):
    text = TINY.replace("DATASET: digits", f"DATA_PATH: {hub}").replace("BATCH_SIZE: 64", "BATCH_SIZE: 4")
    path = write_tiny(tmp_path, text)
    run(path, "CHECKPOINT.EVERY_STEPS 4 CHECKPOINT.KEEP 9")
    whole, again = load_checkpoint(epoch_file(folder_of(path), 2)), tmp_path / "out" / "tiny" / "again"
    again.mkdir()
    (inside,) = [file for file in folder_of(path).glob("ckpt*.pth") if "step" in file.name and "0" in file.name][:1]
    for file in (inside, inside.with_name(inside.name + ".json")):
        shutil.copy(file, again)
    run(path, "CHECKPOINT.EVERY_STEPS 4 TAG again")
    other = load_checkpoint(epoch_file(again, 2))
    assert "steps finished" in (again / "log.txt").read_text()
    assert all(torch.equal(value, other["model"][name]) for name, value in whole["model"].items())


def test_two_processes_convert_once_and_train(hub, tmp_path):
    text = TINY.replace("DATASET: digits", f"DATA_PATH: {hub}").replace("BATCH_SIZE: 64", "BATCH_SIZE: 4")
    path = write_tiny(tmp_path, text.replace("EPOCHS: 2, WARMUP_EPOCHS: 1", "EPOCHS: 1, WARMUP_EPOCHS: 0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path / "shared"))
        result = run_main("--cfg", path, processes=2)
    assert "6 images, top-1" in result.stdout and len(list((tmp_path / "shared").rglob("*.arrow"))) == 2


def test_plain_parquet_without_the_hub_s_notes_is_read_too(tmp_path):
    table = pa.table(
        {"id": list("abcd"), "img": [jpeg(i) for i in range(4)], "cls": pa.array([0, 2, 1, 2], pa.int32())}
    )
    (tmp_path / "plain").mkdir()
    pq.write_table(table, tmp_path / "plain" / "images.parquet")
    source = opened(tmp_path / "plain", "DATA.VAL_FRACTION", "0.5")
    assert source.classes is None and source.num_classes == 3
    assert sorted(source.labels.tolist()) == [0, 1, 2] and source.load(0).size == (48, 40)


def test_files_lie_in_the_folder_or_in_the_one_below_it(hub):
    (hub / "data").rename(hub / "plain_text")
    assert len(opened(hub).labels) == 24
    (hub / "other").mkdir()
    shutil.copy(next((hub / "plain_text").glob("val*")), hub / "other" / "train.parquet")
    with pytest.raises(DataError, match=r"holds no train\*.parquet, nor does the folder below it"):
        opened(hub, "DATA.FORMAT", "parquet")
    (hub / "plain_text").rename(hub / "data")
    assert len(opened(hub).labels) == 24


def test_the_label_column_may_be_named(tmp_path):
    features = datasets.Features({**FEATURES, "coarse": datasets.ClassLabel(names=["x", "y"])})
    features["fine"] = features.pop("label")
    rows = {"image": images(3), "fine": [0, 1, 2], "coarse": [1, 1, 0]}
    write(tmp_path / "set" / "train.parquet", rows, features)
    assert opened(tmp_path / "set", "DATA.LABEL_COLUMN", "coarse").classes == ("x", "y")
    with pytest.raises(
        DataError, match=r"train.parquet has 2 columns that may be labels .* \(fine, coarse\), expected one"
    ):
        opened(tmp_path / "set")
    with pytest.raises(DataError, match="DATA.LABEL_COLUMN color: .* has the columns of integers fine, coarse"):
        opened(tmp_path / "set", "DATA.LABEL_COLUMN", "color")


def test_one_set_is_divided_by_the_names_of_its_images(hub, folder):
    for file in hub.rglob("validation*"):
        file.unlink()
    shutil.rmtree(folder / "val")
    sides = [
        {Path(source.name(i)).name for i in range(len(source.labels))}
        for root in (hub, folder)
        for source in [opened(root, "DATA.VAL_FRACTION", "0.25", split="val")]
    ]
    assert sides[0] == sides[1] and len(sides[0]) == 6


def test_the_check_reads_every_image(hub, tmp_path):
    rows = {
        "image": [*images(2, 90), {"bytes": jpeg(92)[:300], "path": "short.jpg"}, images(1)[0]],
        "label": [0, 1, 2, 0],
    }
    write(hub / "data" / "validation-00000-of-00001.parquet", rows)
    report = Report()
    builder_of(config := configuration(hub)).check(config, report)
    page = report.render()
    assert "train: 24 images, 3 classes, 8 to 8 images a class" in page
    assert "val: 1 images are unreadable or truncated" in page and "val/2/short.jpg" in page
    assert "1 images are in train and in val with the same content" in page and "train/0/IMG_0000.jpg" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda data: (data / "train-00001-of-00002.parquet").write_bytes(b"PAR1"),
            "train-00001-of-00002.parquet is no",
        ),
        (
            lambda data: [file.unlink() for file in data.glob("val*")],
            r"holds no val\*.parquet, nor does the folder below it",
        ),
        (
            lambda data: write(data / "validation-00000-of-00001.parquet", {"image": images(1), "label": [-1]}),
            "column label of val lacks labels, or has some outside of 0 to 2",
        ),
        (
            lambda data: pq.write_table(pa.table({"text": ["a"], "label": [1]}), data / "train-00001-of-00002.parquet"),
            r"train\*.parquet cannot be read together",
        ),
        (
            lambda data: [pq.write_table(pa.table({"text": ["a"], "label": [1]}), file) for file in data.iterdir()],
            r"has 0 columns that may be images \(none\), expected one",
        ),
    ],
)
def test_damage_is_one_line_that_names_the_files(hub, change, message):
    change(hub / "data")
    config = configuration(hub, "DATA.FORMAT", "parquet")
    with pytest.raises(DataError, match=message) as caught:
        build_loaders(config, make_plan(config))
    assert "\n" not in str(caught.value)


def test_an_empty_cell_is_an_unreadable_image(tmp_path):
    (tmp_path / "set").mkdir()
    table = pa.table({"image": [{"bytes": None, "path": "gone.jpg"}, *images(2)], "label": [0, 1, 2]})
    pq.write_table(table, tmp_path / "set" / "train.parquet")
    with pytest.raises(UnreadableImage, match="train/0/gone.jpg: the parquet file holds no bytes of it"):
        opened(tmp_path / "set").load(0)


def test_without_the_package_it_is_said_how_to_get_it(hub, monkeypatch):
    monkeypatch.setattr("data.sources.base.find_spec", lambda module: None)
    with pytest.raises(
        DataError, match="DATA.FORMAT is parquet, which is not installed; `pip install datasets` or set"
    ):
        opened(hub)


def test_a_full_disk_is_said_before_anything_is_written(hub, cache, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(DataError, match="0.0 GB free .*; HF_DATASETS_CACHE moves it"):
        opened(hub)
    assert not list(cache.rglob("*.arrow"))


def test_labels_are_an_array_and_not_read_from_the_file_each_time(hub):
    source = opened(hub)
    assert isinstance(source.labels, np.ndarray) and source.labels[:6].tolist() == [0, 1, 2] * 2
