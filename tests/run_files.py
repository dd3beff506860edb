"""The checkpoints of a run folder, as tests name and read them."""

from pathlib import Path

from engine.state import stored_position
from models.files import load_checkpoint
from utils.checkpoints.naming import Position, run_file


def epoch_file(folder: Path, epoch: int) -> Path:
    """The checkpoint after `epoch` finished epochs."""
    return run_file(folder, Position(epoch))


def read_position(path: Path) -> Position:
    """The position of a checkpoint that can be used. Raises CheckpointError for one that cannot."""
    return stored_position(load_checkpoint(path))
