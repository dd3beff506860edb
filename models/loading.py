"""Weights into models: strictly, apart from a short named list of allowances, or adapted for fine-tuning."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .adaptation import adapt_position_tables, released_names, require_fit
from .classifier import TrainableModel
from .files import CheckpointError, load_checkpoint, num_classes_of, plain_dictionary, stored_config, weights_of
from .layers import Grid
from .registry import build_model, list_models

LOGGER = logging.getLogger("polaformer")
# What a constructor raises for values that a configuration in a file may have.
NO_MODEL = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def load_weights(model: TrainableModel, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly, apart from `released_names`, with a log line on what was dropped.

    Raises CheckpointError that lists missing, unexpected and mis-shaped entries.
    """
    state, notes = released_names(model, state)
    require_fit(model, state, source)
    model.load_state_dict(state, strict=True)
    _tell(source, notes)


def _tell(source: str, notes: list[str]) -> None:
    for note in notes:
        LOGGER.info("%s: %s", source, note)


def _source_grids(checkpoint: dict[str, Any]) -> dict[str, Grid]:
    """The grids of the position tables in a file, from the configuration it carries; empty where it has none."""
    stored = stored_config(checkpoint)
    if stored is None:
        return {}
    try:
        with torch.device("meta"):
            return build_model(stored).position_grids()
    except NO_MODEL:
        return {}


def load_pretrained(model: TrainableModel, checkpoint: dict[str, Any], source: str, weights: str = "auto") -> None:
    """Load a checkpoint's weights into a model of another image size or class count, logging each adaptation.

    `weights` is a word of MODEL.WEIGHTS; auto takes the model's, and their average where the file has nothing else.
    Position tables are resized; the head keeps its fresh initialisation where the number of classes differs.
    Raises CheckpointError for whatever else does not fit.
    """
    kind, state = next(iter(weights_of(checkpoint, weights, source).items()))
    state, _ = released_names(model, state)
    state, notes = adapt_position_tables(model, state, _source_grids(checkpoint), source)
    own = model.state_dict()
    head = [name for each in model.classifiers for name in (f"{each}.weight", f"{each}.bias") if name in own]
    if any(name not in state or state[name].shape != own[name].shape for name in head):
        old = next((len(state[name]) for name in head if name in state), 0)
        notes.append(f"head: {old} classes in the file, {model.num_classes} here; starts anew")
        state.update({name: own[name] for name in head})
    load_weights(model, state, source)
    _tell(source, [*notes, *(["these are averaged weights"] if kind == "ema" else [])])


def load_resized(model: TrainableModel, state: dict[str, Tensor], built_for: Mapping[str, Any], source: str) -> None:
    """Load the weights of the model that the configuration `built_for` describes into one of another image size.

    Position tables are resized, with a log line each; all else loads strictly. Raises CheckpointError.
    """
    with torch.device("meta"):
        grids = build_model(built_for, model.num_classes).position_grids()
    state, _ = released_names(model, state)
    state, notes = adapt_position_tables(model, state, grids, source)
    load_weights(model, state, source)
    _tell(source, notes)


def load(path: str | Path, weights: str = "auto", *, config: Mapping[str, Any] | None = None) -> TrainableModel:
    """The model of a checkpoint of ours or a released one, rebuilt from that file alone: evaluation mode, on the CPU.

    Its attributes `classes` (names in the order of its outputs, or None) and `config` (a plain nested dictionary) are
    what the file says of it. Nothing that the file contains is executed.

    Args:
        weights: model, ema (their average over training), or auto: model, unless the file holds the average alone.
        config: for a bare state dict, which carries no configuration; otherwise it replaces the stored one.

    Raises:
        ValueError: an unknown word for `weights`.
        CheckpointError: an unusable file, one without a configuration or average where that is needed, or weights that
            do not fit.
    """
    source = str(path)
    checkpoint = load_checkpoint(path)
    state = next(iter(weights_of(checkpoint, weights, source).values()))
    config = stored_config(checkpoint) if config is None else config
    if config is None:
        raise CheckpointError(f"{source} carries no configuration, so it does not say which model it is; name one")
    num_classes, classes = num_classes_of(checkpoint, source), checkpoint.get("classes")
    try:
        with torch.device("meta"):  # the sizes that the file declares are compared before memory is taken for them
            declared = build_model(config, num_classes)
        require_fit(declared, released_names(declared, state)[0], source)
        model = build_model(config, num_classes)
    except CheckpointError:
        raise
    except NO_MODEL as error:
        raise CheckpointError(f"{source}: its configuration makes no model: {str(error)[:500]}") from error
    load_weights(model, state, source)
    model.classes = list(classes) if classes else None
    model.config = plain_dictionary(config)
    return model.eval()


def create_model(name: str, *, checkpoint: str | Path | None = None, **arguments: Any) -> nn.Module:
    """A registered variant, with the weights of a checkpoint of ours or a released one.

    Args:
        arguments: of `timm.create_model`. `num_classes` is the file's unless given; for other classes the head starts
            anew, and for another `img_size` position tables are resized.

    Raises:
        ValueError: an unknown name.
        CheckpointError: an unusable file, or one of another architecture.
    """
    if name not in list_models():
        raise ValueError(f"model {name!r} is unknown, expected one of {', '.join(list_models())}")
    if checkpoint is not None:
        arguments |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(checkpoint)}}
    return timm.create_model(name, **arguments)
