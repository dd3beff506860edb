"""Weights into models: strictly, apart from a short named list of allowances, or adapted for fine-tuning."""

from collections.abc import Iterable

from torch import Tensor

from logger import get_logger
from models.classifier import Classifier
from utils.checkpoint import CheckpointError


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


def load_pretrained(model: Classifier, state: dict[str, Tensor], source: str) -> None:
    """Load weights into a model of another image size or number of classes, logging each adaptation.

    Position tables are resized; the head keeps its fresh initialisation where the number of classes differs.
    Raises CheckpointError for whatever else does not fit.
    """
    state, _ = released_names(model, state)
    try:
        state, notes = model.adapt_state_dict(state)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error}") from error
    own = model.state_dict()
    head = [name for name in ("head.weight", "head.bias") if name in own]
    if any(name not in state or state[name].shape != own[name].shape for name in head):
        old = len(state["head.bias"]) if "head.bias" in state else 0
        notes.append(f"head: {old} classes in the file, {model.num_classes} here; starts anew")
        state.update({name: own[name] for name in head})
    load_weights(model, state, source)
    for note in notes:
        get_logger().info("%s: %s", source, note)
