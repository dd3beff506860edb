"""`main.py --check-data`: read every file of a data set once, and say what is wrong with it.

An error makes training, evaluation or their results wrong; a warning is something to know about. Every image is decoded
whole, by DATA.NUM_WORKERS processes; of a token cache every file is compared with its digest. Nothing is written.
"""

import functools
import hashlib
import os
import re
import sys
import tarfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm
from yacs.config import CfgNode

from config import image_size
from data.loaders import data_format
from data.sources.base import DataError, UnreadableImage, decode
from data.sources.bundled import FASHION_MNIST, FashionMnistSource
from data.sources.shards import INDEX_FILE, Index, file_problem, read_index
from data.sources.tokens import open_tokens, token_source
from utils.distributed import LaunchError
from utils.parallel import parallel

SPLITS = ("train", "val")
IMAGENET = {"train": 1_281_167, "val": 50_000}
WORDNET_ID = re.compile(r"n\d{8}")
CHUNK = 256  # images of a task
EXAMPLES = 10  # of a finding that are printed
PLACE_VAL = "`python -m tools.prepare_imagenet DATA_PATH --val-ground-truth FILE` moves them into class folders"


class Finding(NamedTuple):
    is_error: bool
    text: str
    examples: tuple[str, ...]
    total: int


@dataclass
class Report:
    """What a data set holds, and what is wrong with it."""

    facts: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def error(self, text: str, examples: Iterable[str] = ()) -> None:
        self._add(True, text, examples)

    def warn(self, text: str, examples: Iterable[str] = ()) -> None:
        self._add(False, text, examples)

    def _add(self, is_error: bool, text: str, examples: Iterable[str]) -> None:
        examples = tuple(examples)
        self.findings.append(Finding(is_error, text, examples[:EXAMPLES], len(examples)))

    @property
    def is_clean(self) -> bool:
        return not self.findings

    def render(self) -> str:
        lines = list(self.facts)
        for finding in sorted(self.findings, key=lambda finding: not finding.is_error):
            lines.append(f"{'ERROR' if finding.is_error else 'WARNING'}: {finding.text}")
            lines += [f"    {example}" for example in finding.examples]
            if finding.total > len(finding.examples):
                lines.append(f"    … and {finding.total - len(finding.examples):,} more")
        errors = sum(finding.is_error for finding in self.findings)
        lines.append(
            "clean: no errors, no warnings"
            if self.is_clean
            else f"{errors} kinds of errors, {len(self.findings) - errors} of warnings"
        )
        return "\n".join(lines) + "\n"


class Image(NamedTuple):
    """What was seen of one image: `problem` where it does not decode, else the digest of its bytes."""

    name: str
    label: int
    digest: bytes
    problem: str | None = None


class Task(NamedTuple):
    """Images that one process examines in one go: paths, members of a zip, or (none named) all of a shard."""

    split: str
    archive: Path | None  # the zip or shard
    names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    images: int = 0


class Examined(NamedTuple):
    images: list[Image]
    errors: list[str]  # what is wrong with the archive itself


# ---------------------------------------------------------------------------------------------------------------------
# Contents, in worker processes
# ---------------------------------------------------------------------------------------------------------------------


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
    if task.archive is None:
        found = [
            _examine_image(name, label, Path(name).read_bytes)
            for name, label in zip(task.names, task.labels, strict=True)
        ]
        return Examined(found, [])
    if task.archive.suffix == ".tar":
        return _examine_shard(task.archive, task.images)
    archive = _open_zip(task.archive, os.getpid())
    found = [
        _examine_image(f"{task.archive}/{name}", label, functools.partial(archive.read, name))
        for name, label in zip(task.names, task.labels, strict=True)
    ]
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


# ---------------------------------------------------------------------------------------------------------------------
# Layout: classes by split, findings, and the tasks that examine what is there
# ---------------------------------------------------------------------------------------------------------------------


class Layout(NamedTuple):
    """A split: its class names (None where a zip stores none), images per label, and what examines them."""

    classes: tuple[str, ...] | None
    counts: Counter[int]
    tasks: list[Task]


def _chunks(split: str, archive: Path | None, samples: Sequence[tuple[str, int]]) -> list[Task]:
    tasks = []
    for start in range(0, len(samples), CHUNK):
        names, labels = zip(*samples[start : start + CHUNK], strict=True)
        tasks.append(Task(split, archive, names, labels, len(names)))
    return tasks


def check_folder(root: Path, split: str, report: Report) -> Layout | None:
    """Class folders of one split; loose images, empty folders and other files are findings."""
    folder = root / split
    if not folder.is_dir():
        report.error(f"{folder} {'is no folder' if folder.exists() else 'does not exist'}")
        return None
    classes: list[str] = []
    samples: list[tuple[str, int]] = []
    loose: list[str] = []
    empty: list[str] = []
    other: list[str] = []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):  # a tool's, as the loader sees it
            continue
        if not entry.is_dir():
            (loose if entry.name.lower().endswith(IMG_EXTENSIONS) else other).append(entry.path)
            continue
        before = len(samples)
        for parent, _, files in sorted(os.walk(entry.path, followlinks=True)):
            for name in sorted(files):
                path = os.path.join(parent, name)
                if name.lower().endswith(IMG_EXTENSIONS):
                    samples.append((path, len(classes)))
                else:
                    other.append(path)
        if len(samples) == before:
            empty.append(entry.path)
        classes.append(entry.name)
    if loose and not classes:
        fix = PLACE_VAL if split == "val" else "move every image into a folder named after its class"
        report.error(f"{folder} is flat: {len(loose):,} images and no class folders; {fix}", loose)
    elif loose:
        fix = f"; {PLACE_VAL}" if split == "val" else ""
        report.error(f"{folder}: {len(loose):,} images lie outside the class folders and are not used{fix}", loose)
    elif not classes:
        report.error(f"{folder} is empty, expected {folder}/<class>/<image>")
    if empty:
        report.error(f"{folder}: {len(empty)} class folders hold no image; fill or remove them", empty)
    if other:
        report.warn(f"{folder}: {len(other):,} files are no images by their extension and are not used", other)
    return Layout(tuple(classes), Counter(label for _, label in samples), _chunks(split, None, samples))


def check_zip(root: Path, split: str, report: Report) -> Layout | None:
    """A zip and its map against each other."""
    path, map_path = root / f"{split}.zip", root / f"{split}_map.txt"
    if absent := [str(file) for file in (path, map_path) if not file.is_file()]:
        report.error(f"{' and '.join(absent)} do{'es' if len(absent) == 1 else ''} not exist")
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            members = Counter(info.filename for info in archive.infolist() if not info.is_dir())
        lines = map_path.read_text(encoding="utf-8").splitlines()
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError) as error:
        report.error(f"{path} and {map_path.name} cannot be read: {error}")
        return None
    samples: dict[str, int] = {}
    malformed, absent, repeated = [], [], []
    for number, line in enumerate(lines, start=1):
        name, tab, label = line.rpartition("\t")
        if not line.strip():
            continue
        if not tab or not label.strip().isdecimal():
            malformed.append(f"line {number}: {line!r}")
        elif name not in members:
            absent.append(f"line {number}: {name}")
        elif name in samples:
            repeated.append(f"line {number}: {name}")
        else:
            samples[name] = int(label)
    if malformed:
        report.error(f"{map_path}: {len(malformed):,} lines are not `path<TAB>label`", malformed)
    if absent:
        report.error(f"{map_path} names {len(absent):,} files that {path.name} does not contain", absent)
    if repeated:
        report.error(f"{map_path} names {len(repeated):,} files again", repeated)
    if unnamed := [name for name in members if name not in samples and name.lower().endswith(IMG_EXTENSIONS)]:
        report.error(f"{path} contains {len(unnamed):,} images without a (valid) line in {map_path.name}", unnamed)
    if twice := [name for name, count in members.items() if count > 1]:
        report.error(f"{path} contains {len(twice):,} names more than once", twice)
    if not samples:
        report.error(f"{map_path} names no image of {path.name}")
        return None
    counts = Counter(samples.values())
    if gaps := [str(label) for label in range(max(counts)) if label not in counts]:
        # a class that only one split lacks is found where splits are compared
        (report.error if split == "train" else report.warn)(f"{map_path}: {len(gaps)} labels have no image", gaps)
    folders: dict[int, set[str]] = {}
    for name, number in samples.items():
        folders.setdefault(number, set()).add(os.path.dirname(name))
    mixed = [f"label {label}: {', '.join(sorted(names)[:5])}" for label, names in folders.items() if len(names) > 1]
    by_label = [next(iter(folders.get(label, {""}))) for label in range(max(counts) + 1)]
    named = not mixed and all(by_label) and len(set(by_label)) == len(by_label)
    if mixed and any(name for names in folders.values() for name in names):
        report.warn(f"{map_path}: {len(mixed)} labels have images of several folders, so classes have no names", mixed)
    classes = tuple(os.path.basename(name) for name in by_label) if named else None
    return Layout(classes, counts, _chunks(split, path, list(samples.items())))


def check_shards(root: Path, split: str, index: Index, report: Report) -> Layout | None:
    """The shards of one split against the index."""
    shards = index.splits.get(split, [])
    if not shards:
        report.error(f"{root / INDEX_FILE} lists no {split} shards")
        return None
    if problems := [problem for shard in shards if (problem := file_problem(root, shard))]:
        report.error(f"{len(problems)} of {len(shards)} {split} shards are missing or of another size", problems)
    if unlisted := sorted({path.name for path in root.glob(f"{split}-*.tar")} - {shard.name for shard in shards}):
        report.warn(f"{len(unlisted)} {split} shards are not in {INDEX_FILE} and are not used", unlisted)
    if twice := [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]:
        report.error(f"{INDEX_FILE} lists {len(twice)} {split} shards more than once", twice)
    tasks = [Task(split, root / s.name, images=s.images) for s in shards if (root / s.name).is_file()]
    return Layout(index.classes, Counter(), tasks)


# ---------------------------------------------------------------------------------------------------------------------
# Across splits
# ---------------------------------------------------------------------------------------------------------------------


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
        if all(map(WORDNET_ID.fullmatch, classes)) and list(classes) != sorted(classes):
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
        wordnet = layout.classes is not None and all(map(WORDNET_ID.fullmatch, layout.classes))
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
    unreadable: dict[str, list[str]] = {split: [] for split in SPLITS}
    first: dict[bytes, tuple[str, int, str]] = {}  # by content: split, label and name of the first such image
    within: list[str] = []
    between: list[str] = []
    labels: list[str] = []
    archive_errors: list[str] = []
    with tqdm(total=sum(task.images for task in tasks), desc="checking", unit="img", disable=None) as bar:
        for task, examined in zip(tasks, parallel(examine, tasks, workers), strict=True):
            archive_errors += examined.errors
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
                    labels.append(f"{image.name} (label {image.label}) = {name} (label {label})")
            bar.update(task.images)
    if archive_errors:
        report.error(f"{len(archive_errors):,} problems in the contents of shards", archive_errors)
    for split, problems in unreadable.items():
        if problems:
            report.error(f"{split}: {len(problems):,} images are unreadable or truncated", problems)
    if between:
        report.warn(f"{len(between):,} images are in train and in val with the same content", between)
    if within:
        report.warn(f"{len(within):,} images repeat the content of another of their split", within)
    if labels:
        report.warn(f"{len(labels):,} images have the content of one with another label", labels)
    return counts


def check_tokens(config: CfgNode, report: Report) -> None:
    """A token cache: whether it is whole, and what the model is configured for."""
    try:
        cache = open_tokens(config)
        manifest = cache.manifest
        report.facts.append(f"{cache.path}: token cache, {manifest.title}")
        for split, arrays in cache.splits.items():
            sizes = np.bincount(arrays.labels, minlength=len(manifest.classes))
            report.facts.append(
                f"{split}: {len(arrays.labels):,} samples, {len(sizes):,} classes, {sizes.min():,} to {sizes.max():,}"
                " samples a class"
            )
        report.facts.append(f"longest document: {manifest.longest:,} symbols")
        cache.verify()
        token_source(config, "train")  # raises where documents are too long for the model, or symbols too many
    except DataError as error:
        report.error(str(error))


def check(config: CfgNode) -> Report:
    """Examine the data set that the configuration names. Raises DataError where it names none."""
    report = Report()
    if config.DATA.DATASET == "digits":
        report.facts.append("the digits ship with scikit-learn: there are no files to check")
        return report
    if config.DATA.DATASET == "fashion_mnist":
        for split in SPLITS:
            try:
                source = FashionMnistSource(Path(config.DATA.DATA_PATH or FASHION_MNIST), split, image_size(config))
                report.facts.append(f"{split}: {len(source.labels):,} images of {source.num_classes} classes")
            except DataError as error:
                report.error(str(error))
        return report
    sequences = config.DATA.DATASET == "lra"
    if not config.DATA.DATA_PATH:
        which = "tools/prepare_lra.py wrote" if sequences else "holds train/ and val/"
        raise DataError(f"no data set: --data-path names the folder that {which}")
    root = Path(config.DATA.DATA_PATH)
    if not root.is_dir():
        report.error(f"data set folder {root} {'is no folder' if root.exists() else 'does not exist'}")
        return report
    if sequences:
        check_tokens(config, report)
        return report
    kind = data_format(config, root)
    report.facts.append(f"{root}: {'image folder' if kind == 'folder' else kind}")
    layouts: dict[str, Layout] = {}
    index = None
    if kind == "shards":
        try:
            index = read_index(root)
        except DataError as error:
            report.error(str(error))
            return report
    for split in SPLITS:
        if index is not None:
            layout = check_shards(root, split, index, report)
        else:
            layout = (check_folder if kind == "folder" else check_zip)(root, split, report)
        if layout:
            layouts[split] = layout
    tasks = [task for layout in layouts.values() for task in layout.tasks]
    counts = examine_all(tasks, config.DATA.NUM_WORKERS, report)
    compare_classes(layouts, report)
    compare_counts(layouts, counts, report)
    if index is not None:
        for split, seen in counts.items():
            if strange := sorted(label for label in seen if label >= len(index.classes)):
                report.error(f"{split}: labels beyond the {len(index.classes)} classes", map(str, strange))
    return report


def run_check(config: CfgNode) -> int:
    """Print the report; the exit code: 0 where there is nothing to report, else 1."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise LaunchError("--check-data is one process with DATA.NUM_WORKERS helpers; start it without torchrun")
    report = check(config)
    sys.stdout.write(report.render())
    return 0 if report.is_clean else 1
