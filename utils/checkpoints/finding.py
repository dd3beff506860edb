"""The newest usable checkpoint of a run folder, and an earlier run's checkpoints out of the way."""

import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from logger import get_logger
from utils.checkpoints.naming import Position, best_files, run_checkpoints, sidecar_of

RECORDS = ("metrics.jsonl", "config.yaml", "curves.png", "tensorboard", "predictions.npz", "environment.json")
PATIENCE = (1.0, 5.0, 0.0)  # seconds of waiting after each failure of the file system to read a checkpoint


class NoneUsableError(ValueError):
    """A run folder holds checkpoints, and none of them can be used."""


class Found(NamedTuple):
    """The newest usable checkpoint of a run folder, or None, and those that were skipped on the way to it."""

    path: Path | None
    skipped: frozenset[Path] = frozenset()


def newest_checkpoint(folder: Path, read: Callable[[Path], Position]) -> Found:
    """Walk back from the newest checkpoint to the first that is verified; warns of each one skipped, with the reason.

    The best ones count too, by the position they hold.

    Args:
        read: verifies a file and returns the position it was written at. Raises ValueError for a file that cannot be
            used, OSError where the file system does not deliver it.

    Raises:
        NoneUsableError: there are checkpoints and none can be used; to begin anew is for the user to say.
    """
    candidates: list[tuple[Position, Path]] = []
    skipped: set[Path] = set()

    def usable(path: Path) -> Position | None:
        for patience in PATIENCE:  # a file system that fails for a moment is no damage
            try:
                return read(path)
            except OSError as error:
                problem: Exception = error
                time.sleep(patience)
            except ValueError as error:
                problem = error
                break
        get_logger().warning("skipped: %s", problem)
        skipped.add(path)
        return None

    for named, path in run_checkpoints(folder):
        if usable(path) is not None:
            candidates.append((named, path))
            break
    for path in reversed(best_files(folder)):  # of one position, the file written last knows what the others hold
        if (held := usable(path)) is not None:
            candidates.append((held, path))
    if skipped and not candidates:
        raise NoneUsableError(
            f"none of the {len(skipped)} checkpoints in {folder} can be used (the log says why); restore one, or begin"
            " anew with --opts TRAIN.AUTO_RESUME False, which moves them aside"
        )
    newest = max(candidates, key=lambda pair: pair[0])[1] if candidates else None
    return Found(newest, frozenset(skipped))


def remove_temporary_files(folder: Path) -> None:
    """Remove what writes and removals that were killed left behind: temporary files, and sidecars of no checkpoint."""
    orphans = [path for path in folder.glob("*.pth.json") if not path.with_suffix("").exists()]
    for path in (*folder.glob(".*.tmp"), *orphans):
        path.unlink(missing_ok=True)


def set_aside(folder: Path, named: Path) -> Path | None:
    """Move an earlier run's checkpoints and records out of the way of a new one, except the file `named` by the user.

    Returns where to, None if there are no checkpoints.
    """
    checkpoints = [*(path for _, path in run_checkpoints(folder)), *best_files(folder)]
    files = [path for path in checkpoints if path.resolve() != named.resolve()]
    if not files:
        return None
    name = time.strftime("earlier-%Y%m%d-%H%M%S")
    target = next(path for i in itertools.count() if not (path := folder / (f"{name}-{i}" if i else name)).exists())
    target.mkdir()
    records = [folder / name for name in RECORDS] + [sidecar_of(path) for path in files]
    for path in (*files, *(record for record in records if record.exists())):
        shutil.move(path, target / path.name)
    return target
