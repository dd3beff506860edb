"""A folder whose disk refuses, without mounting anything and whoever runs the tests.

Permissions do not bind root, and mounting a small or read-only file system takes rights that a CI job lacks. Python
tells audit hooks of every open, rename, removal and new folder before it asks the system, whatever function asked; a
hook that raises is the system's refusal. Flushes, which have no such event, are refused by a patch of os.fsync.
"""

import errno
import os
import sys
from pathlib import Path
from typing import Any

FULL = errno.ENOSPC
READ_ONLY = errno.EROFS


class FaultyDisk:
    """While entered, operations that change `folder` fail with `error`: the `first` (from 1), with `lasting` all after.

    A full disk still lets files be removed. `refused` names what failed. Reading always works.
    """

    def __init__(self, folder: Path, error: int, first: int = 1, lasting: bool = True) -> None:
        self.folder, self.error, self.first, self.lasting = str(folder), error, first, lasting
        self.count, self.refused = 0, list[str]()

    def __enter__(self) -> "FaultyDisk":
        _disks.append(self)
        return self

    def __exit__(self, *raised: object) -> None:
        _disks.remove(self)

    def asked(self, operation: str, path: str) -> None:
        """Raise OSError if this operation is refused."""
        if not path.startswith(self.folder) or (operation == "remove" and self.error == FULL):
            return
        self.count += 1
        if self.count == self.first or (self.lasting and self.count > self.first):
            name = "folder" if path == self.folder else os.path.basename(path)
            self.refused.append(f"{operation} {name}")
            raise OSError(self.error, os.strerror(self.error), path)


_disks: list[FaultyDisk] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _disks:
        return
    operation = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir"}.get(event)
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        operation = "open"
    if operation == "mkdir" and os.path.isdir(arguments[0]):
        return  # nothing to change
    if operation and isinstance(arguments[0], str | os.PathLike):
        for disk in list(_disks):
            disk.asked(operation, os.fspath(arguments[1] if operation == "rename" else arguments[0]))


def _fsync(descriptor: int) -> None:
    if _disks:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        for disk in list(_disks):
            disk.asked("fsync", path)
    _real_fsync(descriptor)


sys.addaudithook(_audit)  # for good, as hooks cannot be removed: idle without a disk
_real_fsync, os.fsync = os.fsync, _fsync
