"""Finding, checking and reading the files of known data sets.

Messages name file and line, and say where to get what is absent.
"""

import hashlib
import os
import sys
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from data.sources.base import DataError
from data.sources.token_cache import FileRecord
from tools.prepared_folder import FolderDigest
from utils.files import file_digest

RELEASE = "lra_release.gz of https://github.com/google-research/long-range-arena (a tar file, 7.7 GiB)"
IMDB = "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
ADVICE = {
    "listops": f"it is in {RELEASE}; without --source the tool generates an equivalent",
    "pathfinder": f"it is in {RELEASE}; without --source the tool generates an equivalent",
    "retrieval": f"it is in {RELEASE}",
    "text": f"download {IMDB} and give it, or the folder that it unpacks to, as --source",
    "image": f"download {CIFAR} and give it, or the folder that it unpacks to, as --source",
}
MD5 = {
    "aclImdb_v1.tar.gz": "7c2ac02c03563afcf9b574c7e56c153a",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}


def find(task: str, source: Path, candidates: Sequence[str], what: str) -> Path:
    """The first of these paths below `source` ("" is itself) that exists; raises DataError with where to get it."""
    for candidate in candidates:
        if (path := source / candidate).exists():
            return path
    problem = "does not exist" if not source.exists() else f"holds no {what}"
    if source.is_dir() and not any(source.iterdir()):
        problem = "is empty"
    raise DataError(f"{source} {problem}: {ADVICE[task]}")


def below_release(folder: str, file: str) -> list[str]:
    """Where a file of one of the release's folders may be below what --source names: the release holds itself."""
    return [
        os.path.join(root, file) for root in (f"lra_release/lra_release/{folder}", f"lra_release/{folder}", folder, "")
    ]


def require_md5(path: Path, name: str) -> None:
    """Raise DataError unless the file has the MD5 that is known for this name."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
    if found != MD5[name]:
        raise DataError(f"{path} has the MD5 {found}, expected {MD5[name]}; download it again")


def new_source(kind: str) -> dict[str, Any]:
    return {"kind": kind, "files": {}}


def note(source: dict[str, Any], name: str, record: FileRecord) -> None:
    source["files"][name] = record._asdict()


def record_of(path: Path) -> FileRecord:
    return FileRecord(path.stat().st_size, file_digest(path))


def record_of_all(digest: FolderDigest) -> FileRecord:
    return FileRecord(digest.bytes, digest.hexdigest())


class Line(NamedTuple):
    """A line of a table: where it is, for messages, and its columns."""

    where: str
    columns: list[bytes]


def table(path: Path, columns: int, source: dict[str, Any]) -> Iterator[Line]:
    """The lines of a tab-separated file: no quoting, and fields of any length.

    The file's digest is noted in `source` at the end. Raises DataError for a line with another number of columns. A
    last line without a newline is a warning: it may be cut in its last column, or whole.
    """
    digest, size, where, line = hashlib.sha256(), 0, "", b"\n"
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                size += len(line)
                found = line.rstrip(b"\r\n").split(b"\t")
                where = f"{path} line {number}"
                if len(found) != columns:
                    raise DataError(f"{where} has {len(found)} columns, expected {columns}; is the file truncated?")
                yield Line(where, found)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not line.endswith(b"\n"):
        tqdm.write(f"warning: {where} ends without a newline; is the file truncated?", file=sys.stderr)
    note(source, path.name, FileRecord(size, digest.hexdigest()))


def label_of(text: bytes, classes: int, where: str) -> int:
    """A class number, which may be written as a float. Raises DataError where it is none."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < classes and value == int(value)):
        raise DataError(f"{where}: the label is {shown(text)}, expected 0 to {classes - 1}")
    return int(value)


def shown(text: bytes) -> str:
    """For a message: not more of it than helps."""
    return repr(text[:40].decode("utf-8", "replace"))


def archive_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and contents of every file of a tar.gz, in its order."""
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            if content := archive.extractfile(member):
                yield member.name, content.read()
