"""One run per run folder."""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from logger import get_logger

LOCK_FILE = ".lock"
PATIENCE = 20.0  # seconds that a run waits for an earlier one that may just be saving


class RunFolderBusyError(ValueError):
    """Another run is writing into the folder."""


class RunLock:
    """Held by rank 0 from start to end; the system releases it with the process, however that ends.

    A POSIX record lock: loader processes do not inherit it, and it holds across machines where the file system says so.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock, waiting up to PATIENCE. Raises RunFolderBusyError naming its holder."""
        self._file: IO[str] | None = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        began, told = time.monotonic(), False
        while not _taken(self._file):
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            if not told:
                told = True
                get_logger().warning("the run folder is in use by %s: waiting %g s for its end", holder, PATIENCE)
            if time.monotonic() - began > PATIENCE:
                self._file.close()
                raise RunFolderBusyError(
                    f"the run folder {folder} is in use by {holder}: end that run first, or give this one another --tag"
                )
            time.sleep(0.1)
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        get_logger().warning("this file system has no locks (%s): nothing keeps a second run out", error.strerror)
    return True
