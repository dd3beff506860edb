"""Images in a zip file, with a map file of their labels."""

import os
import zipfile
import zlib
from array import array
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data.findings import Layout, Report, chunks
from data.sources.base import DataError, Decoder, Picture, UnreadableImage, decode
from data.sources.zip_index import ZipError, ZipIndex


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
        try:
            index = ZipIndex.of(zip_path)
        except (ZipError, OSError) as error:
            raise DataError(f"{zip_path} is not a readable zip file: {error}") from error
        positions, labels = array("q"), array("i")
        with map_path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                line = line.removesuffix("\n")
                name, tab, label = line.rpartition("\t")
                if not tab or not label.strip().isdecimal():
                    raise DataError(f"{map_path} line {number}: expected `path<TAB>label`, received {line!r}")
                position = index.find(name.encode())
                if position is None:
                    raise DataError(f"{map_path} line {number} names {name!r}, which {zip_path} does not contain")
                positions.append(position)
                labels.append(int(label))
        if not labels:
            raise DataError(f"{map_path} is empty; expected lines `path<TAB>label`")
        self._index = index.take(positions)
        self.labels = np.array(labels)
        self.num_classes = int(self.labels.max()) + 1
        self.classes = self._class_names()

    def _class_names(self) -> tuple[str, ...] | None:
        folders: list[set[bytes]] = [set() for _ in range(self.num_classes)]
        for name, label in zip(self._index.names, self.labels, strict=True):
            folders[label].add(name.rpartition(b"/")[0].rpartition(b"/")[2])
        names = [next(iter(found)).decode() for found in folders if len(found) == 1]
        unique = len(names) == self.num_classes == len(set(names)) and all(names)
        return tuple(names) if unique else None

    @property
    def index_bytes(self) -> int:
        """Memory that names, labels and places of all images take together."""
        return self._index.nbytes + self.labels.nbytes

    def name(self, index: int) -> str:
        return f"{self.path}:{self._index.names[index].decode()}"

    def load(self, index: int) -> Picture:
        if self._handle is None or self._handle[0] != os.getpid():  # each forked worker has a handle of its own
            self._handle = (os.getpid(), self.path.open("rb", buffering=0))
        try:
            data = self._index.read(self._handle[1].fileno(), index)
        except (OSError, ZipError, zlib.error) as error:
            raise UnreadableImage(f"{self.name(index)}: {error}") from error
        return self._decoder(data, self.name(index))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_handle": None}


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
        with zipfile.ZipFile(path) as archive:
            members = Counter(info.filename for info in archive.infolist() if not info.is_dir())
        lines = map_path.read_text(encoding="utf-8").splitlines()
    except (zipfile.BadZipFile, OSError, UnicodeDecodeError) as error:
        report.error(f"{path} and {map_path.name} cannot be read: {error}")
        return None
    samples = _check_map(path, map_path, lines, members, report)
    if not samples:
        report.error(f"{map_path} names no image of {path.name}")
        return None
    counts = Counter(samples.values())
    if gaps := [str(label) for label in range(max(counts)) if label not in counts]:
        # a class that only one split lacks is found where splits are compared
        (report.error if split == "train" else report.warn)(f"{map_path}: {len(gaps)} labels have no image", gaps)
    return Layout(_class_folders(map_path, samples, report), counts, chunks(split, path, list(samples.items())))


def _check_map(path: Path, map_path: Path, lines: list[str], members: Counter[str], report: Report) -> dict[str, int]:
    """The label of each image that the map names rightly; what is wrong with the others is a finding."""
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
    return samples


def _class_folders(map_path: Path, samples: dict[str, int], report: Report) -> tuple[str, ...] | None:
    """The name of each label's folder; None where labels and folders do not correspond."""
    folders: dict[int, set[str]] = {}
    for name, number in samples.items():
        folders.setdefault(number, set()).add(os.path.dirname(name))
    mixed = [f"label {label}: {', '.join(sorted(names)[:5])}" for label, names in folders.items() if len(names) > 1]
    by_label = [next(iter(folders.get(label, {""}))) for label in range(max(samples.values()) + 1)]
    named = not mixed and all(by_label) and len(set(by_label)) == len(by_label)
    if mixed and any(name for names in folders.values() for name in names):
        report.warn(f"{map_path}: {len(mixed)} labels have images of several folders, so classes have no names", mixed)
    return tuple(os.path.basename(name) for name in by_label) if named else None
