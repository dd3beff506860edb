"""Folders that are held by one program at a time: a run's, and that of a data set in preparation.

They differ in what their worker processes do. A run's loaders must not keep its folder after it died, so the run takes
a POSIX record lock (`lockf`), which no other process inherits. A preparation's workers write into its folder, so that
it is free only when the last of them is gone: they inherit the lock of an open file (`flock`).
"""

import errno
import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from logger import get_logger
from utils import distributed
from utils.checkpoints.finding import remove_temporary_files
from utils.faults.preemption import remove_marker
from utils.names import printable_lines

LOCK_FILE = ".lock"
PATIENCE = 20.0  # seconds that a run waits for an earlier one that may just be saving
STOPPED = "STOPPED"  # in the run folder: why a run ended that would end alike if torchrun started it again


class RunFolderError(ValueError):
    """The run folder cannot be written, or holds a run that ended for good."""


class RunFolderBusyError(RunFolderError):
    """Another run is writing into the folder."""


def open_folder(folder: Path) -> None:
    """Make the run folder. Raises RunFolderError, on every rank, where it cannot be written."""
    problem = _make(folder) if distributed.rank() == 0 else None
    if problem := distributed.broadcast_object(problem):  # every rank ends with the reason, not with a lost peer
        raise RunFolderError(str(problem))


def _make(folder: Path) -> str | None:
    """Make a folder; returns what is wrong with it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"the run folder {folder} cannot be written ({error.strerror}); --output names another root"
    return None


class PreparationBusyError(ValueError):
    """Another program is preparing a data set in the folder."""


@contextmanager
def hold_for_workers(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, together with all processes that are forked meanwhile.

    Raises PreparationBusyError where another program holds it for 10 s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        for _ in range(100):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            raise PreparationBusyError(f"another run holds {folder}; wait for its end")
        yield


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


@contextmanager
def own_folder(folder: Path, lasting: tuple[type[Exception], ...]) -> Iterator[None]:
    """Keep other runs out of the run folder, and note there why this one ended if it would end alike again (`lasting`).

    Raises RunFolderBusyError, on every rank, where another run is in it, and RunFolderError where torchrun has started
    processes again after such an end.
    """
    lock, problem = None, None
    if distributed.rank() == 0:
        try:
            lock = RunLock(folder)
        except RunFolderBusyError as error:
            problem = str(error)
    if problem := distributed.broadcast_object(problem):
        raise RunFolderBusyError(problem)
    stopped = folder / STOPPED
    try:
        if distributed.restarts() and stopped.exists():
            raise RunFolderError(f"not tried again: {stopped.read_text(encoding='utf-8').strip()}")
        if lock:
            remove_temporary_files(folder)
            remove_marker(folder)
            stopped.unlink(missing_ok=True)
        yield
    except lasting as problem:
        if not stopped.exists():
            stopped.write_text(f"{printable_lines(problem)}\n", encoding="utf-8")
        raise
    finally:
        if lock:
            lock.release()


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        get_logger().warning("this file system has no locks (%s): nothing keeps a second run out", error.strerror)
    return True
