"""What the files of a run folder are called: a checkpoint by what is finished, the best one, and their sidecars.

`ckpt_epoch_3.pth` after three epochs, `ckpt_epoch_3_step_250.pth` 250 optimizer steps later. File times play no part.
The best one so far is `max_acc.pth`, and by the average of the weights (EMA) `max_ema_acc.pth`. Beside a checkpoint
lies a sidecar, FILE.json, with its size and SHA-256.
"""

import re
from pathlib import Path
from typing import NamedTuple


class Best(NamedTuple):
    """The file of the best weights so far, and the entry of every checkpoint with their top-1 in percent."""

    file: str
    key: str


BESTS = {"model": Best("max_acc.pth", "max_accuracy"), "ema": Best("max_ema_acc.pth", "max_accuracy_e")}
BEST_FILE = BESTS["model"].file
RUN_FILE = re.compile(r"ckpt_epoch_(\d+)(?:_step_(\d+))?\.pth")


class Position(NamedTuple):
    """Where a run stands: finished epochs, and optimizer steps of the epoch after them. Later positions are larger."""

    epoch: int = 0
    done: int = 0


def run_file(folder: Path, position: Position) -> Path:
    """The checkpoint at a position."""
    inside = f"_step_{position.done}" if position.done else ""
    return folder / f"ckpt_epoch_{position.epoch}{inside}.pth"


def position_of(path: Path) -> Position | None:
    """The position a file is named after, None for other names."""
    match = RUN_FILE.fullmatch(path.name)
    return Position(int(match[1]), int(match[2] or 0)) if match else None


def run_checkpoints(folder: Path) -> list[tuple[Position, Path]]:
    """The checkpoints of a run folder, the best ones apart, newest position first."""
    found = [(position, path) for path in folder.glob("*.pth") if (position := position_of(path)) is not None]
    return sorted(found, reverse=True)


def best_files(folder: Path) -> list[Path]:
    """The best checkpoints that a run folder holds."""
    return [path for best in BESTS.values() if (path := folder / best.file).is_file()]


def sidecar_of(path: Path) -> Path:
    """The file beside a checkpoint that holds its size and SHA-256."""
    return path.with_name(path.name + ".json")
