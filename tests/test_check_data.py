"""--check-data: every kind of damage is found and named, and nothing is found where nothing is wrong.

pytest tests/test_check_data.py
"""

import contextlib
import io
import json
import re
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from conftest import config_file, jpeg, run_main
from lra_caches import write_cache

import data.examination
import main
from config import ConfigError, load_config, parse_command_line
from data.builders import builder_of
from data.check import run_check
from data.findings import Report
from data.loaders import DataError
from data.sources.zip import ZipSource
from tools.prepare_imagenet import Options, prepare
from utils.distributed import LaunchError

CLASSES = ("n01440764", "n01443537", "n02119789")
FORMATS = ("folder", "zip", "shards")


def check(config):
    report = Report()
    builder_of(config).check(config, report)
    return report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder: 3 classes, 6 training and 3 validation images each."""
    root = tmp_path / "folder"
    for split, count in (("train", 6), ("val", 3)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.JPEG").write_bytes(jpeg(1000 * (split == "val") + 100 * label + i))
    return root


@pytest.fixture
def zipped(folder: Path, tmp_path: Path) -> Path:
    prepare(folder, tmp_path / "zip", Options(format="zip"))
    return tmp_path / "zip"


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    prepare(folder, tmp_path / "shards", Options(format="shards", shard_images=5))
    return tmp_path / "shards"


def examined(root: Path, *options: str) -> Report:
    kind = root.name if root.name in FORMATS else "auto"
    fixed = f"DATA.DATA_PATH {root} DATA.NUM_WORKERS 0 DATA.FORMAT {kind}".split()
    return check(load_config(config_file("pola_swin_t"), [*fixed, *options]))


def found(report: Report) -> tuple[list[str], list[str]]:
    """The texts of errors and of warnings."""
    return tuple([f.text for f in report.findings if f.is_error is is_error] for is_error in (True, False))


def only(report: Report, message: str, *examples: str, warning: bool = False) -> None:
    """Exactly one finding, that says `message` and names `examples`."""
    text = report.render()
    assert len(report.findings) == 1, text
    finding = report.findings[0]
    assert finding.is_error is not warning and re.search(message, finding.text), text
    for example in examples:
        assert any(example in shown for shown in finding.examples), text


# ---------------------------------------------------------------------------------------------------------------------
# All formats
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_sound_data_set_is_clean(kind, workers, request):
    root = request.getfixturevalue("zipped" if kind == "zip" else kind)
    report = examined(root, "DATA.NUM_WORKERS", workers)
    text = report.render()
    assert report.is_clean and "clean: no errors, no warnings" in text
    assert "train: 18 images, 3 classes, 6 to 6 images a class" in text
    assert "val: 9 images, 3 classes, 3 to 3 images a class" in text


def _truncate(data: bytes) -> bytes:
    return data[:-30]


def _cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _text(data: bytes) -> bytes:
    return b"not an image" * 9


def _empty(data: bytes) -> bytes:
    return b""


@pytest.mark.parametrize("spoil", [_truncate, _cut, _text, _empty], ids=lambda spoil: spoil.__name__.strip("_"))
@pytest.mark.parametrize("kind", FORMATS)
def test_unreadable_and_truncated_images_are_named(folder, tmp_path, kind, spoil):
    """Damage is planted before packing, so that archives are sound and their images are not."""
    victims = [folder / "train" / CLASSES[1] / "2.JPEG", folder / "val" / CLASSES[2] / "0.JPEG"]
    for place, victim in enumerate(victims):
        victim.write_bytes(spoil(victim.read_bytes()) + bytes(place))  # not the same content twice
    if kind == "zip":
        names = pack_zip(folder, tmp_path / "zip")
        root = tmp_path / "zip"
    elif kind == "shards":
        names = pack_shards(folder, tmp_path / "shards")
        root = tmp_path / "shards"
    else:
        names, root = {str(victim): str(victim) for victim in victims}, folder
    report = examined(root, "DATA.NUM_WORKERS", "2")
    errors, warnings = found(report)
    assert errors == [f"{split}: 1 images are unreadable or truncated" for split in ("train", "val")], report.render()
    assert not warnings
    for finding, victim in zip(report.findings, victims, strict=True):
        assert names[str(victim)] in finding.examples[0]


def pack_zip(folder: Path, root: Path) -> dict[str, str]:
    """Zips and maps of a folder as it is; returns the display name of every file."""
    root.mkdir()
    names = {}
    for split in ("train", "val"):
        with zipfile.ZipFile(root / f"{split}.zip", "w") as archive, (root / f"{split}_map.txt").open("w") as lines:
            for path in sorted((folder / split).glob("*/*")):
                member = f"{path.parent.name}/{path.name}"
                archive.write(path, member)
                lines.write(f"{member}\t{CLASSES.index(path.parent.name)}\n")
                names[str(path)] = f"{root / split}.zip/{member}"
    return names


def pack_shards(folder: Path, root: Path) -> dict[str, str]:
    """One shard a split of a folder as it is; returns the display name of every file."""
    root.mkdir()
    names, splits = {}, {}
    for split in ("train", "val"):
        path = root / f"{split}-000000.tar"
        files = sorted((folder / split).glob("*/*"))
        with tarfile.open(path, "w") as archive:
            for number, file in enumerate(files):
                for extension, content in (
                    ("jpg", file.read_bytes()),
                    ("cls", str(CLASSES.index(file.parent.name)).encode()),
                ):
                    member = tarfile.TarInfo(f"{number:04d}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                names[str(file)] = f"{path}/{number:04d}.jpg"
        entry = {"name": path.name, "images": len(files), "bytes": path.stat().st_size}
        splits[split] = {"images": len(files), "shards": [entry]}
    (root / "shards.json").write_text(json.dumps({"version": 1, "splits": splits, "classes": CLASSES}))
    return names


@pytest.mark.parametrize("kind", FORMATS)
def test_duplicates_within_and_between_splits_and_labels_are_told_apart(folder, tmp_path, kind):
    train, val = folder / "train", folder / "val"
    shutil.copy(train / CLASSES[0] / "0.JPEG", train / CLASSES[0] / "7.JPEG")
    shutil.copy(train / CLASSES[0] / "1.JPEG", train / CLASSES[1] / "8.JPEG")
    shutil.copy(train / CLASSES[2] / "3.JPEG", val / CLASSES[2] / "9.JPEG")
    root = folder
    if kind != "folder":
        root = tmp_path / kind
        prepare(folder, root, Options(format=kind, shard_images=5))
    errors, warnings = found(examined(root, "DATA.NUM_WORKERS", "2"))
    assert not errors
    assert warnings == [
        "1 images are in train and in val with the same content",
        "2 images repeat the content of another of their split",
        "1 images have the content of one with another label",
    ]


def test_a_class_that_one_split_lacks(folder):
    shutil.rmtree(folder / "val" / CLASSES[0])
    only(examined(folder), "val lacks 1 classes of train", CLASSES[0], warning=True)
    shutil.copytree(folder / "train" / CLASSES[2], folder / "val" / "n09999999")
    for path in (folder / "val" / "n09999999").iterdir():
        path.write_bytes(jpeg(int(path.stem) + 5000))
    report = examined(folder)
    assert found(report) == (["val has 1 classes that train lacks"], ["val lacks 1 classes of train"])
    assert report.render().index("ERROR") < report.render().index("WARNING")
    assert "1 kinds of errors, 1 of warnings" in report.render()


# ---------------------------------------------------------------------------------------------------------------------
# Folder
# ---------------------------------------------------------------------------------------------------------------------


def test_a_flat_val_names_the_tool_that_mends_it(folder):
    for path in list((folder / "val").glob("*/*")):
        path.rename(folder / "val" / f"ILSVRC2012_val_{path.parent.name}_{path.name}")
    for name in CLASSES:
        (folder / "val" / name).rmdir()
    only(
        examined(folder),
        r"val is flat: 9 images and no class folders; `python -m tools.prepare_imagenet DATA_PATH --val-",
    )


def test_loose_images_empty_classes_and_other_files(folder):
    (folder / "val" / CLASSES[0] / "0.JPEG").rename(folder / "val" / "loose.JPEG")
    only(
        examined(folder), r"val: 1 images lie outside the class folders and are not used; `python -m", "val/loose.JPEG"
    )
    (folder / "val" / "loose.JPEG").rename(folder / "val" / CLASSES[0] / "0.JPEG")
    (folder / "train" / CLASSES[0] / "notes.txt").write_text("")
    only(examined(folder), "1 files are no images by their extension", "notes.txt", warning=True)
    (folder / "train" / CLASSES[0] / "notes.txt").unlink()
    (folder / "train" / ".cache").mkdir()
    assert examined(folder).is_clean
    for split in ("train", "val"):
        (folder / split / "n09999999").mkdir()
    errors, _ = found(examined(folder))
    assert errors == [f"{folder / s}: 1 class folders hold no image; fill or remove them" for s in ("train", "val")]


def test_absent_and_empty_folders(folder):
    shutil.rmtree(folder / "val")
    only(examined(folder), r"val does not exist")
    (folder / "val").mkdir()
    errors, warnings = found(examined(folder))
    assert errors == [f"{folder / 'val'} is empty, expected {folder / 'val'}/<class>/<image>"] and not warnings
    shutil.rmtree(folder)
    only(examined(folder), "data set folder .* does not exist")


@pytest.mark.parametrize("counts", [(1_281_167, 50_000), (1_281_166, 50_000), (1_281_167, 49_999)])
def test_a_thousand_wordnet_classes_are_expected_to_be_imagenet(tmp_path, counts, monkeypatch):
    """Empty files stand for the images, and looking into them is left out."""
    classes = [f"n{i:08d}" for i in range(1000)]
    for split in ("train", "val"):
        for name in classes:
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.JPEG").touch()
    expected = dict(zip(("train", "val"), counts, strict=True))

    def counted(tasks, workers, report):
        assert sum(len(task.names) for task in tasks) == 2000
        seen = {split: data.examination.Counter(range(1000)) for split in expected}
        for split, count in expected.items():
            seen[split][0] += count - 1000
        return seen

    monkeypatch.setattr(data.examination, "examine_all", counted)
    report = examined(tmp_path)
    if counts == (1_281_167, 50_000):
        assert report.is_clean and "1,281,167 images, 1,000 classes" in report.render()
    elif counts[0] == 1_281_166:
        only(report, "train has the 1,000 classes of ImageNet and 1,281,166 images, expected 1,281,167")
    else:
        only(report, "val has the 1,000 classes of ImageNet and 49,999 images, expected 50,000")


def test_a_subset_of_imagenet_is_only_noted(folder):
    assert "WordNet ids, but not the 1,000 classes of ImageNet" in examined(folder).render()


# ---------------------------------------------------------------------------------------------------------------------
# Zip
# ---------------------------------------------------------------------------------------------------------------------


def test_map_and_zip_are_compared_both_ways(zipped):
    path = zipped / "val_map.txt"
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
    only(examined(zipped), "contains 1 images without a", f"{CLASSES[0]}/0.JPEG")
    path.write_text(text + f"{CLASSES[0]}/99.JPEG\t0\n")
    only(examined(zipped), "names 1 files that val.zip does not contain", f"line 10: {CLASSES[0]}/99.JPEG")
    path.write_text(text + lines[0])
    only(examined(zipped), "names 1 files again", f"line 10: {CLASSES[0]}/0.JPEG")
    path.write_text(text.replace("\t", " ", 1))
    errors, _ = found(examined(zipped))
    assert (
        len(errors) == 2 and "1 lines are not `path<TAB>label`" in errors[0] and "without a (valid) line" in errors[1]
    )
    path.write_text("\n")
    assert "names no image of val.zip" in examined(zipped).render()
    path.unlink()
    only(examined(zipped), "val_map.txt does not exist")


def test_a_checksum_that_does_not_fit_is_found(zipped):
    path = zipped / "train.zip"
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[4]
        content = archive.read(info)
    raw = path.read_bytes()
    place = raw.index(content)
    comment = place + content.index(b"JFIF")  # bytes that no decoder looks at twice
    path.write_bytes(raw[:comment] + b"X" + raw[comment + 1 :])
    only(
        examined(zipped, "DATA.NUM_WORKERS", "2"),
        "train: 1 images are unreadable",
        f"{info.filename}: the zip's size or checksum of this file is another one",
    )


def test_labels_of_the_zip_are_compared(zipped):
    maps = [zipped / f"{split}_map.txt" for split in ("train", "val")]
    swapped = {"\t0": "\t2", "\t2": "\t0"}
    texts = [path.read_text() for path in maps]

    def swap(text: str) -> str:
        return re.sub("\t[02]", lambda match: swapped[match[0]], text)

    maps[1].write_text(swap(texts[1]))
    errors, _ = found(examined(zipped))
    assert "train and val give 2 labels to different classes" in errors
    assert "val: labels do not follow the sorted WordNet ids, which released checkpoints expect" in errors
    maps[0].write_text(swap(texts[0]))
    errors, _ = found(examined(zipped))
    assert [error.split(":")[0] for error in errors] == ["train", "val"] and "sorted WordNet ids" in errors[0]
    for path, text in zip(maps, texts, strict=True):
        path.write_text(text.replace("\t2", "\t3"))
    errors, warnings = found(examined(zipped))
    assert errors == [f"{maps[0]}: 1 labels have no image"] and warnings == [f"{maps[1]}: 1 labels have no image"]
    for path, text in zip(maps, texts, strict=True):
        path.write_text(text.replace("1.JPEG\t2", "1.JPEG\t1"))
    _, warnings = found(examined(zipped))
    assert len(warnings) == 2 and "1 labels have images of several folders" in warnings[0]


def test_the_check_names_the_classes_of_a_zip_as_training_does(tmp_path):
    for split, folders in {"train": ["more/ant", "ant", "bee"], "val": ["ant", "bee", "bee"]}.items():
        names = [f"{folder}/{number}.jpg" for number, folder in enumerate(folders)]
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            for number, name in enumerate(names):
                archive.writestr(name, jpeg(10 * len(split) + number))
        labels = [["ant", "bee"].index(Path(name).parent.name) for name in names]
        (tmp_path / f"{split}_map.txt").write_text("".join(f"{n}\t{x}\n" for n, x in zip(names, labels, strict=True)))
    assert ZipSource(tmp_path / "train.zip", tmp_path / "train_map.txt").classes == ("ant", "bee")
    assert found(examined(tmp_path, "DATA.ZIP_MODE", "True")) == ([], [])


def test_a_damaged_zip_is_named(zipped):
    (zipped / "val.zip").write_bytes((zipped / "val.zip").read_bytes()[:-40])
    only(examined(zipped), r"val\.zip is not a readable zip file: it does not end as a zip file does")


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def edit_index(root: Path, change) -> None:
    path = root / "shards.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def test_missing_short_and_unlisted_shards(shards):
    path = shards / "train-000001.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    errors, _ = found(examined(shards, "DATA.NUM_WORKERS", "2"))
    assert len(errors) == 2 and "1 of 4 train shards are missing or of another size" in errors[0]
    assert "1 problems in the contents of shards" in errors[1]
    path.unlink()
    only(examined(shards), "1 of 4 train shards are missing or of another size", "train-000001.tar: No such file")
    path.write_bytes(content)
    shutil.copy(path, shards / "train-000009.tar")
    only(examined(shards), "1 train shards are not in shards.json and are not used", "train-000009.tar", warning=True)


def test_counts_and_labels_that_differ_from_the_index(shards):
    def fewer(tree):
        tree["splits"]["val"]["shards"][0]["images"] -= 1
        tree["splits"]["val"]["images"] -= 1

    edit_index(shards, fewer)
    only(examined(shards), "1 problems in the contents of shards", "val-000000.tar holds 5 images, shards.json says 4")
    edit_index(shards, lambda tree: tree["splits"]["val"].update(images=9))
    only(examined(shards), "the counts of the val shards do not add up")


def test_labels_and_classes_of_shards(shards):
    def last_class_lost(tree):
        tree["classes"] = tree["classes"][:2]

    edit_index(shards, last_class_lost)
    errors, _ = found(examined(shards))
    assert errors == [f"{split}: labels beyond the 2 classes" for split in ("train", "val")]
    edit_index(shards, lambda tree: tree.update(classes=[CLASSES[2], CLASSES[0], CLASSES[1]]))
    errors, _ = found(examined(shards))
    assert len(errors) == 2 and all("do not follow the sorted WordNet ids" in error for error in errors)


def test_a_sample_without_its_label_is_named(shards):
    path = shards / "val-000000.tar"
    size = path.stat().st_size
    with tarfile.open(path) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w") as archive:
        for member, content in members[:1] + members[2:]:
            archive.addfile(member, io.BytesIO(content))
    with path.open("ab") as file:
        file.truncate(size)
    message = "sample 00000000_0 has jpg, expected an image and a cls"
    only(examined(shards), "1 problems in the contents of shards", message)


def test_a_damaged_index_is_named(shards):
    (shards / "shards.json").write_text("{")
    only(examined(shards), "shards.json cannot be read")


# ---------------------------------------------------------------------------------------------------------------------
# Token caches
# ---------------------------------------------------------------------------------------------------------------------


def tokens_report(root: str | Path, *options: str) -> Report:
    fixed = ["DATA.DATA_PATH", str(root), "CHECK_DATA_MODE", "True"]
    return check(load_config(config_file("lra/listops"), [*fixed, *options]))


def test_a_whole_token_cache_is_clean_and_told_by_split(tmp_path):
    report = tokens_report(write_cache(tmp_path / "data", "listops", samples=96, classes=3))
    assert report.is_clean
    told = report.render().splitlines()
    assert told[0] == f"{tmp_path / 'data'}: token cache, listops (for a test)"
    found = [re.fullmatch(r"(\w+): 96 samples, 3 classes, (\d+) to (\d+) samples a class", line) for line in told[1:4]]
    assert [line[1] for line in found] == ["train", "val", "test"]
    assert all(0 < int(line[2]) <= 32 <= int(line[3]) for line in found)
    assert told[4:] == ["longest document: 24 symbols", "clean: no errors, no warnings"]


def test_a_damaged_token_cache_and_one_that_the_model_does_not_fit_are_errors(tmp_path):
    root = write_cache(tmp_path / "data", "listops")
    only(tokens_report(root, "MODEL.LRA.LENGTH", "20"), "has 24 tokens, MODEL.LRA.LENGTH is 20")
    only(tokens_report(root, "DATA.LRA.TASK", "text"), "holds the task listops, DATA.LRA.TASK is text")
    only(tokens_report(tmp_path / "absent"), "absent does not exist")
    only(tokens_report(tmp_path), r"is not finished \(manifest.json is missing\)")
    labels = root / "val.labels.npy"
    data = labels.read_bytes()
    labels.write_bytes(data[:-1] + bytes([(data[-1] + 1) % 3]))
    only(tokens_report(root), "val.labels.npy is damaged: SHA-256")
    labels.write_bytes(data[:-1])
    only(tokens_report(root), "val.labels.npy has")
    with pytest.raises(DataError, match="--data-path names the folder that tools/prepare_lra.py wrote"):
        tokens_report("")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_a_report_and_exits_1_on_findings(folder, tmp_path):
    arguments = [
        "--cfg",
        config_file("pola_swin_t"),
        "--data-path",
        folder,
        "--output",
        tmp_path / "out",
        "--check-data",
    ]
    arguments += ["--opts", "DATA.NUM_WORKERS", "2"]
    (folder / "train" / CLASSES[0] / "0.JPEG").write_bytes(b"")
    result = run_main(*arguments, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "ERROR: train: 1 images are unreadable or truncated\n    " in result.stdout
    assert not (tmp_path / "out").exists()


def test_no_model_is_built_and_the_exit_code_is_that_of_the_report(folder, monkeypatch, capsys):
    monkeypatch.setattr(main, "build_model", None)
    monkeypatch.setattr(main, "setup", None)
    options = ["CHECK_DATA_MODE", "True", "DATA.DATA_PATH", str(folder), "DATA.NUM_WORKERS", "0"]
    config = load_config(config_file("pola_swin_t"), options)
    with pytest.raises(SystemExit) as caught:
        main.main(config)
    assert caught.value.code == 0
    main.reported(config)  # as the command line calls it: an exit code of 0 is no failure
    (folder / "val" / CLASSES[0] / "notes.txt").write_text("")
    with pytest.raises(SystemExit) as caught:  # a warning is a finding too
        main.reported(config)
    assert caught.value.code == 1 and "WARNING" in capsys.readouterr().out


def test_settings_that_cannot_work_are_explained(folder, monkeypatch, capsys):
    with pytest.raises(ConfigError, match="--throughput and --check-data exclude each other"):
        load_config(config_file("pola_swin_t"), ["THROUGHPUT_MODE", "True", "CHECK_DATA_MODE", "True"])
    assert parse_command_line(["--cfg", config_file("pola_swin_t"), "--check-data"]).CHECK_DATA_MODE
    with pytest.raises(DataError, match="--data-path names the folder"):
        run_check(load_config(config_file("pola_swin_t")))
    assert run_check(load_config(config_file("quickstart"))) == 0
    assert "digits ship with scikit-learn" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="start it without torchrun"):
        run_check(load_config(config_file("quickstart")))


def test_long_lists_are_shortened_and_a_terminal_gets_a_bar(folder, monkeypatch):
    report = Report()
    report.error("many", [f"file {i}" for i in range(1234)])
    assert report.render().count("    file") == 10 and "    … and 1,224 more\n" in report.render()
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with contextlib.redirect_stderr(terminal):
        monkeypatch.setattr(sys, "stderr", terminal)
        examined(folder)
    assert "27/27" in terminal.getvalue() and "img/s" in terminal.getvalue()
