"""Tar shards: streaming, dealing to processes, continuing inside an epoch, damage, memory.

pytest tests/test_shards.py
"""

import builtins
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, config_file, folder_of, run, run_main
from PIL import Image

import engine.epoch
from config import ConfigError, load_config, make_plan
from data.loaders import Batches, DataError, Loaders, build_loaders
from data.sources.base import UnreadableImage
from data.sources.shards import Index, Shard, ShardSplit, ShardTrainDataset, shuffled, stream_sizes
from data.transforms import training_transform
from models.files import load_checkpoint
from tools.prepare_imagenet import Options, prepare
from utils import distributed
from utils.faults.preemption import Preempted

CLASSES = ("ant", "bee", "cat")


def picture(number: int) -> bytes:
    """A tiny PNG that names its number in its pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (number % 256, number // 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(image: torch.Tensor) -> int:
    return int(image[0, 0, 0]) + 256 * int(image[1, 0, 0])


def write_shards(root: Path, counts: list[int], *, split: str = "train", padding: int = 0) -> Path:
    """Shards of so many numbered images; image i has the label i % 3. Adds to an index that is there.

    `padding` bytes follow each image, which decoders ignore.
    """
    root.mkdir(exist_ok=True)
    shards, number = [], 0
    for place, count in enumerate(counts):
        path = root / f"{split}-{place:06d}.tar"
        with tarfile.open(path, "w") as archive:
            for _ in range(count):
                for extension, data in (("png", picture(number) + bytes(padding)), ("cls", b"%d" % (number % 3))):
                    member = tarfile.TarInfo(f"{number:08d}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
                number += 1
        shards.append(Shard(path.name, count, path.stat().st_size))
    index = root / "shards.json"
    splits = {}
    if index.exists():
        tree = json.loads(index.read_text())["splits"]
        splits = {name: [Shard(**shard) for shard in entry["shards"]] for name, entry in tree.items()}
    index.write_text(Index(CLASSES, {**splits, split: shards}).dump())
    return root


def rewrite(path: Path, change) -> None:
    """Replace the bytes of a member, or drop it where `change(name, bytes)` is None; the file keeps its size."""
    size = path.stat().st_size
    with tarfile.open(path) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            data = change(name, data)
            if data is not None:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    with path.open("ab") as file:
        file.truncate(size)  # longer or shorter: a tar may end in any number of zeros


def loaders(
    root: Path, *options: str, rank: int = 0, world_size: int = 1, train: bool = True, monkeypatch=None
) -> Loaders:
    fixed = f"DATA.DATA_PATH {root} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 DATA.SHUFFLE_BUFFER 8".split()
    fixed += ["TRAIN.GLOBAL_BATCH", "null"]
    config = load_config(config_file("pola_swin_t"), [*fixed, *options])
    if monkeypatch is None:
        return build_loaders(config, make_plan(config), train=train)
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "rank", lambda: rank)
        patch.setattr(distributed, "world_size", lambda: world_size)
        return build_loaders(config, make_plan(config, world_size), train=train)


def flat(batches: list[list[int]]) -> set[int]:
    return set(itertools.chain(*batches))


def as_numbers(image: Image.Image) -> torch.Tensor:
    """In place of the augmentation: the pixels as they are."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def numbers(batches: Batches) -> list[list[int]]:
    """The numbers of the images of every batch."""
    batches.loader.dataset.transform = as_numbers
    return [[number_of(image) for image in images] for images, _ in batches]


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


SHARDS = {"even": [20, 20, 20], "uneven": [7, 1, 30, 12, 11], "one shard": [61]}


@pytest.mark.parametrize(
    ("counts", "workers", "world_size"),  # every pair of two of them
    [
        (counts, workers, 1 + (i + j) % 2)
        for i, counts in enumerate(SHARDS.values())
        for j, workers in enumerate((0, 1, 3))
    ],
    ids=[f"{name}-{workers}" for name in SHARDS for workers in (0, 1, 3)],
)
def test_ranks_and_workers_share_an_epoch_without_duplicates(tmp_path, counts, world_size, workers, monkeypatch):
    """Equal numbers of batches whatever the shards hold; only the documented remainder is missing."""
    root = write_shards(write_shards(tmp_path / "set", counts), [3], split="val")
    seen, missing = [], []
    for epoch in range(2):
        dealt = []
        for rank in range(world_size):
            built = loaders(
                root, "DATA.NUM_WORKERS", str(workers), rank=rank, world_size=world_size, monkeypatch=monkeypatch
            )
            built.train.set_epoch(epoch)
            dealt.append(numbers(built.train))
            assert len(dealt[-1]) == len(built.train) == sum(counts) // world_size // 4
            assert built.train.num_images == sum(counts) and built.val.num_images == 3
        order = [number for batches in dealt for batch in batches for number in batch]
        assert len(order) == len(set(order)) == len(dealt[0]) * 4 * world_size
        seen.append(order)
        missing.append(set(range(sum(counts))) - set(order))
    assert seen[0] != seen[1] and seen[0] != sorted(seen[0])
    assert len(missing[0]) == sum(counts) - len(seen[0]) < 4 * world_size + world_size


def test_an_order_is_a_function_of_seed_epoch_and_rank(tmp_path, monkeypatch):
    root = write_shards(write_shards(tmp_path / "set", [10] * 6), [3], split="val")

    def order(epoch=0, seed=0, rank=0, workers=0, buffer=8):
        built = loaders(
            root,
            "SEED",
            str(seed),
            "DATA.NUM_WORKERS",
            str(workers),
            "DATA.SHUFFLE_BUFFER",
            str(buffer),
            rank=rank,
            world_size=2,
            monkeypatch=monkeypatch,
        )
        built.train.set_epoch(epoch)
        return numbers(built.train)

    first = order()
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    assert order() == first == order(workers=1)
    assert order(epoch=1) != first and order(seed=1) != first and flat(order(rank=1)).isdisjoint(flat(first))
    shard_order = [[number // 10 for number in itertools.chain(*order(epoch=epoch, buffer=1))] for epoch in (0, 1)]
    assert shard_order[0] != shard_order[1]  # not only what the buffer draws
    assert order(workers=2) != first  # as documented: another number of workers is another order


def test_augmentation_does_not_depend_on_workers_and_leaves_the_generators_alone(tmp_path):
    """The same sample gets the same pixels in whichever order and process it is drawn."""
    root = write_shards(write_shards(tmp_path / "set", [12, 12]), [3], split="val")

    def pixels(workers: str, buffer: str, epoch: int = 3) -> dict[int, torch.Tensor]:
        built = loaders(root, "DATA.NUM_WORKERS", workers, "DATA.SHUFFLE_BUFFER", buffer)
        augment = training_transform(load_config(config_file("pola_swin_t"), ["DATA.IMG_SIZE", "32"]), (32, 32))
        built.train.loader.dataset.transform = lambda image: torch.cat(
            [as_numbers(image.resize((32, 32))), augment(image)], 1
        )
        built.train.set_epoch(epoch)
        return {number_of(image): image for images, _ in built.train for image in images}

    torch.manual_seed(4)
    expected, drawn = pixels("0", "8"), torch.rand(1)
    torch.manual_seed(4)
    assert torch.rand(1) == drawn
    for other in (pixels("2", "8"), pixels("0", "1")):
        assert expected.keys() == other.keys() and all(torch.equal(expected[key], other[key]) for key in other)
    another = pixels("0", "8", epoch=4)
    assert not all(torch.equal(expected[key], another[key]) for key in expected.keys() & another.keys())


@pytest.mark.parametrize("workers", ["0", "3"])
@pytest.mark.parametrize("damaged", [False, True])
def test_an_epoch_continues_at_every_batch(tmp_path, workers, damaged, monkeypatch):
    """The rest of an epoch equals that of the unbroken one, for two ranks, with unreadable images too."""
    root = write_shards(write_shards(tmp_path / "set", [9, 14, 5, 22, 11]), [3], split="val")
    if damaged:
        for place in range(5):
            rewrite(root / f"train-{place:06d}.tar", lambda name, data: data[:40] if name.endswith("3.png") else data)
    for rank in range(2):
        built = loaders(
            root,
            *f"DATA.NUM_WORKERS {workers} DATA.BATCH_SIZE 3 DATA.MAX_UNREADABLE 0.5".split(),
            rank=rank,
            world_size=2,
            monkeypatch=monkeypatch,
        )
        built.train.set_epoch(1)
        whole = [images for images, _ in built.train]
        assert len(whole) == 10 and bool(built.train.unreadable) == damaged
        for start in range(len(whole) + 1):
            built.train.set_epoch(1, start)
            rest = [images for images, _ in built.train]
            assert len(rest) == len(whole) - start and all(map(torch.equal, rest, whole[start:])), start
        built.train.set_epoch(1)
        assert all(map(torch.equal, whole, [images for images, _ in built.train]))


def test_shards_before_the_point_of_continuing_are_not_opened(tmp_path, monkeypatch):
    root = write_shards(write_shards(tmp_path / "set", [10] * 20), [3], split="val")
    built = loaders(root, "DATA.SHUFFLE_BUFFER", "4")
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: opened.append(self.name) or real(self, *a, **k))

    def shards_opened(start: int) -> list[str]:
        opened.clear()
        built.train.set_epoch(0, start)
        list(built.train)
        return [name for name in opened if name.endswith(".tar")]

    everything = shards_opened(0)
    assert len(everything) == len(set(everything)) == 20
    rest = shards_opened(40)  # 160 of 200 images are done; a buffer of 4 reaches back a shard or two
    assert rest == everything[-len(rest) :] and 4 <= len(rest) <= 7


@pytest.mark.parametrize("size", [1, 2, 3, 10, 100])
def test_the_buffer_yields_a_permutation_and_can_be_entered_anywhere(size):
    asked = []

    def read(begin, end):
        asked.append(begin)
        return iter(range(begin, end))

    def order(skip):
        return list(shuffled(read, 5, 45, buffer=size, generator=random.Random(1), skip=skip))

    whole = order(0)
    assert sorted(whole) == list(range(5, 45)) and (whole == sorted(whole)) == (size == 1)
    for skip in range(41):
        assert order(skip) == whole[skip:]
        assert asked[-1] >= min(whole[skip:], default=45)  # nothing before the first image that is still to come


@pytest.mark.parametrize(("images", "batch_size", "streams"), [(0, 4, 3), (1, 4, 3), (29, 4, 3), (28, 4, 1), (8, 4, 5)])
def test_streams_hold_what_a_loader_takes_in_turn(images, batch_size, streams):
    sizes = stream_sizes(images, batch_size, streams)
    assert sum(sizes) == images
    taken, left = [], list(sizes)
    for batch in range(-(-images // batch_size)):
        taken.append(min(batch_size, left[batch % streams]))
        left[batch % streams] -= taken[-1]
    assert sum(taken) == images and all(count == batch_size for count in taken[:-1])


@pytest.mark.parametrize("continued", [False, True])
def test_memory_does_not_grow_with_the_data_set(tmp_path, continued):
    """Ten times the images, in as many shards or a ten times larger one, need the same memory: 15 images of 64 KiB."""
    peaks = {}
    for name, counts in {"small": [40], "many shards": [40] * 10, "large shard": [400]}.items():
        root = write_shards(tmp_path / name, counts, padding=1 << 16)
        dataset = ShardTrainDataset(
            ShardSplit(root, "train"),
            as_numbers,
            batch_size=1,
            rank=0,
            world_size=1,
            seed=0,
            buffer=15,
            max_unreadable=0,
        )
        dataset.set_epoch(0, len(dataset) // 2 if continued else 0)
        next(iter(dataset))  # imports
        tracemalloc.start()
        count = sum(1 for _ in dataset)
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == sum(counts) // (2 if continued else 1)
    print({name: f"{peak / 2**20:.2f} MiB" for name, peak in peaks.items()})
    assert max(peaks.values()) < 1.1 * peaks["small"] < 4 << 20  # the large ones hold 25 MiB


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_sees_every_image_exactly_once(tmp_path, world_size, workers, monkeypatch):
    root = write_shards(tmp_path / "set", [9, 1, 21], split="val")
    seen = []
    for rank in range(world_size):
        built = loaders(
            root,
            "DATA.NUM_WORKERS",
            str(workers),
            rank=rank,
            world_size=world_size,
            train=False,
            monkeypatch=monkeypatch,
        )
        batches = list(built.val)
        assert len(batches) == len(built.val) and built.val.num_images == 31 and built.train is None
        built.val.loader.dataset.transform = as_numbers
        for images, labels in built.val:
            found = [number_of(image) for image in images]
            assert labels.tolist() == [number % 3 for number in found]
            seen += found
    assert sorted(seen) == list(range(31))
    if world_size == 1 and workers <= 1:
        assert seen == list(range(31))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder of photograph-like JPEGs: 3 classes, 10 training and 5 validation images each."""
    for split, count in (("train", 10), ("val", 5)):
        for label, name in enumerate(CLASSES):
            (tmp_path / "folder" / split / name).mkdir(parents=True)
            for i in range(count):
                noise = np.random.default_rng((label, i, count)).integers(0, 256, (6, 6, 3), dtype=np.uint8)
                image = Image.fromarray(noise).resize((48, 40), Image.Resampling.BICUBIC)
                image.save(tmp_path / "folder" / split / name / f"{i}.jpg")
    return tmp_path / "folder"


def test_evaluation_gives_the_same_batches_as_the_folder(folder, tmp_path):
    prepare(folder, tmp_path / "shards", Options(format="shards", shard_images=4))
    plain, built = loaders(folder), loaders(tmp_path / "shards")
    assert built.classes == plain.classes == CLASSES and built.num_classes == 3
    for (images, labels), (expected, expected_labels) in zip(built.val, plain.val, strict=True):
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("which", ["in the middle", "last of the epoch"])
def test_unreadable_image_is_named_counted_and_replaced_by_the_next(tmp_path, workers, which, caplog):
    root = write_shards(write_shards(tmp_path / "set", [8, 8, 8]), [3], split="val")
    built = loaders(root, "DATA.NUM_WORKERS", workers, "DATA.MAX_UNREADABLE", "0.05")
    built.train.set_epoch(0)
    whole = numbers(built.train)
    batch, place = (1, 2) if which == "in the middle" else (5, 3)
    victim = whole[batch][place]
    rewrite(
        root / f"train-{victim // 8:06d}.tar", lambda name, data: data[:30] if name == f"{victim:08d}.png" else data
    )
    for _ in range(2):
        built.train.set_epoch(0)
        found = numbers(built.train)
        assert [len(batch) for batch in found] == [4] * 6
        substitute = found[batch][place]
        assert substitute != victim
        whole[batch][place] = substitute
        assert found == whole  # nothing else moved: its substitute also comes in its own turn
        assert list(itertools.chain(*found)).count(substitute) == 2
        assert len(built.train.unreadable) == 1
    name = f"{root}/train-{victim // 8:06d}.tar/{victim:08d}.png"
    assert caplog.text.count(name) == 1


@pytest.mark.parametrize("workers", ["0", "2"])
def test_more_unreadable_images_than_allowed_stop_the_run(tmp_path, workers):
    root = write_shards(write_shards(tmp_path / "set", [8, 8, 8]), [3], split="val")
    for number in (1, 9, 17):
        rewrite(
            root / f"train-{number // 8:06d}.tar",
            lambda name, data: b"" if name == f"{number:08d}.png" else data,
        )
    with pytest.raises(DataError, match=r"3 of 24 training images are unreadable, 2 are allowed"):
        list(loaders(root, "DATA.NUM_WORKERS", workers, "DATA.MAX_UNREADABLE", "0.1").train)
    for place in range(3):
        rewrite(root / f"train-{place:06d}.tar", lambda name, data: b"" if name.endswith(".png") else data)
    with pytest.raises(DataError, match="unreadable, 2 are allowed"):
        next(iter(loaders(root, "DATA.NUM_WORKERS", workers, "DATA.MAX_UNREADABLE", "0.1").train))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_unreadable_image_in_evaluation_is_an_error(tmp_path, workers):
    root = write_shards(tmp_path / "set", [8, 8], split="val")
    rewrite(root / "val-000001.tar", lambda name, data: data[:30] if name == "00000012.png" else data)
    with pytest.raises(UnreadableImage, match=r"^/\S*val-000001\.tar/00000012\.png: [^\n]*$"):
        list(loaders(root, "DATA.NUM_WORKERS", workers, train=False).val)


DAMAGE = {
    "vanished": (lambda path: path.unlink(), "No such file or directory after 0 of 8 images"),
    "cut inside an image": (lambda path: path.write_bytes(path.read_bytes()[:3700]), "unexpected end of data after"),
    "cut between images": (
        lambda path: path.write_bytes(path.read_bytes()[:4096]),
        "holds 2 images, shards.json says 8",
    ),
    "no tar": (lambda path: path.write_bytes(b"text" * 3000), "after 0 of 8 images"),
    "sample lost": (
        lambda path: rewrite(path, lambda name, data: None if name.startswith("00000012") else data),
        "holds 7 images, shards.json says 8",
    ),
    "no label": (
        lambda path: rewrite(path, lambda name, data: None if name == "00000012.cls" else data),
        r"sample 00000012 has the members \['png'\] and the label b''",
    ),
    "label beyond the classes": (
        lambda path: rewrite(path, lambda name, data: b"3" if name == "00000012.cls" else data),
        "the label b'3', expected an image and a cls member from 0 to 2",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("part", ["train", "val"])
def test_a_shard_that_is_damaged_while_it_is_used_is_named(tmp_path, part, spoil, message):
    root = write_shards(write_shards(tmp_path / "set", [8, 8, 8]), [8, 8, 8], split="val")
    built = loaders(root, "DATA.NUM_WORKERS", "2")
    spoil(root / f"{part}-000001.tar")
    with pytest.raises(DataError, match=rf"^/\S*{part}-000001\.tar[^\n]*{message}[^\n]*--check-data"):
        list(getattr(built, part))


def test_damage_that_sizes_tell_is_found_at_the_start(tmp_path):
    root = write_shards(write_shards(tmp_path / "set", [8, 8]), [8], split="val")
    shutil.copytree(root, tmp_path / "copy")
    with (root / "train-000001.tar").open("ab") as file:
        file.write(b"x")
    with pytest.raises(
        DataError, match=r"1 of 2 train shards are damaged: \S*train-000001.tar has \d+ bytes, shards.js"
    ):
        loaders(root)
    (tmp_path / "copy" / "val-000000.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 1 val shards are damaged: \S*val-000000.tar: No such file"):
        loaders(tmp_path / "copy")


BAD_INDEX = {
    "{": "shards.json cannot be read",
    "[]": "is no index of shards",
    '{"version": 9}': "is of version 9, expected 1",
    '{"version": 1, "classes": ["a"], "splits": {}}': "lists no images of the split train",
    '{"version": 1, "classes": ["a"], "splits": {"train": {"images": 3, "shards": []}}}': "do not add up to its total",
}


@pytest.mark.parametrize(("text", "message"), BAD_INDEX.items())
def test_bad_index_is_explained(tmp_path, text, message):
    (tmp_path / "shards.json").write_text(text)
    with pytest.raises(DataError, match=message):
        loaders(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing the format
# ---------------------------------------------------------------------------------------------------------------------


def test_format_follows_what_is_there_unless_it_is_named(folder, tmp_path):
    prepare(folder, tmp_path / "zip", Options(format="zip"))
    assert loaders(folder).classes == loaders(tmp_path / "zip", "DATA.FORMAT", "zip").classes
    assert loaders(tmp_path / "zip", "DATA.ZIP_MODE", "True").classes == CLASSES
    shards = prepare(folder, tmp_path / "both", Options(format="shards"))
    for split in ("train", "val"):
        shutil.copytree(folder / split, tmp_path / "both" / split)
    assert shards["train"].images == 30
    assert isinstance(loaders(tmp_path / "both").train.loader.dataset, ShardTrainDataset)
    named = loaders(tmp_path / "both", "DATA.FORMAT", "folder").train.loader.dataset
    assert not isinstance(named, ShardTrainDataset)


def test_contradictory_formats_are_explained(tmp_path):
    for name in ("folder", "shards"):
        with pytest.raises(ConfigError, match=rf"DATA.FORMAT {name} contradicts DATA.ZIP_MODE True \(--zip\)"):
            loaders(tmp_path, "DATA.FORMAT", name, "DATA.ZIP_MODE", "True")
    with pytest.raises(
        DataError, match=r"shards.json does not exist; tools.prepare_imagenet --format shards writes it"
    ):
        loaders(tmp_path, "DATA.FORMAT", "shards")
    write_shards(tmp_path, [8])
    with pytest.raises(
        DataError, match=r"holds shards.json, and DATA.ZIP_MODE \(--zip\) asks for zip files; DATA.FORMAT"
    ):
        loaders(tmp_path, "DATA.ZIP_MODE", "True")


def test_absent_library_is_explained(tmp_path, monkeypatch):
    root = write_shards(tmp_path / "set", [8], split="val")
    real = builtins.__import__

    def absent(name, *arguments, **keywords):
        if name.partition(".")[0] == "webdataset":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **keywords)

    for name in [name for name in sys.modules if name.partition(".")[0] == "webdataset"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(DataError, match="tar shards are read by the package webdataset: pip install webdataset"):
        loaders(root, train=False)


def test_settings_that_shards_cannot_serve_are_explained(tmp_path):
    root = write_shards(write_shards(tmp_path / "set", [8, 8]), [8], split="val")
    for options in ("AUG.REPEATS 3", "DATA.TRAIN_FRACTION 0.5"):
        with pytest.raises(DataError, match=f"{options.split()[0]} needs images that can be read in any order; shards"):
            loaders(root, *options.split())
    with pytest.raises(DataError, match=r"16 training images on 1 processes are less than one step of 1 × 32 images"):
        loaders(root, "DATA.BATCH_SIZE", "32")


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_shards(folder: Path, tmp_path: Path) -> Path:
    """A tiny configuration that trains for two epochs from shards."""
    prepare(folder, tmp_path / "shards", Options(format="shards", shard_images=4))
    path = tmp_path / "tiny.yaml"
    text = TINY.replace("DATASET: digits", f"DATA_PATH: {tmp_path / 'shards'}").replace(
        "BATCH_SIZE: 64", "BATCH_SIZE: 4"
    )
    path.write_text(f"{text}OUTPUT: {tmp_path / 'out'}\n")
    return path


def test_training_from_shards_resumes_and_evaluates_as_from_the_folder(tiny_shards, folder, log, monkeypatch):
    run(tiny_shards, "TAG whole")
    step, count = engine.epoch.optimizer_step, 0

    def told_to_stop(*arguments):
        nonlocal count
        result, count = step(*arguments), count + 1
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(engine.epoch, "optimizer_step", told_to_stop)
    for _ in range(3):  # each run makes one step
        with pytest.raises(Preempted):
            run(tiny_shards, "TAG parts")
    monkeypatch.undo()
    assert count == 3
    run(tiny_shards, "TAG parts")
    assert "30 training and 15 validation samples of 3 classes" in log.text
    checkpoint, resumed = (folder_of(tiny_shards).parent / tag / "ckpt_epoch_2.pth" for tag in ("whole", "parts"))
    state = load_checkpoint(checkpoint)
    assert state["classes"] == list(CLASSES) and state["step"] == 14
    weights = load_checkpoint(resumed)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in state["model"].items())
    log.clear()
    run(tiny_shards, f"EVAL_MODE True MODEL.RESUME {checkpoint}")
    run(tiny_shards, f"EVAL_MODE True MODEL.RESUME {checkpoint} DATA.DATA_PATH {folder}")
    results = [line.partition("float32: ")[2] for line in log.text.splitlines() if "evaluated" in line]
    assert len(results) == 2 and results[0] == results[1] and "15 images" in results[0]


def test_two_processes_train_from_shards(tiny_shards):
    result = run_main("--cfg", tiny_shards, "--opts", "DATA.NUM_WORKERS", "1", processes=2)
    assert "2 × CPU" in result.stdout and "15 images" in result.stdout
    assert load_checkpoint(folder_of(tiny_shards) / "ckpt_epoch_2.pth")["step"] == 6  # 30 // 2 // 4 an epoch
