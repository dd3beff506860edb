"""Checkpoint files: safe reading, atomic verified writing, retention, and the search for the newest readable one.

A file of ours holds tensors and plain values only. Released files of this family also pickle a yacs CfgNode under
`config`; it is read as a dictionary. No other class is ever looked up, so a file cannot execute code.
"""

import collections
import hashlib
import os
import pickle
import pickletools
import re
import time
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from yacs.config import CfgNode

from config import config_from_tree, image_size, value_of
from logger import get_logger

EPOCH_FILE = re.compile(r"ckpt_epoch_(\d+)\.pth")
BEST_FILE = "max_acc.pth"
# Keys that change what a model computes without changing any shape: a file must have been written with the same.
FUNCTION_KEYS = ("MODEL.LA.ALPHA", "MODEL.SWIN.QK_SCALE")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file and what is wrong with it."""


def epoch_file(folder: Path, epoch: int) -> Path:
    """The checkpoint after `epoch` finished epochs."""
    return folder / f"ckpt_epoch_{epoch}.pth"


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours, a released one, or a bare state dict (returned as {"model": …}), on the CPU.

    Raises CheckpointError for a missing, empty, truncated or damaged file, for one that asks for any class or function
    beyond tensors and plain values (naming it), and for one that holds no weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise CheckpointError(f"checkpoint {path} is damaged: {damaged} does not match its checksum")
        with torch.serialization.safe_globals([(collections.OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # foreign bytes make the reader fail in any way: IndexError, struct.error, …
        if refused := re.search(r"unsupported global:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE):
            name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            raise CheckpointError(
                f"checkpoint {path} refused: it asks for {name}, and only tensors and plain values are loaded"
            ) from error
        if foreign := _foreign_globals(path):
            names = ", ".join(foreign)
            raise CheckpointError(
                f"checkpoint {path} refused: it asks for {names}, and only tensors and plain values are loaded"
            ) from error
        kind = "damaged or no checkpoint" if isinstance(error, pickle.UnpicklingError) else "truncated or damaged"
        raise CheckpointError(f"checkpoint {path} is {kind} ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary with `model`")
    if "model" not in content and content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    weights = content.get("model")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        keys = ", ".join(map(str, content))
        raise CheckpointError(f"checkpoint {path} holds no `model` of named tensors; its keys: {keys}")
    return content


def _foreign_globals(path: Path) -> list[str]:
    """Classes and functions beyond torch's own that a pickle names, in the pickle protocols torch does not read too."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
        else:
            pickles = [path.read_bytes()]
    except Exception:  # a damaged archive fails in any way
        return []
    found: list[str] = []
    for content in pickles:
        strings: list[str] = []  # those pushed so far; STACK_GLOBAL takes the last two
        memo: dict[int, str] = {}
        try:
            for opcode, argument, _ in pickletools.genops(content):
                if opcode.name in ("GLOBAL", "INST"):
                    found.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                    found.append(".".join(strings[-2:]))
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = strings[-1] if strings else ""
                elif opcode.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
                    strings.append(memo.get(argument, ""))
                elif isinstance(argument, str):
                    strings.append(argument)
        except Exception:  # not a pickle, or cut short: what was named before that counts
            continue
    own = ("torch.", "collections.OrderedDict", "yacs.config.CfgNode")
    return sorted({name for name in found if not name.startswith(own)})


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stored_config(checkpoint: dict[str, Any], source: str) -> CfgNode | None:
    """The configuration a checkpoint was written with, or None. Keys without effect are dropped with one log line.

    The learning rates in a released file are already scaled by its batch size; they are never reused.
    """
    stored = checkpoint.get("config")
    if stored is None:
        return None
    tree = yaml.safe_load(stored) if isinstance(stored, str) else _plain(stored)
    if not isinstance(tree, dict):
        return None
    config, ignored = config_from_tree(tree, source)
    if ignored:
        get_logger().info("%s: ignored %d stored keys without effect: %s", source, len(ignored), ", ".join(ignored))
    return config


def _plain(node: Any) -> Any:
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, dict) else node


def differing_function_keys(checkpoint: dict[str, Any], config: CfgNode, source: str) -> list[str]:
    """A line for each key by which the file's configuration computes another function with the same shapes."""
    stored = stored_config(checkpoint, source)
    if stored is None:
        return []
    pairs = {key: (value_of(stored, key), value_of(config, key)) for key in FUNCTION_KEYS}
    sizes = image_size(stored), image_size(config)
    if sizes[0] != sizes[1] and prod(sizes[0]) == prod(sizes[1]):  # 64×256 and 128×128 have tables of the same shape
        pairs["DATA.IMG_SIZE"] = (list(sizes[0]), list(sizes[1]))
    return [
        f"{source} was trained with {key} {theirs}, this configuration has {ours}, which gives other results from the"
        f" same weights; --opts {key} {theirs} restores it"
        for key, (theirs, ours) in pairs.items()
        if theirs != ours
    ]


def num_classes_of(checkpoint: dict[str, Any], source: str) -> int:
    """The size of the stored head. Raises CheckpointError where there is none."""
    for name in ("head.bias", "module.head.bias"):
        if name in checkpoint["model"]:
            return len(checkpoint["model"][name])
    raise CheckpointError(f"{source} holds no classifier head (head.bias)")


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that `path` always holds a complete one: temporary file, flush, fsync, verify, rename.

    Raises OSError naming the file when the disk refuses; whatever was at `path` before is then still there.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        with zipfile.ZipFile(temporary) as archive:
            if archive.testzip():
                raise OSError(f"{temporary} does not read back as it was written")
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        raise OSError(f"checkpoint {path} could not be written: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _epoch_of(path: Path) -> int:
    match = EPOCH_FILE.fullmatch(path.name)
    return int(match[1]) if match else -1


def epoch_checkpoints(folder: Path) -> list[Path]:
    """The epoch checkpoints of a run folder, newest epoch first (file times play no part)."""
    return sorted((path for path in folder.glob("*.pth") if _epoch_of(path) >= 0), key=_epoch_of, reverse=True)


def remove_old_checkpoints(folder: Path, keep: int, newest: int) -> None:
    """Keep the newest `keep` epoch checkpoints up to epoch `newest`, the one just written.

    Files of later epochs, left unreadable by an accident, neither count nor go; the best one has its own name.
    """
    older = [path for path in epoch_checkpoints(folder) if _epoch_of(path) <= newest]
    for path in older[keep:]:
        path.unlink(missing_ok=True)


def newest_checkpoint(folder: Path) -> Path | None:
    """The readable checkpoint of a run folder with the most finished epochs, the best one included; warns of others."""
    best = folder / BEST_FILE
    found: list[tuple[int, Path]] = []
    for path in [*epoch_checkpoints(folder), *([best] if best.is_file() else [])]:
        if found and path != best:
            continue  # older than one that is readable
        try:
            found.append((load_checkpoint(path).get("epoch", 0), path))
        except CheckpointError as error:
            get_logger().warning("skipped: %s", error)
    return max(found, key=lambda pair: pair[0])[1] if found else None


def set_aside(folder: Path, named: Path) -> Path | None:
    """Move an earlier run's checkpoints and records out of the way of a new one, except the file `named` by the user.

    Returns where to, None if there are no checkpoints.
    """
    best = folder / BEST_FILE
    files = [
        path for path in (*epoch_checkpoints(folder), best) if path.is_file() and path.resolve() != named.resolve()
    ]
    if not files:
        return None
    target = folder / time.strftime("earlier-%Y%m%d-%H%M%S")
    target.mkdir()
    records = (folder / name for name in ("metrics.jsonl", "config.yaml", "curves.png", "tensorboard"))
    for path in (*files, *(record for record in records if record.exists())):
        path.rename(target / path.name)
    return target
