"""The output folder of a preparation: held by one run at a time, begun with settings that the next run must repeat."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.sources.base import DataError
from utils.faults.folder_lock import PreparationBusyError, hold_for_workers
from utils.files import write_atomically

STATE = ".prepare"  # folder of the output that holds what an interrupted run continues from
SETTINGS = "settings.json"


@contextmanager
def owned(state: Path) -> Iterator[None]:
    """Hold the output folder, whose STATE folder is `state`. Raises DataError where another run does."""
    try:
        with hold_for_workers(state):
            yield
    except PreparationBusyError:
        raise DataError(
            f"another run is preparing {state.parent}; wait for it, or name another output folder"
        ) from None


def require_same_settings(
    state: Path,
    settings: Mapping[str, Any],
    words: Mapping[str, str] | None = None,
    former: Mapping[str, Any] | None = None,
) -> None:
    """Note what this output is made from; raises DataError where it was begun with something else.

    `settings` are named after the options of the command line; `words` say what a changed one is called instead;
    `former` is what settings were before there was an option for them.
    """
    path, words = state / SETTINGS, words or {}
    if path.exists():
        try:
            stored = {**(former or {}), **json.loads(path.read_text(encoding="utf-8"))}
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is damaged ({error}); name another output folder, or delete this one") from error
        changed = [
            words.get(name) or f"--{name.replace('_', '-')} {stored.get(name)} → {value}"
            for name, value in settings.items()
            if stored.get(name) != value
        ]
        if changed:
            raise DataError(
                f"{state.parent} was begun with other settings ({'; '.join(changed)}); name another output"
                " folder, or delete this one to start anew"
            )
        return
    write_atomically(path, (json.dumps(dict(settings), indent=1) + "\n").encode())


class FolderDigest:
    """Size and SHA-256 of many small files together: of lines `name`, `size`, and the contents, in the order given."""

    def __init__(self) -> None:
        self._digest, self.bytes = hashlib.sha256(), 0

    def add(self, name: str, data: bytes) -> None:
        self._digest.update(f"{name}\n{len(data)}\n".encode("utf-8", "surrogateescape"))
        self._digest.update(data)
        self.bytes += len(data)

    def hexdigest(self) -> str:
        return self._digest.hexdigest()
