"""Checkpoints written atomically and verified, in the background, and the oldest removed.

Sidecar and checkpoint go to temporary files in the same folder, are flushed, read back and compared, and then renamed,
the sidecar first, so that a file without sidecar is never a crash of ours. Old ones go last.
"""

import copy
import errno
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from logger import get_logger
from utils.checkpoints.naming import Position, run_checkpoints, run_file, sidecar_of
from utils.files import file_digest, remove_temporary, write_atomically


class _Hashing(io.RawIOBase):
    """A binary file that digests what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.file.write(data)
        return len(data)


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint and its sidecar so that `path` always holds a complete, verified one.

    Raises OSError naming the file when the disk refuses; whatever was at `path` before is then still there, and still
    what its sidecar says.
    """
    temporary, sidecar = path.with_name(f".{path.name}.tmp"), sidecar_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed it under the run
        with temporary.open("wb") as file:
            hashing = _Hashing(file)
            torch.save(state, hashing)  # type: ignore[arg-type]  # asks for IO[bytes], needs `write`
            file.flush()
            os.fsync(file.fileno())
        written = {"size": temporary.stat().st_size, "sha256": hashing.digest.hexdigest()}
        if file_digest(temporary) != written["sha256"]:
            raise OSError(f"{temporary} does not read back as it was written")
        about = {"epoch": state.get("epoch"), "step": state.get("step")}
        before = _written_before(path) if path.exists() else []
        if before or not path.exists():
            _write_json(sidecar, {**about, "files": [written, *before]})
        os.replace(temporary, path)
        _write_json(sidecar, {**about, "files": [written]})
        _flush_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise OSError(f"checkpoint {path} could not be written: {_reason(error)}") from error
    finally:
        remove_temporary(temporary)


def write_sidecar(path: Path) -> None:
    """Write the sidecar of a file that is complete, so that every reader notices when it changes. Raises OSError."""
    _write_json(sidecar_of(path), {"files": [{"size": path.stat().st_size, "sha256": file_digest(path)}]})


def _written_before(path: Path) -> list[Any]:
    """What the sidecar of the checkpoint that is about to be replaced says of it; nothing where it is damaged."""
    try:
        return list(json.loads(sidecar_of(path).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return []


def _reason(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:  # below torch.save's RuntimeError lies the disk's own
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return str(error).splitlines()[0]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content).encode())


def _flush_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing
            raise
    finally:
        os.close(descriptor)


def snapshot(value: Any) -> Any:
    """A deep copy in host memory, which training does not change any more."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, snapshot(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return type(value)(snapshot(item) for item in value)
    return copy.deepcopy(value)


class Owed(NamedTuple):
    """A file that has to be written: how, given what the best files hold, and what of that it will hold."""

    write: Callable[[dict[str, float]], None]
    claims: dict[str, float]


class CheckpointWriter:
    """Writes checkpoints of a run folder in a thread, one at a time, and keeps the newest `keep` and the best.

    `save` copies the state to host memory and returns; a later `save` or `wait` reports what went wrong. Older files go
    only after the new one is complete and verified. The best weights stay in memory until their file is written, and
    only then does a checkpoint count them: `claims` are the entries of its state that the best files make true.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        unusable: frozenset[Path] = frozenset(),
        claims: Mapping[str, float] | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """`unusable` files, left by an accident, do not count as kept. `check` raises OSError where not to write."""
        self.folder, self.keep, self.unusable, self.check = folder, keep, set(unusable), check
        self.claims = dict(claims or {})
        self.waiting: Callable[[], None] = lambda: None  # called once a second while somebody waits for a write
        self.written: Position | None = None  # the newest position whose own file is complete
        self._owed: dict[str, Owed] = {}
        self._told: set[str] = set()  # files beside the best ones whose failure is known
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    def save(
        self,
        state: dict[str, Any],
        position: Position,
        *,
        best: Mapping[str, dict[str, float]] | None = None,
        beside: Mapping[str, Callable[[], None]] | None = None,
        own: bool = True,
    ) -> None:
        """Begin to write `state`: as the best one, as the position's own file, or both.

        Raises OSError when the write before it failed.

        Args:
            best: what to claim for each file name under which these weights are the best so far.
            beside: by their names, how to write files that belong to the best ones.
        """
        self.wait()
        copied = snapshot(state)
        self._owed |= {name: Owed(lambda claims, write=write: write(), {}) for name, write in (beside or {}).items()}  # type: ignore[misc]
        for name, claims in (best or {}).items():
            self._owed[name] = Owed(
                lambda known, path=self.folder / name: save_checkpoint({**copied, **known}, path),  # type: ignore[misc]
                claims,
            )
        self._begin(lambda: self._write(copied, position, own))

    def retry(self) -> None:
        """Begin to write the best files that could not be written, where there are any."""
        if self._owed and not (self._thread and self._thread.is_alive()):
            self._begin(self._settle)

    def best(self, key: str) -> float | None:
        """The best so far of an entry, written or still to be written."""
        known = [self.claims, *(owed.claims for owed in list(self._owed.values()))]
        return max((claims[key] for claims in known if key in claims), default=None)

    def wait(self) -> None:
        """Return when nothing is being written any more. Raises OSError when the last write failed."""
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(1.0)
                self.waiting()
            self._thread = None
        self.raise_problem()

    def raise_problem(self) -> None:
        """Raise, once, what went wrong in a write that has ended; does not wait."""
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem

    def _begin(self, work: Callable[[], None]) -> None:
        self._thread = threading.Thread(target=work, name="checkpoint")
        self._thread.start()

    def _write(self, state: dict[str, Any], position: Position, own: bool) -> None:
        path = run_file(self.folder, position)
        # the best one first: killed in between, a start continues from it, and never from a file that already
        # counts an accuracy as reached whose weights are nowhere
        self._settle()
        if own and self._tried(lambda: save_checkpoint({**state, **self.claims}, path)):
            self.written = position
            self.unusable.discard(path)
            self._remove_old(position)

    def _settle(self) -> None:
        """Write what is owed, as far as the disk lets it."""
        for name, (write, claims) in list(self._owed.items()):
            if self._tried(lambda: write({**self.claims, **claims}), "" if claims else name):  # noqa: B023
                self.claims |= claims
                del self._owed[name]

    def _tried(self, write: Callable[[], None], name: str = "") -> bool:
        """Whether a file could be written; the reason is noted where not, and told once of one with a `name`."""
        try:
            self.check()
            write()
        except Exception as error:  # whatever it is, the training loop has to know
            if not name:
                self._problem = error
            elif name not in self._told:
                self._told.add(name)
                where = self.folder / name
                get_logger().error(
                    "%s could not be written (%s); the run goes on, and tries again", where, _reason(error)
                )
            return False
        return True

    def _remove_old(self, newest: Position) -> None:
        """Files of later positions, left unreadable by an accident, neither count nor go."""
        older = [
            path for position, path in run_checkpoints(self.folder) if position <= newest and path not in self.unusable
        ]
        for path in older[self.keep :]:
            try:
                path.unlink(missing_ok=True)
                sidecar_of(path).unlink(missing_ok=True)
            except OSError as error:
                get_logger().error("old checkpoint %s could not be removed: %s", path, _reason(error))
