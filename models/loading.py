"""Weights into models: strictly, apart from a short named list of allowances, or adapted for fine-tuning."""

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from logger import get_logger
from models import build_classifier, build_model, list_models
from models.adaptation import adapt_position_tables, released_names, require_fit
from models.classifier import Classifier, TrainableModel
from models.files import CheckpointError, load_checkpoint, num_classes_of, stored_config
from models.layers import Grid


def load_weights(model: TrainableModel, state: dict[str, Tensor], source: str) -> None:
    """Load a state dict strictly, apart from `released_names`.

    Raises CheckpointError that lists missing, unexpected and mis-shaped entries.
    """
    state, notes = released_names(model, state)
    require_fit(model, state, source)
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


def load_pretrained(model: TrainableModel, checkpoint: dict[str, Any], source: str) -> None:
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


def load_resized(model: TrainableModel, state: dict[str, Tensor], built_for: CfgNode, source: str) -> None:
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
    if config.MODEL.TYPE == "lra":
        raise CheckpointError(f"{source} holds a model of sequences (MODEL.TYPE lra), expected one of images")
    model = build_classifier(config, num_classes_of(checkpoint, source))
    load_weights(model, weights, source)
    classes = checkpoint.get("classes")
    return LoadedModel(model.eval(), config, list(classes) if classes else None)


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
