"""Weights into models: strictly, apart from a short named list of allowances, or adapted for fine-tuning."""

from collections.abc import Iterable
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from yacs.config import CfgNode

from logger import get_logger
from models import build_model
from models.classifier import Classifier
from models.layers import Grid, resize_grid
from utils.checkpoint import CheckpointError, load_checkpoint, num_classes_of, stored_config


def _listed(title: str, names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"\n  {title} ({len(names)}): {shown}" if names else ""


def released_names(model: Classifier, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """`state` without what this family's files may hold and our models do not, and a line on what was dropped.

    The allowances: a `module.` prefix of every name (a saved DDP wrapper), buffers that the model derives
    (`derived_entries`), and parameters that the released forward pass never used (`unused_released_parameters`).
    """
    notes = []
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
        notes.append("prefix `module.` removed")
    own = model.state_dict()
    dropped = [
        name
        for name in state
        if name not in own and (name.endswith(model.derived_entries) or name in model.unused_released_parameters)
    ]
    if dropped:
        notes.append(f"dropped {len(dropped)} entries that the model derives or never used: {', '.join(dropped[:4])}…")
    return {name: value for name, value in state.items() if name not in dropped}, notes


def load_weights(model: Classifier, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly, apart from `released_names`.

    Raises CheckpointError that lists missing, unexpected and mis-shaped entries.
    """
    state, notes = released_names(model, state)
    own = model.state_dict()
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = (
        _listed("missing", (name for name in own if name not in state))
        + _listed("unexpected", (name for name in state if name not in own))
        + _listed("other shape", misshaped)
    )
    if problems:
        raise CheckpointError(f"{source} does not fit {type(model).__name__} of this configuration:{problems}")
    model.load_state_dict(state, strict=True)
    for note in notes:
        get_logger().info("%s: %s", source, note)


def _source_grids(checkpoint: dict[str, Any], source: str) -> dict[str, Grid]:
    """The grids of the position tables in a file, from the configuration it carries; empty where it has none."""
    stored = stored_config(checkpoint, source)
    if stored is None:
        return {}
    try:
        with torch.device("meta"):
            return build_model(stored).position_grids()
    except ValueError:
        return {}


def adapt_position_tables(
    model: Classifier, state: dict[str, Tensor], source_grids: dict[str, Grid], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Resize position tables of another grid to the model's, and say so in a line for each.

    A table whose grid `source_grids` does not tell is taken for a square one. Raises CheckpointError where it is not.
    """
    adapted, own, notes = dict(state), model.state_dict(), []
    for name, target in model.position_grids().items():
        if name not in state or state[name].shape[-1] != own[name].shape[-1]:
            continue  # missing, or of another width: strict loading will say so
        table = state[name].flatten(0, -2)
        side = isqrt(len(table))
        grid = source_grids.get(name, (side, side))
        if grid[0] * grid[1] != len(table):
            raise CheckpointError(f"{source}: the {len(table)} rows of {name} are not a {grid[0]}×{grid[1]} grid")
        if grid != target:
            adapted[name] = resize_grid(table, grid, target).reshape(own[name].shape)
            notes.append(f"{name}: {grid[0]}×{grid[1]} resized to {target[0]}×{target[1]}")
    return adapted, notes


def load_pretrained(model: Classifier, checkpoint: dict[str, Any], source: str) -> None:
    """Load a checkpoint's weights into a model of another image size or class count, logging each adaptation.

    Position tables are resized; the head keeps its fresh initialisation where the number of classes differs.
    Raises CheckpointError for whatever else does not fit.
    """
    state, _ = released_names(model, checkpoint["model"])
    state, notes = adapt_position_tables(model, state, _source_grids(checkpoint, source), source)
    own = model.state_dict()
    head = [name for name in ("head.weight", "head.bias") if name in own]
    if any(name not in state or state[name].shape != own[name].shape for name in head):
        old = len(state["head.bias"]) if "head.bias" in state else 0
        notes.append(f"head: {old} classes in the file, {model.num_classes} here; starts anew")
        state.update({name: own[name] for name in head})
    load_weights(model, state, source)
    for note in notes:
        get_logger().info("%s: %s", source, note)


def load_resized(model: Classifier, state: dict[str, Tensor], built_for: CfgNode, source: str) -> None:
    """Load the weights of the model that the configuration `built_for` describes into one of another image size.

    Position tables are resized, with a log line each; all else loads strictly. Raises CheckpointError.
    """
    with torch.device("meta"):
        grids = build_model(built_for, model.num_classes).position_grids()
    state, _ = released_names(model, state)
    state, notes = adapt_position_tables(model, state, grids, source)
    load_weights(model, state, source)
    for note in notes:
        get_logger().info("%s: %s", source, note)


class LoadedModel(NamedTuple):
    """A model rebuilt from a checkpoint: in evaluation mode, on the CPU, with the file's configuration (frozen) and the
    names of its classes where it knows them."""

    model: Classifier
    config: CfgNode
    classes: list[str] | None


def load_model(path: str | Path, *, ema: bool = False, config: CfgNode | None = None) -> LoadedModel:
    """Rebuild the model of a checkpoint of ours or a released one from that file alone.

    Args:
        ema: the averaged weights instead of the last ones.
        config: for a bare state dict, which carries no configuration; otherwise it replaces the stored one.

    Raises:
        CheckpointError: an unusable file, one without a configuration or average where that is needed, or weights that
            do not fit.
    """
    source = str(path)
    checkpoint = load_checkpoint(path)
    config = config or stored_config(checkpoint, source)
    if config is None:
        raise CheckpointError(f"{source} carries no configuration, so it does not say which model it is; name one")
    weights = checkpoint.get("model_ema") if ema else checkpoint["model"]
    if weights is None:
        raise CheckpointError(f"{source} holds no averaged weights (it was trained without EMA.ENABLE)")
    model = build_model(config, num_classes_of(checkpoint, source))
    load_weights(model, weights, source)
    classes = checkpoint.get("classes")
    return LoadedModel(model.eval(), config, list(classes) if classes else None)
