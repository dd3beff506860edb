"""Zip files and shards that are damaged, hostile, or made by other tools.

pytest tests/test_odd_archives.py
"""

import io
import json
import logging
import os
import struct
import tarfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
from conftest import jpeg, write_tiny

from config import load_config, make_plan
from data.check import run_check
from data.loaders import Loaders, build_loaders
from data.sources.base import DataError, UnreadableImage, label_of
from data.sources.token_cache import open_cache
from data.sources.zip import ZipSource
from data.test_sets import read_real_labels
from logger import read_records

IMAGES = {f"{name}/{i}.jpg": jpeg(10 * label + i, (32, 32)) for label, name in enumerate("ab") for i in range(4)}
LABELS = {name: "ab".index(name[0]) for name in IMAGES}


def make_zips(root: Path, images: dict[str, bytes] = IMAGES, labels: dict[str, object] = LABELS) -> Path:
    root.mkdir()
    for split in ("train", "val"):
        with zipfile.ZipFile(root / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in images.items():
                archive.writestr(name, content)
        write_map(root, split, labels)
    return root


def write_map(root: Path, split: str, labels: dict[str, object]) -> None:
    lines = "".join(f"{name}\t{label}\n" for name, label in labels.items())
    (root / f"{split}_map.txt").write_bytes(lines.encode("utf-8", "surrogateescape"))


def configured(root: Path, kind: str = "zip"):
    options = f"DATA.DATASET imagenet DATA.FORMAT {kind} DATA.DATA_PATH {root} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 4"
    return load_config(str(write_tiny(root.parent)), [*options.split(), "DATA.NUM_WORKERS", "0"])


def loaders(root: Path, kind: str = "zip", **how) -> Loaders:
    config = configured(root, kind)
    return build_loaders(config, make_plan(config), **how)


def checked(root: Path, capsys, kind: str = "zip") -> str:
    run_check(configured(root, kind))
    return capsys.readouterr().out


def source(root: Path) -> ZipSource:
    return ZipSource(root / "train.zip", root / "train_map.txt")


# ---------------------------------------------------------------------------------------------------------------------
# Members of a zip
# ---------------------------------------------------------------------------------------------------------------------

VICTIM = "a/2.jpg"


def edit_directory(path: Path, offset: int, form: str, value: int) -> None:
    """Change a field of the victim's entry in the zip's directory."""
    raw = bytearray(path.read_bytes())
    place = raw.rindex(VICTIM.encode()) - 46
    assert raw[place : place + 4] == b"PK\1\2"
    struct.pack_into(form, raw, place + offset, value)
    path.write_bytes(raw)


def edit_wide(path: Path, **values: int) -> None:
    """The same with 64-bit sizes and place, in the extra field."""
    raw = path.read_bytes()
    place = raw.rindex(VICTIM.encode()) - 46
    entry, rest = bytearray(raw[place : place + 46]), raw[place + 46 :]
    size, original, offset = (struct.unpack_from("<L", entry, at)[0] for at in (20, 24, 42))
    wide = struct.pack(
        "<2H3Q", 1, 24, values.get("original", original), values.get("size", size), values.get("offset", offset)
    )
    for at in (20, 24, 42):
        struct.pack_into("<L", entry, at, 0xFFFFFFFF)
    struct.pack_into("<H", entry, 30, len(wide))
    raw = bytearray(raw[:place] + entry + rest[: len(VICTIM)] + wide + rest[len(VICTIM) :])
    end = raw.rindex(b"PK\5\6")
    struct.pack_into("<L", raw, end + 12, struct.unpack_from("<L", raw, end + 12)[0] + len(wide))
    path.write_bytes(raw)


DAMAGE = {
    "size": lambda path: edit_directory(path, 20, "<L", 0xFFFFFFFE),
    "original size": lambda path: edit_directory(path, 24, "<L", 0xFFFFFFF0),
    "original size too small": lambda path: edit_directory(path, 24, "<L", 10),
    "no size": lambda path: edit_directory(path, 20, "<L", 0),
    "place": lambda path: edit_directory(path, 42, "<L", 0xFFFFFFF0),
    "place of another": lambda path: edit_directory(path, 42, "<L", 0),
    "method": lambda path: edit_directory(path, 10, "<H", 0),
    "wide size": lambda path: edit_wide(path, size=1 << 63),
    "widest size": lambda path: edit_wide(path, size=(1 << 64) - 1),
    "wide original size": lambda path: edit_wide(path, original=(1 << 64) - 1),
    "wide place": lambda path: edit_wide(path, offset=1 << 62),
    "widest place": lambda path: edit_wide(path, offset=(1 << 64) - 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_member_whose_numbers_do_not_fit_is_one_unreadable_image(tmp_path, damage, capsys):
    root = make_zips(tmp_path / "set")
    damage(root / "train.zip")
    built = loaders(root)
    built.train.set_epoch(0)
    tracemalloc.start()
    assert sum(len(labels) for _, labels in built.train) == 8
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    (told,) = built.train.unreadable
    assert told.startswith(f"{root}/train.zip:{VICTIM}: ")
    text = checked(root, capsys)
    assert "ERROR: train: 1 images are unreadable" in text and f"{root}/train.zip/{VICTIM}: " in text


def test_a_member_that_inflates_beyond_its_size_takes_no_memory(tmp_path):
    """60 MB of zeros that say they are 3,000 bytes; and 600 MB that say so themselves."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = packer.compress(bytes(60_000_000)) + packer.flush()
    root = make_zips(tmp_path / "set", IMAGES | {VICTIM: bomb})
    for said, message in ((3000, "the zip's size or checksum"), (600_000_000, "600,000,000 bytes, expected at most")):
        with zipfile.ZipFile(root / "train.zip", "w") as archive:  # stored, then called deflated
            archive.writestr(VICTIM, bomb)
        edit_directory(root / "train.zip", 10, "<H", 8)
        edit_directory(root / "train.zip", 24, "<L", said)
        write_map(root, "train", {VICTIM: 0})
        opened = source(root)
        tracemalloc.start()
        with pytest.raises(UnreadableImage, match=message):
            opened.load(0)
        assert tracemalloc.get_traced_memory()[1] < 1e6
        tracemalloc.stop()


def test_the_directory_s_flags_and_methods_are_named_in_any_bytes(tmp_path):
    root = make_zips(tmp_path / "set")
    path = root / "train.zip"
    raw = bytearray(path.read_bytes())
    place = raw.rindex(VICTIM.encode()) - 46
    raw[place + 46] = 0xE9  # with the flag for UTF-8, which it is not
    struct.pack_into("<H", raw, place + 8, 0x801)
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"not a readable zip file: \\xe9/2.jpg is encrypted"):
        source(root)


# ---------------------------------------------------------------------------------------------------------------------
# Maps
# ---------------------------------------------------------------------------------------------------------------------


ODD_LABELS = ["2000000000", "99999999999", "9" * 5000, "1000000", "-1", "1.0", "", "٣", "0x1", "1_0"]


@pytest.mark.parametrize("label", ODD_LABELS)
def test_labels_beyond_reason_are_named(tmp_path, label, capsys):
    root = make_zips(tmp_path / "set")
    write_map(root, "train", LABELS | {VICTIM: label})
    message = r"train_map.txt line 3: expected `path<TAB>label`, received 'a/2.jpg"
    with pytest.raises(DataError, match=message) as caught:
        loaders(root)
    assert len(str(caught.value)) < 400
    text = checked(root, capsys)
    assert "ERROR: " in text and "1 lines are not `path<TAB>label`" in text and len(text.replace(str(root), "")) < 1000


def test_the_largest_label_that_is_read():
    assert label_of("999999") == 999_999 and label_of(b" 7\r\n") == 7
    for text in ("1000000", "9" * 5000, b"9" * 5000, "", b"", "a", "²", "٣", b"\xff", "-1", "1.5"):
        assert label_of(text) is None


@pytest.mark.parametrize("shift", [{"a": 1, "b": 2}, {"a": 0, "b": 2}, {"a": 0, "b": 999_999}])
def test_labels_with_gaps_are_refused_in_training_as_in_the_check(tmp_path, shift, capsys):
    root = make_zips(tmp_path / "set")
    for split in ("train", "val"):
        write_map(root, split, {name: shift[name[0]] for name in IMAGES})
    with pytest.raises(DataError, match=r"labels from 0 to \d+ have no image \([01].*; number the classes from 0"):
        loaders(root)
    text = checked(root, capsys)
    assert "ERROR: " in text and "labels have no image" in text
    assert loaders(root, train=False).val.num_images == 8  # a validation set may lack classes


def test_a_validation_map_that_lacks_a_class_is_still_compared(tmp_path):
    root = make_zips(tmp_path / "set")
    write_map(root, "val", {name: 1 for name in IMAGES if name[0] == "b"})
    assert loaders(root).classes == ("a", "b")
    write_map(root, "val", {name: 1 for name in IMAGES if name[0] == "a"})
    with pytest.raises(DataError, match="disagree: 1 is b and a"):
        loaders(root)


def test_an_image_that_a_map_or_a_zip_names_twice_is_refused(tmp_path, capsys):
    root = make_zips(tmp_path / "set")
    good = (root / "train_map.txt").read_text()
    for line in (f"{VICTIM}\t0\n", f"{VICTIM}\t1\n"):
        (root / "train_map.txt").write_text(good + line)
        with pytest.raises(DataError, match=f"train_map.txt names {VICTIM} more than once"):
            loaders(root)
        assert "ERROR: " in checked(root, capsys)
    (root / "train_map.txt").write_text(good)
    with zipfile.ZipFile(root / "train.zip", "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(VICTIM, jpeg(99))
    with pytest.raises(DataError, match=f"train.zip contains {VICTIM} more than once"):
        loaders(root)
    assert "ERROR: " in checked(root, capsys)


def test_maps_of_other_encodings(tmp_path, capsys):
    names = {name.replace("a/", "caf\u00e9/"): content for name, content in IMAGES.items()}
    labels = {name: int(name[0] == "b") for name in names}
    root = make_zips(tmp_path / "set", names, labels)
    good = (root / "train_map.txt").read_bytes()
    assert loaders(root).classes == ("caf\u00e9", "b")
    for accepted in (b"\xef\xbb\xbf" + good, good.replace(b"\n", b"\r\n"), b"\n \n" + good):
        (root / "train_map.txt").write_bytes(accepted)
        assert loaders(root).train.num_images == 8
    text = good.decode()
    for encoding, message in (
        ("latin-1", r"line 1 names 'caf\\xe9/0.jpg', which \S+train.zip does not contain; names are in UTF-8"),
        ("utf-16", r"line 1: expected `path<TAB>label`, received '\\xff\\xfec\\x00a"),
    ):
        (root / "train_map.txt").write_bytes(text.encode(encoding))
        with pytest.raises(DataError, match=message):
            loaders(root)
        assert "ERROR: " in checked(root, capsys)


def test_hidden_members_are_left_out_of_maps_and_findings(tmp_path, capsys, log):
    log.set_level(logging.INFO, "polaformer")
    litter = {"__MACOSX/a/._0.jpg": b"AppleDouble", "a/.ipynb_checkpoints/0.jpg": b"x"}
    root = make_zips(tmp_path / "set", IMAGES | litter)
    write_map(root, "train", LABELS | dict.fromkeys(litter, 1))
    built = loaders(root)
    assert built.train.num_images == 8 and built.classes == ("a", "b")
    assert "train_map.txt: 2 hidden or system files are left out, such as __MACOSX/a/._0.jpg" in log.text
    assert "ERROR" not in checked(root, capsys)


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def members(count: int = 4) -> list[tuple[str, bytes]]:
    return [
        entry
        for i in range(count)
        for entry in ((f"{i:04d}.jpg", jpeg(i, (32, 32))), (f"{i:04d}.cls", str(i % 2).encode()))
    ]


def write_tar(path: Path, entries: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in entries:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def make_shards(root: Path, entries: list[tuple[str, bytes]] | None = None, said: object = 4) -> Path:
    root.mkdir()
    splits = {}
    for split in ("train", "val"):
        path = root / f"{split}-000000.tar"
        write_tar(path, members() if split == "val" or entries is None else entries)
        images = 4 if split == "val" else said
        splits[split] = {
            "images": images,
            "shards": [{"name": path.name, "images": images, "bytes": path.stat().st_size}],
        }
    (root / "shards.json").write_text(json.dumps({"version": 1, "splits": splits, "classes": ["a", "b"]}))
    return root


def labels_seen(root: Path) -> list[int]:
    built = loaders(root, "shards")
    built.train.set_epoch(0)
    return sorted(label for _, labels in built.train for label in labels.tolist())


@pytest.mark.parametrize("said", [-4, 0, 2.0, "4", True, None])
def test_counts_that_are_none_are_refused_when_the_index_is_read(tmp_path, said, capsys):
    root = make_shards(tmp_path / "set", said=said)
    with pytest.raises(DataError, match=r"shards.json"):
        labels_seen(root)
    assert "ERROR: " in checked(root, capsys, "shards")


DEEP = "[" * 100_000 + "]" * 100_000
ODD_INDEXES = {
    "deep": (lambda tree: DEEP, "shards.json cannot be read: maximum recursion depth"),
    "classes that are text": (lambda tree: tree | {"classes": "ab"}, "classes is no list of names"),
    "classes that are a table": (lambda tree: tree | {"classes": {"a": 0, "b": 1}}, "classes is no list of names"),
    "classes that are numbers": (lambda tree: tree | {"classes": [0, 1]}, "classes is no list of names"),
    "a class twice": (lambda tree: tree | {"classes": ["a", "a"]}, "names a class more than once"),
    "a version of another kind": (lambda tree: tree | {"version": "1\n\x1b[31m"}, r"is of version 1\\n\\x1b\[31m, exp"),
    "splits that are a list": (lambda tree: tree | {"splits": [1]}, "is no index of shards"),
}


@pytest.mark.parametrize(("edit", "message"), ODD_INDEXES.values(), ids=ODD_INDEXES)
def test_odd_indexes_of_shards_are_refused_in_one_line(tmp_path, edit, message, capsys):
    root = make_shards(tmp_path / "set")
    tree = edit(json.loads((root / "shards.json").read_text()))
    (root / "shards.json").write_text(tree if isinstance(tree, str) else json.dumps(tree))
    with pytest.raises(DataError, match=message) as caught:
        labels_seen(root)
    assert "\n" not in str(caught.value) and "ERROR: " in checked(root, capsys, "shards")


@pytest.mark.parametrize(
    ("name", "message"), [("a\nb.tar", r"a\\nb.tar has"), ("a\0b", r"a\\x00b has"), ("", "no regular")]
)
def test_names_that_no_shard_can_have_are_refused(tmp_path, name, message):
    root = make_shards(tmp_path / "set")
    tree = json.loads((root / "shards.json").read_text())
    tree["splits"]["train"]["shards"][0]["name"] = name
    (root / "shards.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message) as caught:
        labels_seen(root)
    assert "\n" not in str(caught.value)


def test_a_shard_that_is_listed_twice_is_refused(tmp_path, capsys):
    root = make_shards(tmp_path / "set")
    tree = json.loads((root / "shards.json").read_text())
    tree["splits"]["train"]["shards"] *= 2
    tree["splits"]["train"]["images"] = 8
    (root / "shards.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="lists a shard of train more than once"):
        labels_seen(root)
    assert "ERROR: shards.json lists 1 train shards more than once" in checked(root, capsys, "shards")


def test_json_that_nests_without_end_is_damage_everywhere(tmp_path):
    (tmp_path / "real.json").write_text(DEEP)
    with pytest.raises(DataError, match=r"real.json: expected a JSON list"):
        read_real_labels(str(tmp_path / "real.json"), ["a"])
    (tmp_path / "manifest.json").write_text(DEEP)
    with pytest.raises(DataError, match=r"manifest.json cannot be read"):
        open_cache(tmp_path)
    good = '{"kind": "val", "epoch": 0, "step": 1}'
    (tmp_path / "metrics.jsonl").write_text(f'{DEEP}\n{good}\n{good[:-1]}, "top1": {"9" * 5000}}}\n')
    assert read_records(tmp_path / "metrics.jsonl") == ([json.loads(good)], [1, 3])


def test_negative_counts_that_add_up_are_refused(tmp_path):
    root = make_shards(tmp_path / "set")
    tree = json.loads((root / "shards.json").read_text())
    first = tree["splits"]["train"]["shards"][0]
    tree["splits"]["train"]["shards"] = [first | {"images": 8}, first | {"images": -4}]
    (root / "shards.json").write_text(json.dumps(tree))
    with pytest.raises(
        DataError, match=r"train-000000.tar has -4 images in \d+ bytes, expected a printable name, whole"
    ):
        labels_seen(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_count_that_is_too_low_is_noticed_when_the_shard_is_read(tmp_path, split):
    root = make_shards(tmp_path / "set", members(8), said=8)
    assert labels_seen(root) == [0] * 4 + [1] * 4
    tree = json.loads((root / "shards.json").read_text())
    tree["splits"][split] |= {"images": 4 if split == "train" else 3}
    tree["splits"][split]["shards"][0]["images"] = tree["splits"][split]["images"]
    (root / "shards.json").write_text(json.dumps(tree))
    built = loaders(root, "shards")
    built.train.set_epoch(0)
    with pytest.raises(DataError, match=rf"{split}-000000.tar holds more than the \d images of shards.json"):
        [labels for _, labels in (built.train if split == "train" else built.val)]


ODD_SHARDS = {
    "a label beyond": ([*members(3), ("3.jpg", b"x"), ("3.cls", b"2")], "the label b'2', expected an image"),
    "a label of 5,000 digits": ([*members(3), ("3.jpg", b"x"), ("3.cls", b"1" * 5000)], "the label b'1111"),
    "no label": ([*members(3), ("3.jpg", b"x")], r"members \['jpg'\] and the label b''"),
    "a file twice": ([*members(3), ("3.jpg", b"x"), ("3.JPG", b"y")], "has two files 3.JPG one after the other"),
    "a name that breaks lines": ([*members(3), ("a\nb.jpg", b"x")], r"sample a\\nb has the members"),
}


@pytest.mark.parametrize(("entries", "message"), ODD_SHARDS.values(), ids=ODD_SHARDS)
def test_odd_samples_are_named(tmp_path, entries, message, capsys):
    root = make_shards(tmp_path / "set", entries)
    with pytest.raises(DataError, match=message) as caught:
        labels_seen(root)
    assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)
    assert "ERROR: " in checked(root, capsys, "shards")


def test_what_other_tools_put_into_shards_is_passed_over(tmp_path, capsys):
    odd = [("._0000.jpg", b"AppleDouble"), ("__MACOSX/0000.jpg", b"x"), ("__meta__/a.json", b"{}"), ("README", b"x")]
    entries = [*odd[:1], *[(f"./{name}", content) for name, content in members()], *odd[1:]]
    root = make_shards(tmp_path / "set", entries)
    assert labels_seen(root) == [0, 0, 1, 1]
    assert "train: 4 images" in checked(root, capsys, "shards")


def test_a_sparse_member_takes_no_memory(tmp_path, capsys):
    """A header of 512 bytes that stands for 8 GB of zeros."""
    root = make_shards(tmp_path / "set")
    path = root / "train-000000.tar"
    member = tarfile.TarInfo("first.jpg")
    member.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"%011o\0" % (8 << 30)  # the real size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + path.read_bytes())
    tree = json.loads((root / "shards.json").read_text())
    tree["splits"]["train"] = {
        "images": 5,
        "shards": [{"name": path.name, "images": 5, "bytes": path.stat().st_size}],
    }
    (root / "shards.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="first has more than 268,435,456 bytes"):
        labels_seen(root)
    assert "first has more than 268,435,456 bytes" in checked(root, capsys, "shards")


def test_a_pipe_is_no_shard(tmp_path):
    root = make_shards(tmp_path / "set")
    (root / "train-000000.tar").unlink()
    os.mkfifo(root / "train-000000.tar")
    tree = json.loads((root / "shards.json").read_text())
    tree["splits"]["train"]["shards"][0]["bytes"] = 0
    (root / "shards.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="train-000000.tar is no regular file"):
        labels_seen(root)
