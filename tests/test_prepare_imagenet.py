"""tools.prepare_imagenet: what it writes, for every format, number of workers, interruption and kind of damage.

pytest tests/test_prepare_imagenet.py
"""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, PYTHON, ROOT, config_file, jpeg
from PIL import Image

import tools.prepare_imagenet
from config import load_config, make_plan
from data.loaders import build_loaders
from data.sources.base import DataError
from tools.prepare_imagenet import Options, main, prepare, prepare_image

CLASSES = ("n01440764", "n01443537", "n02119789")
FORMATS = ("folder", "zip", "shards")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: 3 classes, 10 training and 4 validation images each; every fifth image is small."""
    root = tmp_path / "input"
    for split, count in (("train", 10), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                size = (30, 24) if i % 5 == 0 else (60, 48) if i % 2 else (45, 70)
                data = jpeg(1000 * (split == "val") + 100 * label + i, size)
                (root / split / name / f"{name}_{i}.JPEG").write_bytes(data)
    return root


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root`."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def loaders(root: Path, kind: str = "folder"):
    options = f"DATA.DATA_PATH {root} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 2 DATA.NUM_WORKERS 0 DATA.FORMAT {kind}"
    config = load_config(config_file("pola_swin_t"), ["TRAIN.GLOBAL_BATCH", "null", *options.split()])
    return build_loaders(config, make_plan(config))


def started(function: Callable[[], object]) -> int:
    """Call `function` in a process that leads a group of its own; returns its id."""
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            function()
        finally:
            os._exit(1)
    return process


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_loads_with_the_labels_of_the_folder(folder, tmp_path, kind):
    totals = prepare(folder, tmp_path / "out", Options(format=kind, shard_images=4))
    assert (totals["train"].images, totals["val"].images) == (30, 12)
    plain, built = loaders(folder), loaders(tmp_path / "out", kind)
    assert built.classes == plain.classes == CLASSES and built.num_classes == 3
    assert built.train.num_images == 30
    for (images, labels), (expected, expected_labels) in zip(built.val, plain.val, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    label_of = {name: i for i, name in enumerate(CLASSES)}
    dataset = built.train.loader.dataset
    if kind == "shards":
        samples = [(encoded.name, encoded.label, encoded.data) for encoded in dataset.split.read(range(8), 0, 30)]
        assert [label for _, label, _ in samples] != sorted(label for _, label, _ in samples)  # classes are mixed
    else:
        samples = [(dataset.source.name(i), label, None) for i, label in enumerate(dataset.source.labels)]
    assert len(samples) == 30
    for name, label, data in samples:
        wordnet_id = Path(name).stem.split("_")[-2]
        assert label_of[wordnet_id] == label
        if data is not None:
            original = f"{wordnet_id}_{Path(name).stem.split('_')[-1]}.JPEG"
            assert data == (folder / "train" / wordnet_id / original).read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_output_is_the_same_for_every_number_of_workers(folder, tmp_path, kind):
    options = Options(format=kind, short_side=32, shard_images=4)
    for workers in (1, 3):
        prepare(folder, tmp_path / str(workers), options, workers=workers)
    first = contents(tmp_path / "1")
    assert first == contents(tmp_path / "3")
    assert not [name for name in first if "temporary" in name or (kind == "zip" and name.startswith(".prepare/train-"))]
    expected = {
        "folder": {"train", "val"},
        "zip": {"train.zip", "train_map.txt", "val.zip", "val_map.txt"},
        "shards": {"shards.json", *(f"train-{i:06d}.tar" for i in range(8)), *(f"val-{i:06d}.tar" for i in range(3))},
    }
    assert {path.name for path in (tmp_path / "1").iterdir()} == {*expected[kind], ".prepare"}


def test_another_seed_is_another_order_of_training_shards_only(folder, tmp_path):
    for seed in (0, 1):
        prepare(folder, tmp_path / str(seed), Options(format="shards", seed=seed))
    first, second = contents(tmp_path / "0"), contents(tmp_path / "1")
    assert first["train-000000.tar"] != second["train-000000.tar"]
    assert first["val-000000.tar"] == second["val-000000.tar"]


def test_resizing_keeps_small_images_and_validation_byte_for_byte(folder, tmp_path):
    totals = prepare(folder, tmp_path / "out", Options(short_side=32, quality=80))
    assert (totals["train"].resized, totals["val"].resized) == (24, 0)
    before, after = contents(folder), contents(tmp_path / "out")
    for name, data in before.items():
        small = min(Image.open(io.BytesIO(data)).size) <= 32
        assert (after[name] == data) == (small or name.startswith("val")), name
        if not small and name.startswith("train"):
            image = Image.open(io.BytesIO(data))
            size = (40, 32) if image.size == (60, 48) else (32, 49)
            expected = io.BytesIO()
            image.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(expected, "JPEG", quality=80)
            assert after[name] == expected.getvalue()
    with_val = prepare(folder, tmp_path / "both", Options(short_side=32, resize_val=True))
    assert with_val["val"].resized == 9


def test_a_resized_png_becomes_a_jpeg_by_name_too(folder, tmp_path):
    Image.new("RGBA", (50, 40), (9, 8, 7, 255)).save(folder / "train" / CLASSES[0] / "drawing.v2.png")
    for kind in FORMATS:
        prepare(folder, tmp_path / kind, Options(format=kind, short_side=32))
        assert loaders(tmp_path / kind, kind).train.num_images == 31
    with Image.open(tmp_path / "folder" / "train" / CLASSES[0] / "drawing.v2.png.jpg") as image:
        assert image.format == "JPEG" and image.size == (40, 32)
    with zipfile.ZipFile(tmp_path / "zip" / "train.zip") as archive:
        assert f"{CLASSES[0]}/drawing.v2.png.jpg" in archive.namelist()


def test_an_image_as_large_as_asked_for_is_kept(tmp_path):
    from sklearn.datasets import load_sample_images

    path = tmp_path / "photograph.jpg"
    Image.fromarray(load_sample_images().images[0]).save(path, quality=95)
    assert prepare_image(str(path), 427, 90) == (path.read_bytes(), False)
    assert prepare_image(str(path), None, 90) == (path.read_bytes(), False)
    data, resized = prepare_image(str(path), 256, 90)
    assert resized and Image.open(io.BytesIO(data)).size == (383, 256)


# ---------------------------------------------------------------------------------------------------------------------
# Interruption
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [True, False], ids=["all processes", "main process"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_killed_run_continues_to_the_same_bytes(tmp_path, kind, group):
    """SIGKILL when some units are finished; the next run keeps these and completes the rest."""
    root = tmp_path / "input"
    photograph = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for split, count in (("train", 120), ("val", 8)):
        for name in CLASSES[:2]:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.roll(photograph, i)).save(root / split / name / f"{i}.jpg", quality=95)
    options = Options(format=kind, short_side=100, shard_images=4)
    process = started(lambda: prepare(root, tmp_path / "killed", options, workers=2))
    state = tmp_path / "killed" / ".prepare"
    deadline = time.monotonic() + PATIENCE
    while len(list(state.glob("train-*.json"))) < 6 and time.monotonic() < deadline:
        time.sleep(0.002)
    (os.killpg if group else os.kill)(process, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    finished = {path.name for path in state.glob("train-*.json")}
    assert 6 <= len(finished) < 60
    assert not list((tmp_path / "killed").glob("*.zip")) and not (tmp_path / "killed" / "shards.json").exists()

    redone = []
    real = tools.prepare_imagenet._write_json
    tools.prepare_imagenet._write_json = lambda path, *others: redone.append(path.name) or real(path, *others)
    try:
        prepare(root, tmp_path / "killed", options)
    finally:
        tools.prepare_imagenet._write_json = real
    prepare(root, tmp_path / "unbroken", options)
    assert finished.isdisjoint(redone) and len([name for name in redone if name.startswith("train-")]) > 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


def test_a_zip_killed_while_it_is_put_together_is_completed(folder, tmp_path, monkeypatch):
    options = Options(format="zip", short_side=32, shard_images=4)
    prepare(folder, tmp_path / "unbroken", options)
    real, calls = zipfile.ZipFile.writestr, []

    def interrupted(self, *arguments):
        calls.append(None)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, tmp_path / "killed", options)
    assert not list((tmp_path / "killed").glob("*.zip"))
    monkeypatch.undo()
    prepare(folder, tmp_path / "killed", options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "unbroken")


DAMAGED = {"folder": f"train/{CLASSES[1]}/{CLASSES[1]}_3.JPEG", "zip": "train.zip", "shards": "train-000002.tar"}


@pytest.mark.parametrize("damage", ["flipped", "truncated", "deleted"])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_command_again_verifies_and_mends(folder, tmp_path, kind, damage):
    options = Options(format=kind, short_side=32, shard_images=4)
    prepare(folder, tmp_path / "out", options)
    before = contents(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.json")}
    victim = tmp_path / "out" / DAMAGED[kind]
    data = victim.read_bytes()
    if damage == "deleted":
        victim.unlink()
    else:
        middle = len(data) // 2
        victim.write_bytes(
            data[:middle] + (bytes([data[middle] ^ 1]) + data[middle + 1 :] if damage == "flipped" else b"")
        )
    prepare(folder, tmp_path / "out", options)
    assert contents(tmp_path / "out") == before
    kept = [path for path in times if path.stat().st_mtime_ns == times[path]]
    assert len(kept) >= 2  # what was whole was not written again


def test_changed_options_and_input_are_refused_by_name(folder, tmp_path, capsys):
    assert main([str(folder), str(tmp_path / "out"), "--short-side", "32"]) == 0
    assert main([str(folder), str(tmp_path / "out"), "--short-side", "40", "--quality", "80"]) == 2
    error = capsys.readouterr().err
    assert "was begun with other settings (--short-side 32 → 40; --quality 90 → 80); name another output" in error
    (folder / "train" / CLASSES[0] / "new.jpg").write_bytes(jpeg(5, (60, 48)))
    assert main([str(folder), str(tmp_path / "out"), "--short-side", "32"]) == 2
    assert "other input images" in capsys.readouterr().err


def test_two_runs_into_one_folder_do_not_mix(folder, tmp_path, monkeypatch):
    import fcntl

    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    with (tmp_path / "out" / ".prepare" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"another run is preparing .*out; wait for it, or name another output"):
            prepare(folder, tmp_path / "out", Options())
    prepare(folder, tmp_path / "out", Options())


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_unreadable_images_are_listed_and_end_with_1_unless_they_may_be_left_out(folder, tmp_path, capsys, kind):
    truncated, text = (folder / "train" / CLASSES[0] / f"{CLASSES[0]}_{i}.JPEG" for i in (1, 2))
    whole = {path: path.read_bytes() for path in (truncated, text)}
    truncated.write_bytes(whole[truncated][:-60])
    text.write_text("not an image")
    out = tmp_path / "out"
    command = [str(folder), str(out), "--format", kind, "--shard-images", "4", "--workers", "2"]
    assert main(command) == 1
    report = (out / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in report] and {line.split("\t")[0] for line in report} == set(map(str, whole))
    assert any("truncated" in line for line in report) and any("not an image" in line for line in report)
    output = capsys.readouterr().out
    assert "train: 28 images" in output and "2 unreadable" in output and "the data set is not finished" in output
    assert not (out / "shards.json").exists() and not (out / "train.zip").exists()
    assert main([*command, "--skip-unreadable"]) == 0
    built = loaders(out, kind)
    assert built.train.num_images == 28 and built.val.num_images == 12
    if kind == "zip":
        return  # a finished zip stays as it is
    for path, data in whole.items():  # mended: the same command takes them in
        path.write_bytes(data)
    assert main(command) == 0 and not (out / "unreadable.txt").exists()
    assert loaders(out, kind).train.num_images == 30
    prepare(folder, tmp_path / "unbroken", Options(format=kind, shard_images=4))
    assert contents(out) == contents(tmp_path / "unbroken")


def test_an_image_that_vanishes_while_it_is_prepared_is_listed(folder, tmp_path, monkeypatch, capsys):
    real = tools.prepare_imagenet.list_input

    def listing(*arguments):
        listed = real(*arguments)
        (folder / "train" / CLASSES[0] / f"{CLASSES[0]}_1.JPEG").unlink()
        return listed

    monkeypatch.setattr(tools.prepare_imagenet, "list_input", listing)
    assert main([str(folder), str(tmp_path / "out")]) == 1
    assert f"{CLASSES[0]}_1.JPEG\tNo such file or directory" in (tmp_path / "out" / "unreadable.txt").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# A flat val/
# ---------------------------------------------------------------------------------------------------------------------

# The devkit numbers its classes in an order of its own: 1 is the last of the sorted ids here.
NUMBERS = {"n02119789": 1, "n01443537": 2, "n01440764": 3}


@pytest.fixture
def flat(folder: Path) -> dict[str, str]:
    """Makes val/ flat with ImageNet's names; returns the class of each."""
    truth, number = {}, 0
    for i in range(4):
        for name in CLASSES:
            number += 1
            target = f"ILSVRC2012_val_{number:08d}.JPEG"
            (folder / "val" / name / f"{name}_{i}.JPEG").rename(folder / "val" / target)
            truth[target] = name
    for name in CLASSES:
        (folder / "val" / name).rmdir()
    return truth


def _kaggle(tmp_path: Path, truth: dict[str, str]) -> list[str]:
    rows = [f"{Path(name).stem},{wordnet_id} 85 1 499 272 {wordnet_id} 1 2 3 4" for name, wordnet_id in truth.items()]
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")
    return ["--val-ground-truth", str(tmp_path / "LOC_val_solution.csv")]


def _names(tmp_path: Path, truth: dict[str, str]) -> list[str]:
    (tmp_path / "val.txt").write_text("".join(f"{name} {wordnet_id}\n" for name, wordnet_id in truth.items()))
    return ["--val-ground-truth", str(tmp_path / "val.txt")]


def _devkit(tmp_path: Path, truth: dict[str, str]) -> str:
    path = tmp_path / "ILSVRC2012_validation_ground_truth.txt"
    path.write_text("".join(f"{NUMBERS[truth[name]]}\n" for name in sorted(truth)))
    return str(path)


def _devkit_lines(tmp_path: Path, truth: dict[str, str]) -> list[str]:
    (tmp_path / "ids.txt").write_text("".join(f"{name}\n" for name in NUMBERS))
    return ["--val-ground-truth", _devkit(tmp_path, truth), "--class-ids", str(tmp_path / "ids.txt")]


def _devkit_numbered(tmp_path: Path, truth: dict[str, str]) -> list[str]:
    (tmp_path / "ids.txt").write_text("".join(f"{NUMBERS[name]} {name} some words\n" for name in sorted(NUMBERS)))
    return ["--val-ground-truth", _devkit(tmp_path, truth), "--class-ids", str(tmp_path / "ids.txt")]


def _devkit_meta(tmp_path: Path, truth: dict[str, str]) -> list[str]:
    from scipy.io import savemat

    rows = np.array(
        [(number, name, "words") for name, number in NUMBERS.items()],
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")],
    )
    savemat(tmp_path / "meta.mat", {"synsets": rows.reshape(-1, 1)})
    return ["--val-ground-truth", _devkit(tmp_path, truth), "--class-ids", str(tmp_path / "meta.mat")]


TRUTHS = [_kaggle, _names, _devkit_lines, _devkit_numbered, _devkit_meta]


@pytest.mark.parametrize("write", TRUTHS, ids=lambda write: write.__name__.strip("_"))
def test_a_flat_val_is_placed_by_any_ground_truth(folder, tmp_path, flat, write, capsys):
    options = write(tmp_path, flat)
    assert main([str(folder), *options]) == 0
    assert "12 images moved into class folders, 0 were in place" in capsys.readouterr().out
    assert {p.name: p.parent.name for p in (folder / "val").glob("*/*")} == flat
    assert not [path for path in (folder / "val").iterdir() if path.is_file()]
    assert main([str(folder), *options]) == 0
    assert "0 images moved into class folders, 12 were in place" in capsys.readouterr().out
    assert loaders(folder).val.num_images == 12


@pytest.mark.parametrize("kind", FORMATS)
def test_a_flat_val_is_written_into_classes_and_itself_left_alone(folder, tmp_path, flat, kind):
    options = _kaggle(tmp_path, flat)
    before = contents(folder)
    assert main([str(folder), str(tmp_path / "out"), "--format", kind, *options]) == 0
    assert contents(folder) == before
    main([str(folder), *options])
    prepare(folder, tmp_path / "placed", Options(format=kind))
    assert contents(tmp_path / "out") == contents(tmp_path / "placed")


def test_an_interrupted_placing_is_continued(folder, tmp_path, flat):
    options = _devkit_lines(tmp_path, flat)
    for name in list(flat)[:5]:
        (folder / "val" / flat[name]).mkdir(exist_ok=True)
        (folder / "val" / name).rename(folder / "val" / flat[name] / name)
    assert main([str(folder), *options]) == 0
    assert {p.name: p.parent.name for p in (folder / "val").glob("*/*")} == flat


def test_a_ground_truth_that_does_not_fit_moves_nothing(folder, tmp_path, flat, capsys):
    before = contents(folder)

    def refused(message: str, *options: str) -> None:
        assert main([str(folder), *options]) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
        assert contents(folder) == before

    numbers = _devkit(tmp_path, flat)
    refused("holds class numbers; --class-ids names the file", "--val-ground-truth", numbers)
    refused("cannot be read", "--val-ground-truth", str(tmp_path / "absent.txt"))
    alphabetical = tmp_path / "sorted.txt"
    alphabetical.write_text("".join(f"n{i:08d}\n" for i in range(1000)))
    refused("in alphabetical order without numbers", "--val-ground-truth", numbers, "--class-ids", str(alphabetical))
    (tmp_path / "two.txt").write_text("1 n02119789\n2 n01443537\n")
    refused("has no id for class number 3", "--val-ground-truth", numbers, "--class-ids", str(tmp_path / "two.txt"))
    (tmp_path / "strange.txt").write_text("n02119789\nn01443537\nn09999999\n")
    refused("1 classes that train/ lacks, for example n09999999", "--val-ground-truth", numbers, "--class-ids",
            str(tmp_path / "strange.txt"))  # fmt: skip
    options = _kaggle(tmp_path, dict(list(flat.items())[1:]))
    refused("does not name 1 of 12 images, for example ILSVRC2012_val_00000001.JPEG", *options)
    lines = _devkit_lines(tmp_path, flat)
    Path(numbers).write_text(Path(numbers).read_text() + "1\n")
    refused("has 13 lines, and val/ holds 12 images", *lines)
    (folder / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    before = contents(folder)
    Path(numbers).write_text("1\n" * 11)
    refused("the image in place 2 of val/ is ILSVRC2012_val_00000003.JPEG", *lines)


ESCAPES = ["../../escape", "/absolute/escape", "a/b", "..", ".", ".hidden", "__MACOSX"]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("numbered", [False, True], ids=["names", "numbers"])
def test_a_ground_truth_that_leads_elsewhere_moves_nothing(folder, tmp_path, flat, capsys, name, numbered):
    shutil.rmtree(folder / "train")  # or its classes would be asked first
    if numbered:
        options = _devkit_lines(tmp_path, flat)
        (tmp_path / "ids.txt").write_text(f"1 {CLASSES[0]}\n2 {CLASSES[1]}\n3 {name}\n")
    else:
        options = _names(tmp_path, dict(flat) | {next(iter(flat)): name})
    before = contents(folder)
    assert main([str(folder), *options]) == 2
    error = capsys.readouterr().err
    assert f"leads to the class {name!r}, which is no name of a class folder" in error and error.count("\n") == 1
    assert contents(folder) == before and not list(tmp_path.rglob("escape"))


def test_images_that_would_be_stored_under_one_name_are_refused(folder, tmp_path, capsys):
    train = folder / "train" / CLASSES[0]
    (train / "b.PNG").write_bytes(b"\x89PNG")
    (train / "b.PNG.jpg").write_bytes(jpeg(5))
    assert main([str(folder), str(tmp_path / "out"), "--short-side", "20"]) == 2
    named = f"train/{CLASSES[0]}/b.PNG and train/{CLASSES[0]}/b.PNG.jpg would be stored under one name; rename one"
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()
    (train / "b.PNG").rename(train / "a\nb.jpg")
    (train / "b.PNG.jpg").rename(train / "a\\nb.jpg")
    assert main([str(folder), str(tmp_path / "out"), "--format", "zip"]) == 2
    assert "would be stored under one name" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", FORMATS)
def test_names_as_long_as_they_can_be_are_kept(folder, tmp_path, kind):
    (folder / "train" / CLASSES[0] / ("n" * 251 + ".jpg")).write_bytes(jpeg(5))
    assert prepare(folder, tmp_path / "out", Options(format=kind))["train"].images == 31


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", '{"result": 5, "digests": []}', "\0"])
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_records_of_an_earlier_run_are_made_anew(folder, tmp_path, kind, content, capsys):
    out = tmp_path / "out"
    prepare(folder, out, Options(format=kind))
    before = contents(out)
    for path in (out / ".prepare").glob("train*.json"):
        path.write_text(content)
    prepare(folder, out, Options(format=kind))
    assert contents(out) == before
    (out / ".prepare" / "settings.json").write_text(content)
    assert main([str(folder), str(out), "--format", kind]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "name another output folder, or delete this one" in error and "Traceback" not in error


def test_an_output_inside_of_the_input_is_refused(folder, capsys):
    before = contents(folder)
    assert main([str(folder), str(folder / "train" / "new")]) == 2
    assert "is the input; name another one" in capsys.readouterr().err and contents(folder) == before


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


def test_mistakes_on_the_command_line_are_explained(folder, tmp_path, capsys):
    cases = {
        (str(folder),): "OUTPUT is required, or --val-ground-truth FILE",
        (str(folder), "out", "--class-ids", "x"): "--class-ids belongs to --val-ground-truth",
        (str(folder), "out", "--workers", "0"): "'0' is not a whole number from 1 on",
        (str(folder), "out", "--quality", "100"): "'100' is not a whole number from 1 to 95",
        (str(folder), "out", "--format", "tar"): "invalid choice: 'tar'",
    }
    for arguments, message in cases.items():
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2 and message in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("")
    for arguments, message in {
        (str(tmp_path / "absent"), str(tmp_path / "out")): "absent does not exist",
        (str(folder), str(folder)): "is the input; name another one",
        (str(folder), str(folder / "train")): "is the input; name another one",
        (str(folder), str(tmp_path / "other")): "other holds other files; name a new one",
    }.items():
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert not (folder / ".prepare").exists()


def test_a_full_disk_ends_in_one_line_and_the_run_continues_later(folder, tmp_path, capfd):
    out = tmp_path / "out"

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        os._exit(main([str(folder), str(out), "--format", "shards", "--workers", "2"]))

    assert os.waitstatus_to_exitcode(os.waitpid(started(limited), 0)[1]) == 2
    error = capfd.readouterr().err
    assert "error: [Errno 27] File too large" in error and len(error.splitlines()) == 1
    assert not (out / "shards.json").exists()
    prepare(folder, out, Options(format="shards"))
    prepare(folder, tmp_path / "unbroken", Options(format="shards"))
    assert contents(out) == contents(tmp_path / "unbroken")


def test_the_command_line_reports_and_ctrl_c_is_no_traceback(folder, tmp_path, monkeypatch, capsys):
    command = [PYTHON, "-m", "tools.prepare_imagenet", str(folder), str(tmp_path / "out"), "--format", "shards"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "--short-side", "32"], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert "train: 30 images (24 resized, 6 kept as they were), 0.0" in result.stdout
    assert "val: 12 images (0 resized, 12 kept as they were)" in result.stdout
    assert json.loads((tmp_path / "out" / "shards.json").read_text())["splits"]["train"]["images"] == 30

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(tools.prepare_imagenet, "prepare", interrupted)
    assert main([str(folder), str(tmp_path / "other")]) == 130
    assert capsys.readouterr().err == "interrupted; the same command continues from here\n"


def test_a_worker_that_dies_is_explained(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        tools.prepare_imagenet, "prepare_image", lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
    )
    assert main([str(folder), str(tmp_path / "out"), "--workers", "2"]) == 2
    assert "one of 2 worker processes died; fewer of them need less memory" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
