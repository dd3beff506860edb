"""Every image of a data set read and decoded once, in several processes, and its splits against each other."""

import functools
import hashlib
import os
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from data.findings import Layout, Report, Task
from data.imagenet import are_wordnet_ids
from data.sources.base import UnreadableImage, decode
from data.sources.shards import INDEX_FILE
from utils.parallel import parallel

IMAGENET = {"train": 1_281_167, "val": 50_000}
SPLITS = ("train", "val")


class Image(NamedTuple):
    """What was seen of one image: `problem` where it does not decode, else the digest of its bytes."""

    name: str
    label: int
    digest: bytes
    problem: str | None = None


class Examined(NamedTuple):
    images: list[Image]
    errors: list[str]  # what is wrong with the archive itself


def _examine_image(name: str, label: int, read: Callable[[], bytes]) -> Image:
    try:
        data = read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data, which training does not read
            decode(data, name)
    except UnreadableImage as error:
        return Image(name, label, b"", str(error))
    except OSError as error:
        return Image(name, label, b"", f"{name}: {error.strerror or error}")
    except (zipfile.BadZipFile, zlib.error) as error:
        return Image(name, label, b"", f"{name}: {error}")
    return Image(name, label, hashlib.blake2b(data, digest_size=16).digest())


@functools.lru_cache(maxsize=2)
def _open_zip(path: Path, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def examine(task: Task) -> Examined:
    """Decode and hash the images of one task."""
    if task.archive is not None and task.archive.suffix == ".tar":
        return _examine_shard(task.archive, task.images)
    archive = _open_zip(task.archive, os.getpid()) if task.archive else None
    found = []
    for name, label in zip(task.names, task.labels, strict=True):
        read = functools.partial(archive.read, name) if archive else Path(name).read_bytes
        found.append(_examine_image(f"{task.archive}/{name}" if archive else name, label, read))
    return Examined(found, [])


def _examine_shard(path: Path, expected: int) -> Examined:
    """Every sample of a shard: neighbouring members with the same key, one an image and one its label."""
    images, errors, count = [], [], 0
    try:
        for key, members in _samples(path):
            count += 1
            extension = next((extension for extension in members if f".{extension}" in IMG_EXTENSIONS), None)
            label = members.get("cls", b"").strip()
            if extension is None or not label.isdigit():
                errors.append(f"{path}: sample {key} has {' and '.join(sorted(members))}, expected an image and a cls")
                continue
            read = functools.partial(members.__getitem__, extension)
            images.append(_examine_image(f"{path}/{key}.{extension}", int(label), read))
    except (OSError, tarfile.TarError) as error:
        errors.append(f"{path}: {error} after {count} of {expected} images")
    else:
        if count != expected:
            errors.append(f"{path} holds {count} images, {INDEX_FILE} says {expected}")
    return Examined(images, errors)


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, members = "", dict[str, bytes]()
    with tarfile.open(path, "r|*") as archive:
        for member in archive:
            folder, slash, name = member.name.rpartition("/")
            stem, _, extension = name.partition(".")
            content = archive.extractfile(member)
            if content is None:
                continue
            if folder + slash + stem != key and members:
                yield key, members
                members = {}
            key = folder + slash + stem
            members[extension.lower()] = content.read()
            archive.members = []  # type: ignore[attr-defined]  # or it remembers every member
    if members:
        yield key, members


def compare_classes(layouts: dict[str, Layout], report: Report) -> None:
    """The class names of the splits against each other, and their order."""
    named = {split: layout.classes for split, layout in layouts.items() if layout.classes}
    train, val = named.get("train"), named.get("val")
    if train and val and train != val:
        if strange := sorted(set(val) - set(train)):
            report.error(f"val has {len(strange)} classes that train lacks", strange)
        if lacking := sorted(set(train) - set(val)):
            report.warn(f"val lacks {len(lacking)} classes of train", lacking)
        if set(train) == set(val):
            swapped = [f"label {i}: {a} and {b}" for i, (a, b) in enumerate(zip(train, val, strict=True)) if a != b]
            report.error(f"train and val give {len(swapped)} labels to different classes", swapped)
    for split, classes in named.items():
        if are_wordnet_ids(classes) and list(classes) != sorted(classes):
            in_order = zip(classes, sorted(classes), strict=True)
            moved = [f"label {i}: {a}, expected {b}" for i, (a, b) in enumerate(in_order) if a != b]
            report.error(
                f"{split}: labels do not follow the sorted WordNet ids, which released checkpoints expect", moved
            )


def compare_counts(layouts: dict[str, Layout], counts: dict[str, Counter[int]], report: Report) -> None:
    """Images per class; for a data set that looks like ImageNet its known totals."""
    for split, layout in layouts.items():
        seen = counts[split]
        number = len(layout.classes) if layout.classes else len(seen)
        sizes = [seen[label] for label in seen] or [0]
        report.facts.append(
            f"{split}: {sum(seen.values()):,} images, {number:,} classes,"
            f" {min(sizes):,} to {max(sizes):,} images a class"
        )
        wordnet = layout.classes is not None and are_wordnet_ids(layout.classes)
        if wordnet and number == 1000:
            if sum(seen.values()) != IMAGENET[split]:
                report.error(
                    f"{split} has the 1,000 classes of ImageNet and {sum(seen.values()):,} images, expected"
                    f" {IMAGENET[split]:,}"
                )
        elif wordnet:
            report.facts.append(f"{split}: WordNet ids, but not the 1,000 classes of ImageNet")


def examine_all(tasks: Sequence[Task], workers: int, report: Report) -> dict[str, Counter[int]]:
    """Decode every image and compare their contents; returns images per split and label, unreadable ones included."""
    counts: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
    first: dict[bytes, tuple[str, int, str]] = {}  # by content: split, label and name of the first such image
    archives, between, within, relabelled = (list[str]() for _ in range(4))
    unreadable: dict[str, list[str]] = {split: [] for split in SPLITS}
    with tqdm(total=sum(task.images for task in tasks), desc="checking", unit="img", disable=None) as bar:
        for task, examined in zip(tasks, parallel(examine, tasks, workers), strict=True):
            archives += examined.errors
            for image in examined.images:
                counts[task.split][image.label] += 1
                if image.problem:
                    unreadable[task.split].append(image.problem)
                    continue
                split, label, name = first.setdefault(image.digest, (task.split, image.label, image.name))
                if name == image.name and split == task.split:
                    continue
                (within if split == task.split else between).append(f"{image.name} = {name}")
                if label != image.label:
                    relabelled.append(f"{image.name} (label {image.label}) = {name} (label {label})")
            bar.update(task.images)
    for text, names in (
        ("{:,} problems in the contents of shards", archives),
        *((f"{split}: {{:,}} images are unreadable or truncated", names) for split, names in unreadable.items()),
    ):
        if names:
            report.error(text.format(len(names)), names)
    for text, names in (
        ("{:,} images are in train and in val with the same content", between),
        ("{:,} images repeat the content of another of their split", within),
        ("{:,} images have the content of one with another label", relabelled),
    ):
        if names:
            report.warn(text.format(len(names)), names)
    return counts


def examine_layouts(layouts: dict[str, Layout], workers: int, report: Report) -> dict[str, Counter[int]]:
    """Examine the images of all splits, and the splits against each other; returns images per split and label."""
    tasks = [task for layout in layouts.values() for task in layout.tasks]
    counts = examine_all(tasks, workers, report)
    compare_classes(layouts, report)
    compare_counts(layouts, counts, report)
    return counts
