"""Checkpoint files: safe reading, and what one says about the model, classes and configuration it was written with.

A file of ours holds tensors and plain values only. Released files of this family also pickle a yacs CfgNode under
`config`; it is read as a dictionary. No other class is ever looked up, so a file cannot execute code. Beside a file of
ours lies a sidecar, FILE.json, with its size and SHA-256 (utils/checkpoints writes both).
"""

import collections
import errno
import hashlib
import json
import logging
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

CHECKPOINT_VERSION = 2  # of the files that we write
LOGGER = logging.getLogger("polaformer")

# What a file system says when it cannot deliver a file, which says nothing about the file.
UNREACHABLE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file and what is wrong with it."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours, a released one, a bare state dict (returned as {"model": …}), or a .safetensors file,
    on the CPU.

    Raises CheckpointError for a missing, empty, truncated or damaged file, for one that differs from its sidecar, for
    one that asks for any class or function beyond tensors and plain values (naming it), and for one without weights.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if path.stat().st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty")
    verified = verify_by_sidecar(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path, verified)
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


def _unpickle(path: Path, verified: bool) -> Any:
    """What torch.save wrote, without looking up any class. Raises CheckpointError, or OSError where the disk fails."""
    try:
        if not verified and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise CheckpointError(f"checkpoint {path} is damaged: {damaged} does not match its checksum")
        with torch.serialization.safe_globals([(collections.OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # foreign bytes make the reader fail in any way: IndexError, struct.error, …
        if refused := re.search(r"unsupported global:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE):
            foreign = [refused[1] if "." in refused[1] else f"builtins.{refused[1]}"]
        else:
            foreign = _foreign_globals(path)
        if foreign:
            names = ", ".join(foreign)
            raise CheckpointError(
                f"checkpoint {path} refused: it asks for {names}, and only tensors and plain values are loaded"
            ) from error
        if isinstance(error, OSError) and error.errno in UNREACHABLE:
            raise
        kind = "damaged or no checkpoint" if isinstance(error, pickle.UnpicklingError) else "truncated or damaged"
        raise CheckpointError(f"checkpoint {path} is {kind} ({type(error).__name__})") from error


def _load_safetensors(path: Path) -> dict[str, Any]:
    """Weights, with the configuration and class names that tools/export.py stores as the file's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({error})") from error
    if "config" in metadata:
        content["config"] = metadata["config"]
    if "classes" in metadata:
        content["classes"] = json.loads(metadata["classes"])
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


def _sidecar_entries(path: Path, sidecar: Path) -> list[dict[str, Any]]:
    """What the sidecar of the checkpoint `path` says about it; empty where there is no sidecar, or a damaged one.

    While a file is being replaced there are two entries, the old file's and the new one's.
    """
    try:
        entries = json.loads(sidecar.read_text(encoding="utf-8"))["files"]
        return [{"size": int(entry["size"]), "sha256": str(entry["sha256"])} for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        LOGGER.warning("the sidecar %s is damaged; the checkpoint is checked without it", sidecar)
        return []


def verify_by_sidecar(path: Path) -> bool:
    """True where the file is what its sidecar says, False without a sidecar.

    Raises CheckpointError where they differ.
    """
    sidecar = path.with_name(path.name + ".json")
    entries = _sidecar_entries(path, sidecar)
    if not entries:
        return False
    size = path.stat().st_size
    if not any(entry["size"] == size for entry in entries):
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged: {size} bytes, written were {entries[0]['size']}"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not any(entry["sha256"] == digest for entry in entries if entry["size"] == size):
        raise CheckpointError(
            f"checkpoint {path} is damaged: it does not match the SHA-256 in {sidecar.name} (delete that file"
            " if you replaced the checkpoint on purpose)"
        )
    return True


def stored_config(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration that a checkpoint was written with, as a plain nested dictionary; None where it has none.

    The learning rates in a released file are already scaled by its batch size. Raises CheckpointError for a text that
    is no YAML.
    """
    stored = checkpoint.get("config")
    try:
        tree = yaml.safe_load(stored) if isinstance(stored, str) else plain_dictionary(stored)
    except yaml.YAMLError as error:
        raise CheckpointError(
            f"the configuration in the checkpoint is no YAML: {str(error).splitlines()[0]}"
        ) from error
    return tree if isinstance(tree, dict) else None


def plain_dictionary(node: Any) -> Any:
    """A nested mapping of any kind as plain dictionaries."""
    return {key: plain_dictionary(value) for key, value in node.items()} if isinstance(node, Mapping) else node


def num_classes_of(checkpoint: dict[str, Any], source: str) -> int:
    """The size of the stored head. Raises CheckpointError where there is none."""
    for name in ("head.bias", "module.head.bias"):
        if name in checkpoint["model"]:
            return len(checkpoint["model"][name])
    raise CheckpointError(f"{source} holds no classifier head (head.bias)")
