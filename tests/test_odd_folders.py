"""Image folders as people have them: what tools left there, links, absent classes, wrong levels, names of any bytes.

pytest tests/test_odd_folders.py
"""

import csv
import json
import logging
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import folder_of, jpeg, run, write_tiny

import main
from config import load_config, make_plan
from data.check import run_check
from data.examination import Image, _Contents
from data.imagenet import imagenet_ids
from data.loaders import build_loaders
from data.sources.base import DataError, UnreadableImage
from data.sources.folder import FolderSource
from data.sources.listing import Listing
from engine.published import build_evaluation_set
from logger import printable, printable_lines, setup_logger
from models.files import load_checkpoint
from tools.command_line import answer
from tools.predict import main as predict
from tools.prepare_imagenet import Options, list_input, place_val, prepare
from tools.prepare_imagenet import main as prepare_imagenet
from tools.report import main as report
from tools.visualize_attention import main as visualize

SMALL = "DATA.DATASET imagenet DATA.IMG_SIZE 32 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 TRAIN.EPOCHS 1"


def make_set(root: Path, *classes: str, train: int = 4, val: int = 2) -> Path:
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(jpeg(100 * label + i + 50 * (split == "val"), (32, 32)))
    return root


@pytest.fixture(autouse=True)
def every_line(caplog):
    caplog.set_level(logging.INFO, "polaformer")


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    return make_set(tmp_path / "set", "ant", "bee", "cat")


def configured(root: Path, *options: str):
    return load_config(str(write_tiny(root.parent)), [*f"{SMALL} DATA.DATA_PATH {root}".split(), *options])


def opened(root: Path, *options: str, **how):
    config = configured(root, *options)
    return build_loaders(config, make_plan(config), **how)


def checked(root: Path, capsys) -> str:
    capsys.readouterr()
    run_check(configured(root))
    return capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# What is looked at
# ---------------------------------------------------------------------------------------------------------------------

LITTER = [
    ".ipynb_checkpoints/x.png", "._0.png", ".hidden.jpg", "__MACOSX/0.jpg", "@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg",
    "deeper/.cache/1.jpg", "Thumbs.db", ".DS_Store",
]  # fmt: skip


def test_hidden_and_system_files_are_looked_at_nowhere(animals, tmp_path, log, capsys):
    before = [list_input(animals)[1][split] for split in ("train", "val")]
    for split in ("train", "val"):
        for name in LITTER:
            for place in (animals / split / "ant", animals / split):
                (place / name).parent.mkdir(parents=True, exist_ok=True)
                (place / name).write_bytes(jpeg(7))
        shutil.rmtree(animals / split / "deeper")
    built = opened(animals)
    assert built.train.num_images == 12 and built.val.num_images == 6 and built.classes == ("ant", "bee", "cat")
    lines = [line for line in log.messages if "not used" in line]
    assert len(lines) == 2 and all("15 hidden or system files and folders, such as" in line for line in lines)
    assert [list_input(animals)[1][split] for split in ("train", "val")] == before
    assert Listing(animals / "val").folders == ["ant", "bee", "cat"]
    text = checked(animals, capsys)
    assert "train: 12 images, 3 classes" in text and "15 hidden or system files and folders are left out" in text
    assert "clean: no errors, no warnings" in text
    assert [path.name for path in find(animals / "val" / "ant")] == ["0.jpg", "1.jpg"]


def find(path: Path) -> list[Path]:
    from tools.checkpoints import find_images

    return find_images([path])


def test_a_flat_val_is_placed_without_what_systems_left_there(animals):
    val = animals / "val"
    for path in list(val.glob("*/*.jpg")):
        path.rename(val / f"{path.parent.name}{path.name}")
    for name in ("ant", "bee", "cat"):
        (val / name).rmdir()
    (val / "._ant0.jpg").write_bytes(b"AppleDouble")
    names = [path.name for path in val.glob("[!.]*.jpg")]
    truth = animals / "truth.txt"
    truth.write_text("".join(f"{name} {name[:3]}\n" for name in names))
    assert place_val(animals, truth, None) == (6, 0)
    assert (val / "._ant0.jpg").exists() and FolderSource(val).classes == ("ant", "bee", "cat")


def test_files_with_other_extensions_are_counted_in_one_line(animals, log, capsys):
    for name in ("a.jfif", "b.gif", "c.gif", "d.avif", "README"):
        (animals / "train" / "bee" / name).write_bytes(b"x")
    (animals / "train" / "loose.jpg").write_bytes(jpeg(3))
    opened(animals)
    (line,) = [line for line in log.messages if "not used" in line]
    assert "5 files without an image's extension (.gif 2, " in line and ".jfif 1" in line and "no extension 1" in line
    assert "1 images outside the class folders, such as" in line
    assert "5 files are no images by their extension" in checked(animals, capsys)


def test_a_folder_that_cannot_be_listed_is_named_not_skipped(animals, monkeypatch):
    (animals / "train" / "ant" / "locked").mkdir()
    scandir = os.scandir

    def refusing(path):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(DataError, match=r"ant/locked cannot be read: Permission denied"):
        FolderSource(animals / "train")


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------

BAD_LINKS = {
    "to what holds all classes": ("ant/up", ".."),
    "to the data set": ("ant/up", "../.."),
    "to the root of the disk": ("ant/up", "/"),
    "to itself": ("ant/self", "."),
    "to a folder around it": ("ant/deep/up", "../../ant"),
    "to another class": ("ant/other", "../bee"),
    "from a class to an earlier one": ("cat/other", "../bee"),
    "a class that is another": ("dog", "bee"),
    "elsewhere and back": ("ant/out", "{outside}"),
}


@pytest.mark.parametrize(("link", "target"), BAD_LINKS.values(), ids=BAD_LINKS)
def test_links_that_loop_or_reach_another_class_are_named(animals, tmp_path, link, target, capsys):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "back").symlink_to(animals / "train" / "cat")
    path = animals / "train" / link
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target.format(outside=outside))
    named = r"leads to \S+, which is a folder around it or belongs to another class; remove the link"
    with pytest.raises(DataError, match=named) as caught:
        FolderSource(animals / "train")
    shown = "train/cat" if "back" in str(caught.value) or link.startswith("cat") else link.rpartition("/")[2]
    assert shown in str(caught.value)
    text = checked(animals, capsys)
    assert "ERROR: " in text and "remove the link" in text
    assert prepare_imagenet([str(animals), str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()


def test_links_to_folders_elsewhere_keep_working_and_count_once(animals, tmp_path, log, capsys):
    elsewhere = tmp_path / "store" / "more"
    elsewhere.mkdir(parents=True)
    for i in range(3):
        (elsewhere / f"{i}.jpg").write_bytes(jpeg(500 + i))
    (animals / "train" / "ant" / "more").symlink_to(elsewhere)
    (animals / "train" / "ant" / "again").symlink_to(elsewhere)  # twice in one class: no other label, once counted
    shutil.move(animals / "train" / "bee", tmp_path / "store" / "bee")
    (animals / "train" / "bee").symlink_to(tmp_path / "store" / "bee")  # a class may be a link
    (animals / "train" / "cat" / "5.jpg").symlink_to(tmp_path / "store" / "more" / "0.jpg")  # and so may an image
    source = FolderSource(animals / "train")
    assert np.bincount(source.labels).tolist() == [4 + 3, 4, 4 + 1]
    assert sum("1 links to folders that are listed already" in line for line in log.messages) == 1
    text = checked(animals, capsys)
    assert "ERROR: 1 images are one file with another label" in text and "cat/5.jpg (label 2) is" in text
    assert "1 links lead to folders that are listed already" in text


def test_an_image_that_comes_hundreds_of_times_is_compared_in_one_pass(tmp_path, monkeypatch):
    contents, asked, stat = _Contents(), [], os.stat
    paths = [tmp_path / f"{number}.jpg" for number in range(200)]
    for path in paths:
        path.write_bytes(b"no longer available")
    monkeypatch.setattr(os, "stat", lambda path, **options: asked.append(path) or stat(path, **options))
    for number, path in enumerate(paths):
        contents.add("train", Image(str(path), number % 2, b"digest"), str(path))
    monkeypatch.undo()
    assert len(contents.relabelled) == 100 and not contents.one_file and len(asked) < 2 * len(paths)


def test_one_file_under_two_labels_is_an_error_and_a_copy_a_warning(animals, capsys):
    train = animals / "train"
    shutil.copy(train / "ant" / "0.jpg", train / "bee" / "copy.jpg")
    os.link(train / "bee" / "copy.jpg", train / "cat" / "hard.jpg")
    os.link(train / "ant" / "1.jpg", train / "ant" / "same label.jpg")
    text = checked(animals, capsys)
    assert "ERROR: 1 images are one file with another label" in text
    assert "cat/hard.jpg (label 2) is" in text and "bee/copy.jpg (label 1)" in text
    assert "WARNING: 2 images have the content of one with another label" in text
    assert "WARNING: 3 images repeat the content" in text


def test_broken_links_are_unreadable_images(animals):
    for name, target in (("gone.jpg", "nowhere"), ("loop.jpg", "loop.jpg")):
        (animals / "train" / "ant" / name).symlink_to(target)
    for name in ("gone", "loop"):  # in place of a class
        (animals / "train" / name).symlink_to(name if name == "loop" else "nowhere")
    source = FolderSource(animals / "train")
    assert len(source.labels) == 14 and source.classes == ("ant", "bee", "cat")
    for index in (4, 5):
        with pytest.raises(UnreadableImage, match=r"(gone|loop)\.jpg: (No such file|Too many levels)"):
            source.load(index)


# ---------------------------------------------------------------------------------------------------------------------
# Absent classes, one class, wrong levels
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "zip", "shards"])
def test_a_set_that_lacks_a_class_evaluates_by_the_names_of_the_checkpoint(tmp_path, kind, log):
    whole = make_set(tmp_path / "whole", "ant", "bee", "cat")
    part = make_set(tmp_path / "part", "ant", "cat")
    for path in (part / "val" / "cat").iterdir():  # the images of the whole set's class, which is its third
        shutil.copy(whole / "val" / "cat" / path.name, path)
    shutil.rmtree(whole / "val" / "ant")
    roots = [whole, part]
    if kind != "folder":
        roots = [prepared(root, tmp_path / f"{root.name}-{kind}", kind) for root in roots]
    cfg = write_tiny(tmp_path)
    options = f"{SMALL} DATA.FORMAT {kind} DATA.DATA_PATH"
    run(cfg, f"{options} {roots[0]}")
    if kind != "shards":  # what shards hold is not known before they are read
        assert "1 of 3 classes have no image in the validation set: ant" in log.text
    folder, results = folder_of(cfg), {}
    for root in roots:
        log.clear()
        run(cfg, f"{options} {root} EVAL_MODE True MODEL.RESUME {folder / 'max_acc.pth'}")
        with np.load(folder / "eval_val_predictions.npz") as stored:
            results[root.name] = {name: stored[name] for name in ("label", "file", "loss", "classes")}
        absent = ({"whole": "ant", "part": "bee"})[root.name.partition("-")[0]]
        assert f"validation images: 1 of 3 classes have no image ({absent})" in log.text
    first, second = results.values()
    assert first["label"].tolist() == [1, 1, 2, 2] and second["label"].tolist() == [0, 0, 2, 2]
    assert first["classes"].tolist() == second["classes"].tolist() == ["ant", "bee", "cat"]
    assert np.array_equal(first["loss"][2:], second["loss"][2:])  # the same images, the same labels


def prepared(root: Path, target: Path, kind: str) -> Path:
    prepare(root, target, Options(format=kind))
    return target


def test_released_weights_evaluate_a_part_of_imagenet(tmp_path):
    """1,000 outputs without names are ImageNet's classes in order."""
    config = configured(make_set(tmp_path / "set", imagenet_ids()[7], imagenet_ids()[999]))
    checkpoint = {"model": {"head.weight": torch.zeros(1000, 8), "head.bias": torch.zeros(1000)}}
    found = build_evaluation_set(config, make_plan(config), checkpoint, "released.pth")
    assert [label for _, labels in found.parts[0].open() for label in labels.tolist()] == [7, 7, 999, 999]
    assert found.num_classes == 1000 and found.classes == imagenet_ids()


def test_training_on_one_class_is_warned_of(tmp_path, log, capsys):
    root = make_set(tmp_path / "set", "photos", train=8)
    opened(root)
    assert "the training set has one class: there is nothing to tell apart" in log.text
    assert "WARNING: train has one class, photos" in checked(root, capsys)


def test_a_path_one_level_off_is_answered_with_the_right_one(animals, tmp_path, capsys):
    for path, split in ((animals / "train", "train"), (animals / "val", "val"), (tmp_path, "train")):
        with pytest.raises(DataError, match=rf"holds no {split}/; did you mean --data-path {animals}\?"):
            opened(path, train=split == "train")
        assert f"did you mean --data-path {animals}?" in checked(path, capsys)


def test_top5_is_not_shown_of_five_classes(tmp_path, log):
    for count in (5, 6):
        root = make_set(tmp_path / str(count), *(f"class {i}" for i in range(count)))
        log.clear()
        run(write_tiny(tmp_path), f"{SMALL} DATA.DATA_PATH {root} TAG t{count}")
        folder = folder_of(tmp_path / "tiny.yaml").with_name(f"t{count}")
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        shown = count == 6
        assert report([str(folder)]) == 0
        page = (folder / "report.html").read_text()
        assert ("top-5" in log.text) == ("top5" in records[-1]) == ("top-5 there" in page) == shown
        assert ('<th scope="col">top-5 (%)</th>' in page) == shown and "top-1 (%)" in page


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------


def test_printable_escapes_what_breaks_lines_terminals_and_files():
    assert printable("grüße 雪 a\\b.jpg") == "grüße 雪 a\\b.jpg"
    assert printable("a\nb\r\t\x1b[31m\x7f\x9b") == r"a\nb\r\t\x1b[31m\x7f\x9b"
    assert printable(os.fsdecode(b"caf\xe9\xff")) == r"caf\xe9\xff"
    assert printable("\u202egpj.exe \u2028\ud800") == r"\u202egpj.exe \u2028\ud800"
    assert printable_lines("one\ntwo\x07") == "one\ntwo\\x07"
    every = "".join(map(chr, range(0x11000)))
    for char in printable(every):
        char.encode()
        assert unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp")
    assert printable(printable(every)) == printable(every)


def test_no_name_commands_the_terminal_or_breaks_the_log(tmp_path, capsys):
    logger = setup_logger(0, tmp_path / "log.txt")
    try:
        raise ValueError("tensor layers.\x1b]0;title\x07\udcff")
    except ValueError:
        logger.exception("two\nlines of %s", "a\r\x1b[2K\u2028b")
    console, stored = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    assert console == stored and "] two\nlines of a\\r\\x1b[2K\\u2028b\nTraceback" in stored
    assert "tensor layers.\\x1b]0;title\\x07\\xff" in stored
    require_clean(stored)
    assert answer(lambda: int("\x1b[31m\udcff")) == 2
    assert answer(lambda: Path("\x1b[31m\udcff").read_text()) == 2
    error = capsys.readouterr().err
    assert "'\\x1b[31m" in error
    require_clean(error)


STRANGE = [os.fsdecode(b"caf\xe9"), "line\nbreak", "bell\x07\x1b[31m<b>&", "plain"]
SHOWN = [r"bell\x07\x1b[31m<b>&", r"caf\xe9", r"line\nbreak", "plain"]


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    """Classes and files whose names are no UTF-8, have line breaks, or command a terminal; also the folder's own."""
    root = tmp_path / os.fsdecode(b"r\xf6ot")
    make_set(root, *STRANGE, train=4, val=0)
    for name in STRANGE:
        for i, odd in enumerate((os.fsdecode(b"\xfcber.jpg"), "two\nlines\t.jpg", "\x1b]0;title\x07.jpg")):
            (root / "val" / name / odd).write_bytes(jpeg(hash(name) % 1000 + i, (32, 32)))
    return root


def require_clean(text: str) -> None:
    """Text that a terminal and any file take: nothing but lines of printable characters."""
    text.encode()
    assert printable_lines(text) == text


@pytest.mark.parametrize("kind", ["folder", "zip", "shards"])
def test_strange_names_from_preparing_to_the_report(strange, tmp_path, kind, log, capsys):
    (strange / "train" / STRANGE[0] / os.fsdecode(b"\xe9cut.jpg")).write_bytes(b"no image")
    target = tmp_path / "prepared"
    assert prepare_imagenet([str(strange), str(target), "--format", kind, "--workers", "1"]) == 1
    require_clean((target / "unreadable.txt").read_text().replace("\t", " ", 1))
    again = [str(strange), str(target), "--format", kind, "--workers", "1", "--skip-unreadable"]
    assert prepare_imagenet(again) == 0 and prepare_imagenet(again) == 0
    require_clean(capsys.readouterr().out)
    cfg = write_tiny(tmp_path)
    options = f"{SMALL} DATA.BATCH_SIZE 4 DATA.FORMAT {kind} DATA.DATA_PATH {target}"
    run(cfg, options)
    folder = folder_of(cfg)
    assert list(load_checkpoint(folder / "max_acc.pth")["classes"]) == SHOWN
    run(cfg, f"{options} EVAL_MODE True MODEL.RESUME {folder / 'max_acc.pth'}")
    require_clean((folder / "log.txt").read_text())
    with (folder / "eval_val_per_class.csv").open() as rows:
        assert [(row["class"], row["n"]) for row in csv.DictReader(rows)] == [(name, "3") for name in SHOWN]
    with np.load(folder / "eval_val_predictions.npz") as stored:
        assert stored["classes"].tolist() == SHOWN and len(set(stored["file"].tolist())) == 12
        for name in stored["file"].tolist():
            require_clean(name)
    capsys.readouterr()
    assert report([str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert r"bell\x07\x1b[31m&lt;b&gt;&amp;" in page and "Without" not in page
    require_clean(capsys.readouterr().out)


def test_strange_names_in_place_the_check_the_tools_and_a_run(strange, tmp_path, log, capsys):
    cfg = write_tiny(tmp_path)
    options = [*SMALL.split(), "DATA.DATA_PATH", str(strange)]
    main.main(load_config(str(cfg), options))
    folder = folder_of(cfg)
    weights = str(folder / "max_acc.pth")
    main.main(load_config(str(cfg), [*options, "EVAL_MODE", "True", "MODEL.RESUME", weights]))
    for name in ("log.txt", "eval_val.json", "eval_val_per_class.csv", "config.yaml", "environment.json"):
        require_clean((folder / name).read_text())
    assert str(strange) == load_config(str(folder / "config.yaml")).DATA.DATA_PATH
    assert report([str(folder)]) == 0 and "Without" not in (folder / "report.html").read_text()
    victim = strange / "val" / STRANGE[1] / "cut\n.jpg"
    victim.write_bytes(b"no image")
    capsys.readouterr()
    for form in ("table", "csv", "json"):
        output = tmp_path / f"p.{form}"
        assert predict(["--checkpoint", weights, str(strange / "val"), "--output", str(output)]) == 1
        text = output.read_text()
        require_clean(text)
        assert text.count("title") == 4 * (4 if form == "csv" else 1)  # four classes a row each
        captured = capsys.readouterr()
        require_clean(captured.err)
        assert r"cut\n.jpg: not an image" in captured.err
    images = [str(path) for path in sorted(strange.glob("val/*/*title*"))[:2]]
    assert visualize(["--checkpoint", weights, *images, "--output", str(tmp_path / "maps")]) == 0
    require_clean(capsys.readouterr().out)
    assert r"\x1b]0;title\x07.jpg" in (tmp_path / "maps" / "index.html").read_text()
    assert run_check(load_config(str(cfg), options)) == 1
    text = capsys.readouterr().out
    require_clean(text)
    assert r"cut\n.jpg: not an image" in text


def test_an_unreadable_validation_image_with_a_strange_name_is_why_a_run_stopped(strange, tmp_path, log):
    (strange / "val" / STRANGE[0] / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"caf\\xe9/a.jpg: not an image"):
        main.main(load_config(str(write_tiny(tmp_path)), [*SMALL.split(), "DATA.DATA_PATH", str(strange)]))
    assert r"caf\xe9/a.jpg: not an image" in (folder_of(tmp_path / "tiny.yaml") / "STOPPED").read_text()


def test_class_folders_that_are_written_alike_are_refused(tmp_path):
    root = make_set(tmp_path / "set", os.fsdecode(b"a\xff"), r"a\xff")
    with pytest.raises(DataError, match=r"train has two class folders that are written a\\xff; rename one"):
        opened(root)
