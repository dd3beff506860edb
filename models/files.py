"""Checkpoint files: safe reading, and what one says about the model, classes and configuration it was written with.

A file of ours holds tensors and plain values only. Released files of this family also pickle a yacs CfgNode under
`config`; it is read as a dictionary. Files of other trainers may name further classes: an empty placeholder stands for
each, and what holds one is left out. No class is ever looked up, so a file cannot execute code. Beside a file of ours
lies a sidecar, FILE.json, with its size and SHA-256 (utils/checkpoints writes both).
"""

import collections
import errno
import hashlib
import json
import logging
import os
import pickle
import pickletools
import re
import stat
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from timm.models import get_pretrained_cfg
from torch import Tensor

from .options import value_of

CHECKPOINT_VERSION = 2  # of the files that we write
LOGGER = logging.getLogger("polaformer")

# What a file system says when it cannot deliver a file, which says nothing about the file.
UNREACHABLE = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES)

# Where the weights and their average lie in files of this family and of other trainers, and what wrappers put before
# every name.
WEIGHTS = {
    "model": ("model", "state_dict", "model_state_dict", "module", "net"),
    "ema": ("model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema"),
}
WEIGHTS_WORDS = ("auto", *WEIGHTS)
WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")

# Modules whose functions run code or reach files: a weight file that names one is refused, although nothing in it
# would be called, because it was made to do harm.
HARMFUL = ["os", "posix", "nt", "sys", "subprocess", "builtins", "importlib", "runpy", "shutil", "socket", "ctypes"]
HARMFUL += ["pickle", "_pickle", "marshal", "code", "pty", "operator", "functools", "webbrowser", "multiprocessing"]
OWN = ("collections.OrderedDict", "collections.Counter", "_codecs.encode", "builtins.set", "builtins.complex")
HARMLESS = ("builtins.frozenset", "builtins.slice", "builtins.object", "builtins.list")
PLAIN_MAPPINGS = ("yacs.config.CfgNode", "collections.defaultdict", "easydict.EasyDict", "addict.addict.Dict")

# Limits that no real file meets, for those that were made to exhaust a machine.
LARGEST_INFLATION = 8  # bytes that a member of the archive unpacks to, for each byte of the file
PICKLES_IN_A_LEGACY_FILE = 5  # magic number, protocol, system, content, names of the storages
LARGEST_CONFIG, DEEPEST_CONFIG = 10_000, 20  # entries and levels; the configurations of this family have some 200 and 4


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: the message names the file and what is wrong with it."""


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of ours, a released one, one of another trainer, a bare state dict, or a .safetensors file, on
    the CPU.

    Whatever the file calls them, `model` and `model_ema` of the result are its weights and their average (one of them
    may be missing), without what wrappers put before their names; log lines say what was taken for what.

    Raises CheckpointError for what is no file, for an empty, truncated or damaged one, for one that differs from its
    sidecar, for one that names functions that run code (naming them), and for one without weights.
    """
    path = Path(os.path.expanduser(path))
    _require_file(path)
    verified = verify_by_sidecar(path)
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path, verified)
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}, expected a dictionary with `model`")
    content = _with_weights(_without_placeholders(_counting_epochs(content, path), path), path)
    _require_classes(content, path)
    return content


def _require_file(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {path} does not exist") from None
    except (OSError, ValueError) as error:  # a loop of links, a name that is too long; ValueError: a zero byte in it
        if isinstance(error, OSError) and error.errno in UNREACHABLE:
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"checkpoint {str(path)[:200]!r} cannot be opened: {reason}") from None
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"checkpoint {path} is a folder; name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"checkpoint {path} is a pipe or device, expected a file")
    if status.st_size == 0:
        raise CheckpointError(f"checkpoint {path} is empty")


def _with_weights(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """`content` with its weights as `model` and `model_ema`, whatever it calls them."""
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"model": content}
    found: dict[str, Any] = {names[0]: None for names in WEIGHTS.values() if names[0] in content}
    taken = []
    for kind, names in WEIGHTS.items():
        name = next((name for name in names if _is_state(content.get(name))), None)
        if name is None:
            continue
        state, notes = unwrapped(content[name])
        _require_plain_tensors(state, path)
        found[names[0]] = state
        taken.append(name)
        if name != names[0]:
            notes.insert(0, f"the {'weights' if kind == 'model' else 'averaged weights'} are `{name}`")
        for note in notes:
            LOGGER.info("%s: %s", path, note)
    if not taken:
        keys = ", ".join(str(key)[:60] for key in list(content)[:20])
        raise CheckpointError(f"checkpoint {path} holds no `model` of named tensors; its keys: {keys or 'none'}")
    return found | {name: value for name, value in content.items() if name not in {*found, *taken}}


def _counting_epochs(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """`content` with the number of finished epochs, where it is DeiT's kind of file: beside `args`, and without a
    configuration, `epoch` is the index of the last one."""
    epoch = content.get("epoch")
    if "args" not in content or "config" in content or type(epoch) is not int:
        return content
    LOGGER.info("%s: epoch %d is taken for the index of the last finished one, as beside `args`", path, epoch)
    return content | {"epoch": epoch + 1}


def _is_state(value: Any) -> bool:
    """Whether this is a state dict; an empty one is none."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())


def unwrapped(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict without the prefix that wrappers (DDP, torch.compile, detectors, …) put before every name, and a
    line on that. Of a detector's file the backbone is taken."""
    prefix, notes = "", []
    backbone = [name for name in state if name.startswith("backbone.")]
    if backbone and len(backbone) < len(state):
        kept = {*backbone, "head.weight", "head.bias"}
        others = [name for name in state if name not in kept]
        state = {name.removeprefix("backbone."): state[name] for name in state if name in kept}
        notes.append(f"the backbone alone is taken, without {len(others)} entries such as {(others or ['none'])[0]}")
    while state and (common := next((p for p in WRAPPERS if all(name.startswith(p) for name in state)), "")):
        prefix += common
        state = {name.removeprefix(common): value for name, value in state.items()}
    return state, notes + ([f"prefix `{prefix}` removed"] if prefix else [])


def _require_plain_tensors(state: dict[str, Tensor], path: Path) -> None:
    """Raise CheckpointError for a weight that is no dense array of real numbers, and for more than the file holds."""
    storages: dict[int, int] = {}
    for name, tensor in state.items():
        odd = {
            "sparse": tensor.layout != torch.strided,
            "meta": tensor.is_meta,
            "quantized": tensor.is_quantized,
            "complex": tensor.is_complex(),
        }
        if kind := next((kind for kind, holds in odd.items() if holds), None):
            raise CheckpointError(f"checkpoint {path}: {name} is a {kind} tensor, expected a dense one of real numbers")
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    if sum(storages.values()) > LARGEST_INFLATION * path.stat().st_size:
        raise CheckpointError(f"checkpoint {path} declares {sum(storages.values())} bytes of weights, more than it has")


def _require_classes(content: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError where `classes` are no names, or not as many as the head has outputs."""
    classes = content.get("classes")
    if classes is None:
        return
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"checkpoint {path}: its `classes` are no list of names")
    bias = next(iter(weights_of(content, "auto", str(path)).values())).get("head.bias")
    if bias is not None and classes and bias.shape != (len(classes),):
        raise CheckpointError(
            f"checkpoint {path} names {len(classes)} `classes`, and its head.bias has shape {tuple(bias.shape)}"
        )


class _Placeholder:
    """Stands for an object of a class that is not looked up; takes whatever the file would have made it from."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _PlainMapping:
    """Stands for a class of dictionaries, whose items follow in the file."""

    def __new__(cls, *args: Any) -> Any:
        return collections.OrderedDict()


def _without_placeholders(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """What holds no placeholder, at the top level; a log line names the rest."""
    kept = {key: value for key, value in content.items() if not _holds_placeholder(value)}
    if dropped := [str(key)[:60] for key in content if key not in kept]:
        LOGGER.info("%s: left out what is made of other classes than tensors: %s", path, ", ".join(dropped[:20]))
    return kept


def _holds_placeholder(value: Any) -> bool:
    waiting, seen = [value], set()
    while waiting:  # no recursion, and each object once: the file decides depth and sharing
        one = waiting.pop()
        if isinstance(one, _Placeholder) or one is _Placeholder:
            return True
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            waiting += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set):
            waiting += one
    return False


def _unpickle(path: Path, verified: bool) -> Any:
    """What torch.save wrote, without looking up any class. Raises CheckpointError, or OSError where the disk fails."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                inflated = sum(member.file_size for member in archive.infolist())
                if inflated > LARGEST_INFLATION * path.stat().st_size:
                    raise CheckpointError(f"checkpoint {path} is damaged: it would unpack to {inflated} bytes")
                damaged = None if verified else archive.testzip()
            if damaged:
                raise CheckpointError(f"checkpoint {path} is damaged: {damaged} does not match its checksum")
        foreign = _foreign_globals(path)
        if harmful := [name for name in foreign if name not in HARMLESS and name.split(".")[0] in HARMFUL]:
            raise CheckpointError(_refusal(path, harmful))
        stand_ins = [(_PlainMapping if name in PLAIN_MAPPINGS else _Placeholder, name) for name in foreign]
        with torch.serialization.safe_globals(stand_ins):  # type: ignore[arg-type]  # pairs are accepted too
            return torch.load(path, map_location="cpu", weights_only=True)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # foreign bytes make the reader fail in any way: IndexError, struct.error, …
        if refused := re.search(r"unsupported global:? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE):
            name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            raise CheckpointError(_refusal(path, [name])) from error
        if isinstance(error, OSError) and error.errno in UNREACHABLE:
            raise
        if foreign := _foreign_globals(path):
            raise CheckpointError(_refusal(path, foreign)) from error
        kind = "damaged or no checkpoint" if isinstance(error, pickle.UnpicklingError) else "truncated or damaged"
        raise CheckpointError(f"checkpoint {path} is {kind} ({type(error).__name__})") from error


def _refusal(path: Path, names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:8])
    return f"checkpoint {path} refused: it asks for {shown}, and only tensors and plain values are loaded"


def _load_safetensors(path: Path) -> dict[str, Any]:
    """Weights, with the configuration and class names that tools/export.py stores as the file's metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            content: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({str(error)[:200]})") from error
    if "config" in metadata:
        content["config"] = metadata["config"]
    if "classes" in metadata:
        try:
            content["classes"] = json.loads(metadata["classes"])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"checkpoint {path}: its `classes` are no JSON") from error
    return content


def _foreign_globals(path: Path) -> list[str]:
    """Classes and functions beyond torch's own that a pickle names, in the pickle protocols torch does not read too."""
    found: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        with archive.open(name) as file:
                            found.update(_globals(file))
        else:
            with path.open("rb") as file:
                for _ in range(PICKLES_IN_A_LEGACY_FILE):
                    found.update(_globals(file))
    except Exception:  # a damaged archive fails in any way
        pass
    return sorted(name for name in found if name not in OWN and not name.startswith("torch."))


def _globals(file: IO[bytes]) -> Iterator[str]:
    """The names in one pickle, in the words of Python 3."""
    strings: list[str] = []  # those pushed so far; STACK_GLOBAL takes the last two
    memo: dict[int, str] = {}
    try:
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name in ("GLOBAL", "INST"):
                yield _renamed(*str(argument).split(" ", 1))
            elif opcode.name == "STACK_GLOBAL" and len(strings) > 1:
                yield _renamed(*strings[-2:])
            elif opcode.name == "MEMOIZE":
                memo[len(memo)] = strings[-1] if strings else ""
            elif opcode.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int):
                strings.append(memo.get(argument, ""))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:  # not a pickle, or cut short: what was named before that counts
        return


def _renamed(module: str, name: str) -> str:
    """A name as Python 2 and old pickle protocols write it, as it is looked up today."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    return f"{IMPORT_MAPPING.get(module, module)}.{name}"


def _sidecar_entries(path: Path, sidecar: Path) -> list[dict[str, Any]]:
    """What the sidecar of the checkpoint `path` says about it; empty where there is no sidecar, or a damaged one.

    While a file is being replaced there are two entries, the old file's and the new one's.
    """
    try:
        entries = json.loads(sidecar.read_text(encoding="utf-8"))["files"]
        return [{"size": int(entry["size"]), "sha256": str(entry["sha256"])} for entry in entries]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
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


class _StoredLoader(yaml.SafeLoader):
    """Without merges (`<<`), which our files have none of, and which multiply what a small text says."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.YAMLError("merges (<<) are not accepted")


def stored_config(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration that a checkpoint was written with, as a plain nested dictionary; None where it has none.

    The learning rates in a released file are already scaled by its batch size. Raises CheckpointError for a text that
    is no YAML, and for one that is larger or deeper than any configuration.
    """
    stored = checkpoint.get("config")
    try:
        tree = plain_dictionary(yaml.load(stored, _StoredLoader) if isinstance(stored, str) else stored)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no date, no number
        reason = str(error).splitlines()[0][:200] if str(error) else "nested too deeply"
        raise CheckpointError(f"the configuration in the checkpoint is no usable YAML: {reason}") from error
    return tree if isinstance(tree, dict) else None


def plain_dictionary(node: Any) -> Any:
    """A nested mapping of any kind as plain dictionaries and lists.

    Raises CheckpointError for more entries or levels than a configuration has: parts that are shared many times over
    make a small file an endless tree.
    """
    entries = 0

    def copied(value: Any, depth: int) -> Any:
        nonlocal entries
        if not isinstance(value, Mapping | list | tuple):
            return value
        entries += len(value)
        if entries > LARGEST_CONFIG or depth > DEEPEST_CONFIG:
            raise CheckpointError(
                f"more than {LARGEST_CONFIG} entries or {DEEPEST_CONFIG} levels, which no configuration has"
            )
        if isinstance(value, Mapping):
            return {key: copied(item, depth + 1) for key, item in value.items()}
        return type(value)([copied(item, depth + 1) for item in value])

    return copied(node, 0)


def weights_of(checkpoint: dict[str, Any], weights: str, source: str) -> dict[str, dict[str, Tensor]]:
    """The state dicts that a word of MODEL.WEIGHTS means, by what they are: model, ema; auto: all that the file holds.

    Raises ValueError for an unknown word, CheckpointError for weights that the file does not hold.
    """
    if weights not in WEIGHTS_WORDS:
        raise ValueError(f"weights {weights!r} are unknown, expected one of {', '.join(WEIGHTS_WORDS)}")
    held = {kind: checkpoint[names[0]] for kind, names in WEIGHTS.items() if checkpoint.get(names[0]) is not None}
    if weights == "auto":
        return held
    if weights not in held:
        lacking = {"ema": "no averaged weights (it was trained without EMA.ENABLE)", "model": "averaged weights alone"}
        raise CheckpointError(
            f"{source} holds {lacking[weights]}; MODEL.WEIGHTS {next(iter(held))} takes what is there"
        )
    return {weights: held[weights]}


def num_classes_of(checkpoint: dict[str, Any], source: str, config: Mapping[str, Any] | None = None) -> int:
    """The size of the stored head. Raises CheckpointError where there is none.

    `config` is that of the model for a file that carries none: a baseline of timm calls its head in its own way.
    """
    state = next(iter(weights_of(checkpoint, "auto", source).values()))
    bias = state.get("head.bias")
    if bias is None:
        bias = state.get(f"{_baseline_head(stored_config(checkpoint) or config or {})}.bias")
    if bias is None:
        raise CheckpointError(
            f"{source} has no head.bias, which tells the number of classes; its last entries are"
            f" {', '.join(list(state)[-3:]) or 'none'}"
        )
    if bias.ndim != 1 or not len(bias):
        raise CheckpointError(f"{source}: head.bias has shape {tuple(bias.shape)}, expected one number a class")
    return len(bias)


def _baseline_head(config: Mapping[str, Any]) -> str:
    """What timm calls the last layer of the baseline that a configuration describes; empty where it is none."""
    described = get_pretrained_cfg(str(value_of(config, "MODEL.TIMM.NAME")).partition(".")[0])
    named = described.classifier if described else ""
    return named if isinstance(named, str) else next(iter(named or ()), "")
