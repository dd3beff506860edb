"""The output folder of a preparation: held by one run at a time, begun with settings that the next run must repeat."""

import fcntl
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.sources.base import DataError
from utils.files import write_atomically

STATE = ".prepare"  # folder of the output that holds what an interrupted run continues from
SETTINGS = "settings.json"


@contextmanager
def owned(state: Path) -> Iterator[None]:
    """Hold the output folder's lock; worker processes hold it too, so that none of a killed run still writes.

    `state` is the output's STATE folder. Raises DataError where another run holds it.
    """
    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as lock:
        for _ in range(100):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        else:
            raise DataError(f"another run is preparing {state.parent}; wait for it, or name another output folder")
        yield


def require_same_settings(state: Path, settings: Mapping[str, Any], words: Mapping[str, str] | None = None) -> None:
    """Note what this output is made from; raises DataError where it was begun with something else.

    `settings` are named after the options of the command line; `words` say what a changed one is called instead.
    """
    path, words = state / SETTINGS, words or {}
    if path.exists():
        stored = json.loads(path.read_text(encoding="utf-8"))
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
