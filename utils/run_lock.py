"""One run per run folder."""

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"


class RunFolderBusyError(ValueError):
    """Another run is writing into the folder."""


class RunLock:
    """Held by rank 0 from start to end; the system releases it with the process, however that ends.

    A POSIX record lock: loader processes do not inherit it, and it holds across machines where the file system says so.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock. Raises RunFolderBusyError naming its holder."""
        self._file: IO[str] | None = (folder / LOCK_FILE).open("a+", encoding="utf-8")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise RunFolderBusyError(
                f"the run folder {folder} is in use by {holder}: end that run first, or give this one another --tag"
            ) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._file.flush()

    def release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
