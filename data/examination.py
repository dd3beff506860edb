"""Every image of a data set read and decoded once, in several processes, and its splits against each other."""

import functools
import hashlib
import os
import tarfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from data.findings import Layout, Report, Task
from data.imagenet import are_wordnet_ids
from data.sources.base import TURNED, WIDE, UnreadableImage, decode, label_of, read_file
from data.sources.shards import INDEX_FILE, image_member, read_samples
from data.sources.zip import open_index, read_member
from data.sources.zip_index import ZipIndex
from logger import printable
from utils.parallel import parallel

IMAGENET = {"train": 1_281_167, "val": 50_000}
SPLITS = ("train", "val")


class Image(NamedTuple):
    """What was seen of one image: `problem` where it does not decode, else the digest of its bytes and what is to be
    known of it (`decode`)."""

    name: str
    label: int
    digest: bytes
    problem: str | None = None
    notes: tuple[str, ...] = ()


class Examined(NamedTuple):
    images: list[Image]
    errors: list[str]  # what is wrong with the archive itself


def _examine_image(name: str, label: int, read: Callable[[], bytes]) -> Image:
    notes: list[str] = []
    try:
        data = read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged EXIF data
            decode(data, name, notes=notes)
    except UnreadableImage as error:
        return Image(name, label, b"", str(error))
    return Image(name, label, hashlib.blake2b(data, digest_size=16).digest(), notes=tuple(notes))


@functools.lru_cache(maxsize=2)
def _open_zip(path: Path, process: int) -> tuple[ZipIndex, BinaryIO]:
    return open_index(path), path.open("rb", buffering=0)


def examine(task: Task) -> Examined:
    """Decode and hash the images of one task."""
    if task.archive is not None and task.archive.suffix == ".tar":
        return _examine_shard(task.archive, task.images)
    found = []
    if task.source is not None:
        for place, label in enumerate(task.labels, start=task.start):
            encoded = functools.partial(task.source.encoded, place)
            found.append(_examine_image(task.source.name(place), label, encoded))
        return Examined(found, [])
    for name, label in zip(task.names, task.labels, strict=True):
        if task.archive:
            index, file = _open_zip(task.archive, os.getpid())
            shown, position = printable(f"{task.archive}/{name}"), index.find(os.fsencode(name))
            assert position is not None, "the check has found it there"
            read = functools.partial(read_member, index, file.fileno(), position, shown)
        else:
            shown, read = printable(name), functools.partial(read_file, name)
        found.append(_examine_image(shown, label, read))
    return Examined(found, [])


def _examine_shard(path: Path, expected: int) -> Examined:
    """Every sample of a shard."""
    images, errors, count = [], [], 0
    try:
        for key, members in read_samples(path):
            count += 1
            extension, label = image_member(members), label_of(members.get("cls", b""))
            if extension is None or label is None:
                errors.append(f"{path}: sample {key} has {' and '.join(sorted(members))}, expected an image and a cls")
                continue
            read = functools.partial(members.__getitem__, extension)
            images.append(_examine_image(printable(f"{path}/{key}.{extension}"), label, read))
    except (OSError, tarfile.TarError) as error:
        errors.append(f"{path}: {error} after {count} of {expected} images")
    else:
        if count != expected:
            errors.append(f"{path} holds {count} images, {INDEX_FILE} says {expected}")
    return Examined(images, errors)


def compare_classes(layouts: dict[str, Layout], report: Report) -> None:
    """The class names of the splits against each other, and their order."""
    named = {split: layout.classes for split, layout in layouts.items() if layout.classes}
    train, val = named.get("train"), named.get("val")
    if train and len(train) == 1:
        report.warn(f"train has one class, {train[0]}: there is nothing to tell apart")
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


@dataclass
class _Contents:
    """Which images have the same content, and which are even one file."""

    first: dict[bytes, tuple[str, int, str]] = field(default_factory=dict)  # split, label and path, by content
    files: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)  # label and path, by device and inode
    between: list[str] = field(default_factory=list)
    within: list[str] = field(default_factory=list)
    relabelled: list[str] = field(default_factory=list)
    one_file: list[str] = field(default_factory=list)

    def add(self, split: str, image: Image, path: str) -> None:
        """`path` is the image's own file, or its name in an archive."""
        first_split, label, first = self.first.setdefault(image.digest, (split, image.label, path))
        if (first_split, first) == (split, path):
            return
        pair = f"{image.name} = {printable(first)}"
        (self.within if split == first_split else self.between).append(pair)
        if label != image.label:
            self.relabelled.append(f"{image.name} (label {image.label}) = {printable(first)} (label {label})")
        with suppress(OSError):  # in an archive there are no files to compare
            for mine, file in ((label, first), (image.label, path)):
                status = os.stat(file)
                label, other = self.files.setdefault((status.st_dev, status.st_ino), (mine, file))
                if label != mine:
                    self.one_file.append(f"{printable(file)} (label {mine}) is {printable(other)} (label {label})")


def examine_all(tasks: Sequence[Task], workers: int, report: Report) -> dict[str, Counter[int]]:
    """Decode every image and compare their contents; returns images per split and label, unreadable ones included."""
    counts: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
    contents, archives = _Contents(), list[str]()
    unreadable: dict[str, list[str]] = {split: [] for split in SPLITS}
    noted: dict[str, list[str]] = {WIDE: [], TURNED: []}
    with tqdm(total=sum(task.images for task in tasks), desc="checking", unit="img", disable=None) as bar:
        for task, examined in zip(tasks, parallel(examine, tasks, workers), strict=True):
            archives += examined.errors
            paths = [image.name for image in examined.images] if task.archive else task.names
            for image, path in zip(examined.images, paths, strict=True):
                counts[task.split][image.label] += 1
                for note in image.notes:
                    noted[note].append(image.name)
                if image.problem:
                    unreadable[task.split].append(image.problem)
                else:
                    contents.add(task.split, image, path)
            bar.update(task.images)
    for tell, text, names in (
        (report.error, "{:,} problems in the contents of shards", archives),
        (report.error, "train: {:,} images are unreadable or truncated", unreadable["train"]),
        (report.error, "val: {:,} images are unreadable or truncated", unreadable["val"]),
        (report.error, "{:,} images are one file with another label", contents.one_file),
        (report.warn, "{:,} images are in train and in val with the same content", contents.between),
        (report.warn, "{:,} images repeat the content of another of their split", contents.within),
        (report.warn, "{:,} images have the content of one with another label", contents.relabelled),
        (report.warn, "{:,} images have 16-bit grey levels, of which the upper 8 bits are used", noted[WIDE]),
    ):
        if names:
            tell(text.format(len(names)), names)
    if turned := noted[TURNED]:
        report.facts.append(
            f"{len(turned):,} images carry an orientation in EXIF, which DATA.EXIF True obeys and False ignores, such"
            f" as {turned[0]}"
        )
    return counts


def examine_layouts(layouts: dict[str, Layout], workers: int, report: Report) -> dict[str, Counter[int]]:
    """Examine the images of all splits, and the splits against each other; returns images per split and label."""
    tasks = [task for layout in layouts.values() for task in layout.tasks]
    counts = examine_all(tasks, workers, report)
    compare_classes(layouts, report)
    compare_counts(layouts, counts, report)
    return counts
