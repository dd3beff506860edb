"""DATA.VAL_FRACTION: one folder divided into training and validation, by class and in every run alike.

pytest tests/test_val_fraction.py
"""

import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import TINY, config_file, folder_of, jpeg, run, write_tiny

from config import ConfigError, load_config, make_plan
from data.builders import builder_of
from data.findings import Report
from data.loaders import DataError, build_loaders
from models.files import CheckpointError

COUNTS = {"ant": 10, "bee": 3, "cat": 2, "dog": 1}


@pytest.fixture
def photos(tmp_path) -> Path:
    """Class folders, without train/ or val/."""
    for number, (name, count) in enumerate(COUNTS.items()):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "photos" / name / f"IMG_{i:04}.jpg").write_bytes(jpeg(100 * number + i))
    return tmp_path / "photos"


def configuration(root, *options, fraction="0.2"):
    fixed = f"DATA.DATA_PATH {root} DATA.IMG_SIZE 64 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 TRAIN.GLOBAL_BATCH null"
    return load_config(config_file("pola_swin_t"), [*fixed.split(), "DATA.VAL_FRACTION", fraction, *options])


def names(root, *options, fraction="0.2", split="val"):
    """The images of a split, by class and file name."""
    source = builder_of(config := configuration(root, *options, fraction=fraction)).open(config, split)
    return [tuple(Path(source.name(index).replace("train.zip:", "")).parts[-2:]) for index in range(len(source.labels))]


def test_every_class_of_two_images_or_more_is_on_both_sides(photos, log):
    for fraction, expected in {
        "0.2": [2, 1, 1, 0],
        "0.5": [5, 2, 1, 0],
        "0.01": [1, 1, 1, 0],
        "0.99": [9, 2, 1, 0],
    }.items():
        train, val = (names(photos, fraction=fraction, split=split) for split in ("train", "val"))
        assert [sum(name == each for each, _ in val) for name in COUNTS] == expected
        assert not set(train) & set(val) and len(train) + len(val) == sum(COUNTS.values())
    built = build_loaders(config := configuration(photos), make_plan(config))
    assert (built.train.num_images, built.val.num_images, built.classes) == (12, 4, tuple(COUNTS))
    assert "1 of 4 classes have no image in the validation set: dog" in log.text
    evaluated = build_loaders(config, make_plan(config), train=False)
    assert evaluated.val.num_images == 4 and evaluated.classes == tuple(COUNTS)


def test_the_division_depends_on_the_names_alone(photos, tmp_path):
    before = names(photos)
    shutil.copytree(photos, tmp_path / "elsewhere" / "train")  # the usual layout, without val/
    assert names(tmp_path / "elsewhere") == names(photos, "SEED", "7") == before
    (photos / "ant" / "IMG_0100.jpg").write_bytes(jpeg(1000))
    (photos / "eel").mkdir()
    (photos / "eel" / "IMG_0000.jpg").write_bytes(jpeg(1001))
    after = names(photos)
    assert len(set(before) - set(after)) <= 1 and len(set(after) - set(before)) <= 1
    train = names(photos, split="train")
    assert not set(before) & set(train) or len(set(before) & set(train)) == 1


def test_a_zip_is_divided_like_its_folder(photos, tmp_path):
    root = tmp_path / "zipped"
    root.mkdir()
    files = sorted(photos.rglob("*.jpg"))
    with zipfile.ZipFile(root / "train.zip", "w") as archive:
        for path in files:
            archive.write(path, path.relative_to(photos))
    lines = (f"{path.relative_to(photos)}\t{list(COUNTS).index(path.parent.name)}\n" for path in files)
    (root / "train_map.txt").write_text("".join(lines))
    assert names(root, "DATA.ZIP_MODE", "True") == names(photos)
    (root / "val.zip").touch()
    with pytest.raises(DataError, match="val.zip holds validation images, and DATA.VAL_FRACTION asks"):
        names(root, "DATA.ZIP_MODE", "True")


def test_what_cannot_be_divided_is_said_in_a_line(photos, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "shards.json").touch()
    with pytest.raises(DataError, match="DATA.VAL_FRACTION needs images that can be read in any order; shards"):
        names(tmp_path / "shards")
    for name in ("ant", "bee", "cat"):
        for file in sorted((photos / name).iterdir())[1:]:
            file.unlink()
    with pytest.raises(DataError, match="every class has one image, and none is left to validate on"):
        names(photos)
    (photos / "val").mkdir()
    with pytest.raises(DataError, match="val holds validation images, and DATA.VAL_FRACTION asks to take some"):
        names(photos)
    with pytest.raises(ConfigError, match="DATA.DATASET digits has validation data: set DATA.VAL_FRACTION to 0"):
        configuration(photos, "DATA.DATASET", "digits")
    with pytest.raises(ConfigError, match="DATA.VAL_FRACTION is '1.0'"):
        configuration(photos, fraction="1.0")


def test_the_check_of_the_data_reads_the_one_folder(photos):
    report = Report()
    builder_of(config := configuration(photos)).check(config, report)
    assert "train: 16 images, 4 classes, 1 to 10 images a class" in report.render()
    (finding,) = report.findings
    assert "1 classes have one image, which DATA.VAL_FRACTION leaves in training" in finding.text
    assert finding.examples == ("dog",) and not finding.is_error


def test_the_check_says_what_cannot_be_divided(photos):
    (photos / "val").mkdir()
    report = Report()
    builder_of(config := configuration(photos)).check(config, report)
    (finding,) = report.findings
    assert finding.is_error and "val holds validation images, and DATA.VAL_FRACTION asks" in finding.text


def test_a_run_keeps_its_division(photos, tmp_path):
    text = TINY.replace("DATASET: digits", f"DATA_PATH: {photos}, VAL_FRACTION: 0.2").replace(
        "BATCH_SIZE: 64", "BATCH_SIZE: 4"
    )
    path = write_tiny(tmp_path, text)
    run(path, "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0")
    run(path)  # continues
    assert "continues from" in (folder_of(path) / "log.txt").read_text()
    with pytest.raises(CheckpointError, match="trained with DATA.VAL_FRACTION 0.2, this configuration has 0.5"):
        run(path, "DATA.VAL_FRACTION 0.5 TRAIN.EPOCHS 3")
