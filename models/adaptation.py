"""What a state dict may hold that a model does not, and position tables of another size."""

from collections.abc import Collection, Iterable
from math import isqrt

from torch import Tensor

from .classifier import TrainableModel
from .files import CheckpointError, unwrapped
from .layers import Grid, resize_table


def _listed(title: str, names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"\n  {title} ({len(names)}): {shown}" if names else ""


def released_names(model: TrainableModel, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """`state` without what this family's files may hold and our models do not, and a line on what was dropped.

    The allowances: what wrappers put before every name (`unwrapped`), buffers that the model derives
    (`derived_entries`), and parameters that the released forward pass never used (`unused_released_parameters`).
    """
    state, notes = unwrapped(state)
    own = model.state_dict()
    dropped = [
        name
        for name in state
        if name not in own and (name.endswith(model.derived_entries) or name in model.unused_released_parameters)
    ]
    if dropped:
        notes.append(f"dropped {len(dropped)} entries that the model derives or never used: {', '.join(dropped[:4])}…")
    return {name: value for name, value in state.items() if name not in dropped}, notes


def require_fit(model: TrainableModel, state: dict[str, Tensor], source: str, exempt: Collection[str] = ()) -> None:
    """Raise CheckpointError that lists missing, unexpected and mis-shaped entries, unless exempt."""
    own = model.state_dict()
    shared = [name for name in own if name in state and name not in exempt]
    misshaped = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in shared
        if state[name].shape != own[name].shape
    ]
    converted = [
        f"{name} {state[name].dtype} instead of {own[name].dtype}"
        for name in shared
        if state[name].is_floating_point() != own[name].is_floating_point()
    ]
    problems = (
        _listed("missing", (name for name in own if name not in state and name not in exempt))
        + _listed("unexpected", (name for name in state if name not in own and name not in exempt))
        + _listed("other shape", misshaped)
        + _listed("other kind of number", converted)
    )
    if problems:
        raise CheckpointError(f"{source} does not fit {type(model).__name__} of this configuration:{problems}")


def adapt_position_tables(
    model: TrainableModel, state: dict[str, Tensor], source_grids: dict[str, Grid], source: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Resize position tables of another grid to the model's, and say so in a line for each.

    A table whose grid `source_grids` does not tell is taken for a square one. Raises CheckpointError where it is not.
    What the model converts by itself comes first.
    """
    try:
        adapted = dict(model.converted(state))
    except Exception as problem:  # of another architecture: it fails in any way
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {problem}") from problem
    own, notes = model.state_dict(), []
    for name, table in adapted.items():
        if name in state and table.shape != state[name].shape:
            notes.append(f"{name}: {tuple(state[name].shape)} became {tuple(table.shape)}")
    state = dict(adapted)
    for name, target in model.position_grids().items():
        if name not in state or state[name].shape[-1] != own[name].shape[-1]:
            continue  # missing, or of another width: strict loading will say so
        table = state[name].flatten(0, -2)
        side = isqrt(len(table))
        grid = source_grids.get(name, (side, side))
        if grid[0] * grid[1] != len(table):
            raise CheckpointError(f"{source}: the {len(table)} rows of {name} are not a {grid[0]}×{grid[1]} grid")
        if grid != target:
            adapted[name] = resize_table(state[name], grid, target)
            notes.append(f"{name}: {grid[0]}×{grid[1]} resized to {target[0]}×{target[1]}")
    return adapted, notes
