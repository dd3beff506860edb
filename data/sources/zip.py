"""Images in a zip file, with a map file of their labels."""

import codecs
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.findings import Layout, Report, chunks
from data.sources.base import DataError, Decoder, Picture, UnreadableImage, decode, label_of
from data.sources.listing import is_image, is_litter
from data.sources.zip_index import ZipError, ZipIndex, as_text
from logger import get_logger, printable


class ZipSource:
    """`<split>.zip` with `<split>_map.txt`, whose lines are `path in the zip<TAB>label`.

    Class names are the images' folders where every label has exactly one of its own, else None. Each process opens
    the zip once. Raises DataError for a missing file, a malformed map line, or a member the zip does not have.
    """

    def __init__(self, zip_path: Path, map_path: Path, decoder: Decoder = decode) -> None:
        for path in (zip_path, map_path):
            if not path.is_file():
                raise DataError(f"{path} does not exist; --zip needs train.zip, train_map.txt, val.zip and val_map.txt")
        self.path, self._decoder = zip_path, decoder
        self._handle: tuple[int, BinaryIO] | None = None
        index = open_index(zip_path)
        positions, labels = array("q"), array("i")
        left_out: list[str] = []
        for number, line in map_lines(map_path):
            name, label = parsed(line)
            if label is None:
                raise DataError(f"{map_path} line {number}: expected `path<TAB>label`, received '{as_text(line)[:80]}'")
            if is_litter(os.fsdecode(name)):
                left_out.append(as_text(name))
                continue
            position = index.find(name)
            if position is None:
                raise DataError(
                    f"{map_path} line {number} names '{as_text(name)}', which {zip_path} does not contain; names are"
                    " in UTF-8"
                )
            positions.append(position)
            labels.append(label)
        if not labels:
            raise DataError(f"{map_path} is empty; expected lines `path<TAB>label`")
        if (again := first_repeated(positions)) is not None:
            raise DataError(f"{map_path} names {as_text(index.names[positions[again]])} more than once")
        if (again := first_repeated(array("q", map(hash, index.names)))) is not None:
            raise DataError(f"{zip_path} contains {as_text(index.names[again])} more than once")
        if left_out:
            get_logger().info(
                "%s: %d hidden or system files are left out, such as %s", map_path, len(left_out), left_out[0]
            )
        self._index = index.take(positions)
        self.labels = np.array(labels)
        self.num_classes = int(self.labels.max()) + 1
        self.classes = class_names(folders_by_label(zip(self._index.names, self.labels.tolist(), strict=True)))

    def require_every_label(self) -> None:
        """Raise DataError where a label between the others has no image: the classes would not be what they seem."""
        counts = np.bincount(self.labels)
        if gaps := np.flatnonzero(counts == 0).tolist():
            raise DataError(
                f"{self.path}: {len(gaps)} labels from 0 to {self.num_classes - 1} have no image"
                f" ({', '.join(map(str, gaps[:5]))}); number the classes from 0 without gaps"
            )

    @property
    def index_bytes(self) -> int:
        """Memory that names, labels and places of all images take together."""
        return self._index.nbytes + self.labels.nbytes

    def name(self, index: int) -> str:
        return f"{printable(self.path)}:{as_text(self._index.names[index])}"

    def load(self, index: int) -> Picture:
        if self._handle is None or self._handle[0] != os.getpid():  # each forked worker has a handle of its own
            self._handle = (os.getpid(), self.path.open("rb", buffering=0))
        name = self.name(index)
        return self._decoder(read_member(self._index, self._handle[1].fileno(), index, name), name)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}


def folders_by_label(samples: Iterable[tuple[bytes, int]]) -> dict[int, set[str]]:
    """The names of the folders that the images of each label lie in."""
    folders: dict[int, set[bytes]] = {}
    for name, label in samples:
        folders.setdefault(label, set()).add(os.path.basename(os.path.dirname(name)))
    return {label: set(map(as_text, names)) for label, names in folders.items()}


def class_names(folders: dict[int, set[str]]) -> tuple[str, ...] | None:
    """The folder of each label, "" for labels without images; None where folders and labels do not correspond."""
    names = {label: next(iter(found)) for label, found in folders.items() if len(found) == 1}
    if len(names) < len(folders) or len(set(names.values())) < len(names) or not all(names.values()):
        return None
    return tuple(names.get(label, "") for label in range(max(names) + 1))


def first_repeated(numbers: Sequence[int]) -> int | None:
    """The first place of a number that has come before."""
    new = np.zeros(len(numbers), dtype=bool)
    new[np.unique(numbers, return_index=True)[1]] = True
    return None if new.all() else int(new.argmin())


def open_index(path: Path) -> ZipIndex:
    """The index of a zip. Raises DataError for what is none."""
    try:
        return ZipIndex.of(path)
    except (ZipError, OSError) as error:
        raise DataError(f"{path} is not a readable zip file: {error}") from error


def read_member(index: ZipIndex, descriptor: int, position: int, name: str) -> bytes:
    """A file of a zip. Raises UnreadableImage, with its name, where it is damaged."""
    try:
        return index.read(descriptor, position)
    except (OSError, ZipError) as error:
        raise UnreadableImage(f"{name}: {error}") from error


def map_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and content of each line of a map that is not empty. Raises DataError where it cannot be read."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").removesuffix(b"\n")
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def parsed(line: bytes) -> tuple[bytes, int | None]:
    """Name and label of a map's line; without a label it is malformed."""
    name, tab, label = line.rpartition(b"\t")
    return name, label_of(label) if tab else None


def warm_page_cache(path: Path, *, share: int = 0, shares: int = 1) -> None:
    """Read one of `shares` equal parts of a file once, so that later reads come from memory."""
    size = path.stat().st_size
    start, end = size * share // shares, size * (share + 1) // shares
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end and (block := file.read(min(1 << 24, end - start))):
            start += len(block)


def check_zip(root: Path, split: str, report: Report) -> Layout | None:
    """A zip and its map against each other."""
    path, map_path = root / f"{split}.zip", root / f"{split}_map.txt"
    if absent := [str(file) for file in (path, map_path) if not file.is_file()]:
        report.error(f"{' and '.join(absent)} do{'es' if len(absent) == 1 else ''} not exist")
        return None
    try:
        index, lines = open_index(path), list(map_lines(map_path))
    except DataError as error:
        report.error(str(error))
        return None
    # a folder has an entry of its own, which ends in a slash
    members = Counter(name for name in index.names if not name.endswith(b"/") and not is_litter(os.fsdecode(name)))
    samples = _check_map(path, map_path, lines, members, report)
    if not samples:
        report.error(f"{map_path} names no image of {path.name}")
        return None
    folders = folders_by_label(samples.items())
    mixed = [f"label {label}: {', '.join(sorted(names)[:5])}" for label, names in folders.items() if len(names) > 1]
    if mixed:
        report.warn(f"{map_path}: {len(mixed)} labels have images of several folders, so classes have no names", mixed)
    if gaps := [str(label) for label in range(max(folders)) if label not in folders]:
        # a class that only one split lacks is found where splits are compared
        (report.error if split == "train" else report.warn)(f"{map_path}: {len(gaps)} labels have no image", gaps)
    # tasks are of str, which holds any bytes in this form
    named = [(os.fsdecode(name), label) for name, label in samples.items()]
    return Layout(None if gaps else class_names(folders), chunks(split, path, named))


def _check_map(
    path: Path, map_path: Path, lines: list[tuple[int, bytes]], members: Counter[bytes], report: Report
) -> dict[bytes, int]:
    """The label of each image that the map names rightly; what is wrong with the others is a finding."""
    samples: dict[bytes, int] = {}
    malformed, absent, repeated = [], [], []
    for number, line in lines:
        name, label = parsed(line)
        if label is None:
            malformed.append(f"line {number}: '{as_text(line)[:80]}'")
        elif is_litter(os.fsdecode(name)):
            continue
        elif name not in members:
            absent.append(f"line {number}: {as_text(name)}")
        elif name in samples:
            repeated.append(f"line {number}: {as_text(name)}")
        else:
            samples[name] = label
    if malformed:
        report.error(f"{map_path}: {len(malformed):,} lines are not `path<TAB>label`", malformed)
    if absent:
        report.error(f"{map_path} names {len(absent):,} files that {path.name} does not contain", absent)
    if repeated:
        report.error(f"{map_path} names {len(repeated):,} files again", repeated)
    if unnamed := [as_text(name) for name in members if name not in samples and is_image(os.fsdecode(name))]:
        report.error(f"{path} contains {len(unnamed):,} images without a (valid) line in {map_path.name}", unnamed)
    if twice := [as_text(name) for name, count in members.items() if count > 1]:
        report.error(f"{path} contains {len(twice):,} names more than once", twice)
    return samples
