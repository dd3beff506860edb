"""Folders that are held by one program at a time: a run's, and that of a data set in preparation.

They differ in what their worker processes do. A run's loaders must not keep its folder after it died, so the run takes
a POSIX record lock (`lockf`), which no other process inherits. A preparation's workers write into its folder, so that
it is free only when the last of them is gone: they inherit the lock of an open file (`flock`).
"""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from logger import get_logger, printable_lines, setup_logger
from utils import distributed
from utils.checkpoints.finding import remove_temporary_files
from utils.faults.preemption import remove_marker
from utils.files import write_note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE, LOG_FILE = ".lock", "log.txt"
PATIENCE = 20.0  # seconds that a run waits for an earlier one that may just be saving
STOPPED = "STOPPED"  # in the run folder: why a run ended that would end alike if torchrun started it again


class RunFolderError(ValueError):
    """The run folder cannot be written, or holds a run that ended for good."""


class RunFolderBusyError(RunFolderError):
    """Another run is writing into the folder."""


class FolderGoneError(BlockingIOError):
    """The folder at the run's path is not the one that it holds: nothing can be written there for now."""

    def __str__(self) -> str:
        return f"{self.strerror}: {self.filename}"


def open_folder(folder: Path) -> None:
    """Make the run folder. Raises RunFolderError, on every rank, where it cannot be written."""
    problem = None
    if distributed.rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            problem = f"the run folder {folder} cannot be written ({error.strerror}); --output names another root"
    if problem := distributed.broadcast_object(problem):  # every rank ends with the reason, not with a lost peer
        raise RunFolderError(problem)


class PreparationBusyError(ValueError):
    """Another program is preparing a data set in the folder."""


@contextmanager
def hold_for_workers(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, together with all processes that are forked meanwhile.

    Raises PreparationBusyError where another program holds it for 10 s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        for _ in range(100 if fcntl else 0):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            if fcntl:
                raise PreparationBusyError(f"another run holds {folder}; wait for its end")
        yield


class RunLock:
    """Held by rank 0 from start to end; the system releases it with the process, however that ends.

    A POSIX record lock: loader processes do not inherit it, and it holds across machines where the file system says so.
    It is that of one folder: where that is deleted or renamed, another run could take its place.
    """

    def __init__(self, folder: Path) -> None:
        """Take the lock, waiting up to PATIENCE. Raises RunFolderBusyError naming its holder."""
        self.folder = folder
        self._file: IO[bytes] = (folder / LOCK_FILE).open("a+b", buffering=0)
        began, told = time.monotonic(), False
        while not _taken(self._file):
            holder = _holder(self._file)
            if not told:
                told = True
                get_logger().warning("the run folder is in use by %s: waiting %g s for its end", holder, PATIENCE)
            if time.monotonic() - began > PATIENCE:
                self._file.close()
                raise RunFolderBusyError(
                    f"the run folder {folder} is in use by {holder}: end that run first, or give this one another --tag"
                )
            time.sleep(0.1)
        _sign(self._file)
        self._comparable = True
        with suppress(OSError):
            self._comparable = self._is_here()  # else the file system's numbers of files say nothing

    def _is_here(self) -> bool:
        with suppress(FileNotFoundError, NotADirectoryError):
            return os.path.samestat(os.fstat(self._file.fileno()), (self.folder / LOCK_FILE).stat())
        return False

    def check(self) -> None:
        """Raise OSError where the folder that is now at this path is not the one that is held; not after `release`."""
        if self._comparable and not self._file.closed and not self._is_here():
            raise FolderGoneError(errno.EAGAIN, "the run folder was deleted or renamed", str(self.folder))

    def keep(self) -> bool:
        """Where the folder was deleted or renamed, make it anew and hold that one; returns whether.

        Raises RunFolderBusyError where another run has taken its place.
        """
        try:
            self.check()
        except FolderGoneError:
            with suppress(OSError):  # such as a file at its place: tried again at the next step
                self.folder.mkdir(parents=True, exist_ok=True)
                return self._replace((self.folder / LOCK_FILE).open("a+b", buffering=0))
        except OSError:  # a file system that does not answer says nothing about the folder
            pass
        return False

    def _replace(self, file: IO[bytes]) -> bool:
        if not _taken(file):
            holder = _holder(file)
            file.close()
            raise RunFolderBusyError(
                f"the run folder {self.folder} was deleted or renamed under this run, and {holder} has begun"
                " another run there: this one stops. Its checkpoints are where the folder went"
            )
        self._file.close()
        self._file = file
        _sign(file)
        get_logger().warning(
            "the run folder %s was deleted or renamed under the run: it is made anew, and the run goes on in it",
            self.folder,
        )
        return True

    def release(self) -> None:
        self._file.close()


def _sign(file: IO[bytes]) -> None:
    """Say in a lock file who holds it, as far as the disk has room."""
    who = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    with suppress(OSError):
        file.truncate(0)
        file.write(who.encode())


def _holder(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip() or "another process"


@dataclass
class Hold:
    """A run in its folder: rank 0's lock, and whether it has begun to train, until when it leaves nothing behind."""

    lock: RunLock | None
    began: bool = False


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Where what follows fails, remove the folder again if nothing but a log was written into it."""
    try:
        yield
    except Exception:
        if distributed.rank() == 0:
            _remove_bare(folder, {LOG_FILE})
        raise


def _remove_bare(folder: Path, expected: set[str]) -> None:
    """Remove a run folder that holds nothing but `expected` files, and the empty ones above it."""
    with suppress(OSError):
        files = list(folder.iterdir())
        if {path.name for path in files} <= expected:
            setup_logger(0)  # closes the log file
            for path in files:
                path.unlink()
            for empty in (folder, *folder.parents[:2]):  # of the tag, the name and the output
                empty.rmdir()


@contextmanager
def own_folder(folder: Path, lasting: tuple[type[Exception], ...]) -> Iterator[Hold]:
    """Keep other runs out of the run folder, and note there why this one ended if it would end alike again (`lasting`).

    A run that fails before it begins to train leaves no note in the folder, which may be that of a finished run, but
    one for torchrun alone; a folder that was not there before it removes. Raises RunFolderBusyError, on every rank,
    where another run is in it, and RunFolderError where torchrun has started processes again after such an end, or
    after that refusal.
    """
    stopped, lock = folder / STOPPED, _lock_of_rank_0(folder)
    hold = Hold(lock)
    try:
        if distributed.restarts() and stopped.exists():
            raise RunFolderError(f"not tried again: {stopped.read_text(encoding='utf-8').strip()}")
        if lock:
            remove_temporary_files(folder)
            remove_marker(folder)
            stopped.unlink(missing_ok=True)
        yield hold
    except lasting as problem:
        if not hold.began:
            _note_refusal(str(problem))
        elif not stopped.exists():
            write_note(stopped, printable_lines(problem))
        raise
    except RunFolderBusyError as problem:
        _note_refusal(str(problem))
        raise
    finally:
        if lock:
            if not hold.began:
                _remove_bare(folder, {LOCK_FILE, LOG_FILE})
            lock.release()


def _lock_of_rank_0(folder: Path) -> RunLock | None:
    """Rank 0's lock. Raises RunFolderBusyError on every rank, also where the same torchrun was refused before: the
    folder may be that of another run, in which no STOPPED of ours may be, so that this is noted among its own files."""
    lock, problem = None, None
    if distributed.rank() == 0:
        if (refusal := _refusal()) and distributed.restarts() and refusal.exists():
            problem = f"not tried again: {refusal.read_text(encoding='utf-8').strip()}"
            _remove_bare(folder, set())
        else:
            try:
                lock = RunLock(folder)
            except RunFolderBusyError as error:
                problem = str(error)
                _note_refusal(problem)
    if problem := distributed.broadcast_object(problem):
        raise RunFolderBusyError(problem)
    return lock


def _refusal() -> Path | None:
    """Among the files that torchrun keeps of all its starts: ERROR_FILE is LOGS/attempt_N/RANK/error.json."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parents[2] / "refused" if error_file else None


def _note_refusal(why: str) -> None:
    if refusal := _refusal():
        write_note(refusal, why)


def _taken(file: IO[bytes]) -> bool:
    if fcntl is None:
        get_logger().warning("this system has no locks: nothing keeps a second run out of the folder")
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        get_logger().warning("this file system has no locks (%s): nothing keeps a second run out", error.strerror)
    return True
