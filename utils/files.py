"""Files that are whole or not there, and what a file holds in one number."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from logger import get_logger


@contextmanager
def written(path: Path, temporary: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file that appears under `path` once it is complete and on the disk; until then what was there stays.

    `temporary`, on the same file system, is where it is written: beside `path` unless it is given. Raises OSError.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it under the run
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename is None:  # a full disk does not say which file it had no room for
            error.filename = str(path)
        raise
    finally:
        remove_temporary(temporary)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that `path` holds either what was there before or all of `content`. Raises OSError."""
    with written(path) as file:
        file.write(content)


def write_note(path: Path, text: str) -> None:
    """Write a line for whoever looks there later; a disk that refuses it is logged."""
    try:
        write_atomically(path, (text + "\n").encode(errors="backslashreplace"))
    except OSError as error:
        get_logger().error("%s could not be written (%s): %s", path, error.strerror, text)


def remove_temporary(path: Path) -> None:
    """As far as the disk lets it: the next start tries again, and the reason of the failure is what has to be told."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
