"""The optimizer: which parameters decay, AdamW or SGD, and how its state returns from a checkpoint."""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import Tensor
from torch.optim import Optimizer
from yacs.config import CfgNode

from models.classifier import TrainableModel
from models.files import CheckpointError
from utils.devices import SUPPRESSING

FUSED = ("adamw", "sgd")  # torch's own, which can leave a step out on the device
UNUSABLE = ["bnb*", "fused*"]  # of other packages


def parameter_groups(model: TrainableModel) -> tuple[list[str], list[str]]:
    """Names of the decayed and the undecayed parameters that are trained, in the model's order.

    No decay: 0-D and 1-D parameters, biases, and what the model's `no_weight_decay` names.
    """
    exempt = model.no_weight_decay()
    decay: list[str] = []
    no_decay: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # frozen
            continue
        plain = parameter.ndim <= 1 or name.endswith(".bias") or name in exempt
        (no_decay if plain else decay).append(name)
    return decay, no_decay


class LayerGroup(NamedTuple):
    """Parameters of one layer, by name, which decay or do not, and the factor of their learning rate."""

    names: list[str]
    decayed: bool
    lr_scale: float


def layer_groups(model: TrainableModel, layer_decay: float) -> list[LayerGroup]:
    """The two groups of every layer, from the head (factor 1) down to the stem (`layer_decay` to the number of layers).

    Layers are those of the model's `group_matcher`, as timm counts them. The head comes first, so that the rate of the
    optimizer's first group is the schedule's own. (Layer-wise decay for fine-tuning: BEiT, arXiv 2106.08254.)
    """
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    last = max(layers.values())
    groups = []
    for layer in range(last, -1, -1):
        for names, decayed in zip(parameter_groups(model), (True, False), strict=True):
            if members := [name for name in names if layers[name] == layer]:
                groups.append(LayerGroup(members, decayed, layer_decay ** (last - layer)))
    return groups


def build_optimizer(config: CfgNode, model: TrainableModel, lr_scale: float = 1.0) -> Optimizer:
    """The optimizer at BASE_LR · `lr_scale` over the bare model's parameters that are trained: decayed and undecayed,
    and with TRAIN.LAYER_DECAY below 1 in layers, whose `lr_scale` the schedule multiplies its rate by.

    Fused kernels are used where they can suppress an update on the device (`found_inf`), without the host.
    """
    parameters = dict(model.named_parameters())
    decay, no_decay = parameter_groups(model)
    groups: list[dict[str, Any]] = [
        {"params": [parameters[name] for name in decay], "weight_decay": config.TRAIN.WEIGHT_DECAY},
        {"params": [parameters[name] for name in no_decay], "weight_decay": 0.0},
    ]
    if config.TRAIN.LAYER_DECAY < 1:
        groups = [
            {
                "params": [parameters[name] for name in group.names],
                "weight_decay": config.TRAIN.WEIGHT_DECAY if group.decayed else 0.0,
                "lr_scale": group.lr_scale,
            }
            for group in layer_groups(model, config.TRAIN.LAYER_DECAY)
        ]
    lr = config.TRAIN.BASE_LR * lr_scale
    fused = next(model.parameters()).device.type in SUPPRESSING
    name = config.TRAIN.OPTIMIZER.NAME
    if name == "adamw":
        return torch.optim.AdamW(
            groups,
            lr=lr,
            betas=config.TRAIN.OPTIMIZER.BETAS,
            eps=config.TRAIN.OPTIMIZER.EPS,
            weight_decay=config.TRAIN.WEIGHT_DECAY,
            fused=fused,
        )
    if name == "sgd":
        momentum = config.TRAIN.OPTIMIZER.MOMENTUM
        sgd = torch.optim.SGD(
            groups, lr=lr, momentum=momentum, weight_decay=config.TRAIN.WEIGHT_DECAY, nesterov=momentum > 0, fused=fused
        )
        if momentum > 0:
            # from zeros the first step is the same; left to itself the fused kernel starts from uninitialised memory
            # when the first step is suppressed
            for parameter in (parameter for group in groups for parameter in group["params"]):
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    optimizer: Optimizer = create_optimizer_v2(
        groups,
        opt=name,
        lr=lr,
        weight_decay=config.TRAIN.WEIGHT_DECAY,
        momentum=config.TRAIN.OPTIMIZER.MOMENTUM,
        **config.TRAIN.OPTIMIZER.KWARGS,
    )
    return optimizer


def require_optimizer(name: str, keywords: Mapping[str, Any]) -> None:
    """Raise ValueError for an optimizer that build_optimizer does not know, or arguments that timm's does not take."""
    if name in FUSED:
        if keywords:
            raise ValueError(f"TRAIN.OPTIMIZER.KWARGS is for other optimizers than {name}, which has keys of its own")
        return
    names = map(str, list_optimizers(exclude_filters=UNUSABLE))
    known = [each for each in names if not get_optimizer_info(each).second_order]
    if name not in known:
        nearest = difflib.get_close_matches(name, [*FUSED, *known], 3, 0.0)
        raise ValueError(f"TRAIN.OPTIMIZER.NAME {name!r} is unknown; the nearest are {', '.join(nearest)}")
    try:
        create_optimizer_v2([torch.nn.Parameter(torch.zeros(1))], opt=name, lr=1e-3, **keywords)
    except Exception as problem:  # a constructor refuses in any way
        raise ValueError(f"TRAIN.OPTIMIZER.KWARGS {keywords}: {name} refuses: {problem}") from problem


def freeze(model: TrainableModel, patterns: Sequence[str]) -> None:
    """Take the parameters whose names begin with one of `patterns` out of training: they get no gradient.

    Raises ValueError for a pattern that is no regular expression or matches nothing, and where nothing is left.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        try:
            found = any(re.match(pattern, name) for name in names)
        except re.error as problem:
            raise ValueError(f"TRAIN.FREEZE {pattern!r} is no regular expression: {problem}") from None
        if not found:
            parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(f"TRAIN.FREEZE {pattern!r} matches no parameter; their names begin with {parts[:200]}")
    for name, parameter in model.named_parameters():
        if any(re.match(pattern, name) for pattern in patterns):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"TRAIN.FREEZE {list(patterns)} leaves nothing to train; ['(?!head)'] leaves the head")


def _lengths(groups: list[list[str]]) -> list[int]:
    return [len(group) for group in groups]


def _undecayed_first(groups: list[dict[str, Any]]) -> bool:
    """Whether of two groups the first does not decay and the second does, as DeiT's script orders them."""
    decays = [bool(group.get("weight_decay")) for group in groups]
    return decays == [False, True]


def load_optimizer_state(optimizer: Optimizer, model: TrainableModel, stored: Any, source: str) -> None:
    """Restore moments and step counts from an optimizer state dict; hyperparameters stay those of the configuration.

    Positions in a released file also count parameters that the released model had and ours does not
    (`unused_released_parameters`, which stood before the head); they are skipped. A state may have been written with or
    without layer decay, whatever the configuration says now.

    Raises CheckpointError when the state belongs to another optimizer or another model.
    """
    if not isinstance(stored, dict) or not {"state", "param_groups"} <= stored.keys():
        raise CheckpointError(f"{source} has no optimizer state to continue from; --pretrained starts from its weights")
    decay, no_decay = plain = list(parameter_groups(model))
    groups = [len(group["params"]) for group in stored["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    # of layers, unless neither side has them: not every model of timm names its own
    layered = [] if own == groups == _lengths(plain) else [group.names for group in layer_groups(model, 1.0)]
    names = [name for group in (plain if own == _lengths(plain) else layered) for name in group]
    unused: list[str | None] = [None] * len(model.unused_released_parameters)
    stored_names: list[str | None]
    if groups == _lengths(plain) and not _undecayed_first(stored["param_groups"]):
        stored_names = [*decay, *no_decay]
    elif groups == _lengths(layered):
        stored_names = [name for group in layered for name in group]
    elif groups == _lengths(plain[::-1]):
        stored_names = [*no_decay, *decay]
    elif groups == [len(decay), len(no_decay) + len(unused)]:
        head = no_decay.index("head.bias")
        stored_names = [*decay, *no_decay[:head], *unused, *no_decay[head:]]
    else:
        raise CheckpointError(f"{source}: its optimizer has groups of {groups} parameters, this model {own}")
    parameters = dict(model.named_parameters())
    expected = {torch.optim.AdamW: "exp_avg", torch.optim.SGD: "momentum_buffer"}.get(type(optimizer))
    state: dict[int, Any] = {}
    for position, name in enumerate(stored_names):
        if name is None or position not in stored["state"]:
            continue
        entry = stored["state"][position]
        for key, value in entry.items():
            if expected and isinstance(value, Tensor) and value.ndim and value.shape != parameters[name].shape:
                raise CheckpointError(
                    f"{source}: optimizer state {key} of {name} has shape {tuple(value.shape)}, the parameter"
                    f" {tuple(parameters[name].shape)}"
                )
        # moments in the parameter's memory layout: fused kernels walk both in the order of memory
        state[names.index(name)] = {
            key: torch.empty_like(parameters[name], dtype=value.dtype).copy_(value)
            if isinstance(value, Tensor) and value.ndim and value.shape == parameters[name].shape
            else value
            for key, value in entry.items()
        }
    if expected and any(expected not in entry for entry in state.values()):
        found = ", ".join(sorted({key for entry in state.values() for key in entry}))
        raise CheckpointError(f"{source}: its optimizer state ({found}) is not that of {type(optimizer).__name__}")
    first, own_groups = stored["param_groups"][0], optimizer.state_dict()["param_groups"]
    if "step" in first:  # Lamb and Adan count there, each group by itself
        own_groups = [{**group, "step": copy.deepcopy(first["step"])} for group in own_groups]
    optimizer.load_state_dict({"state": state, "param_groups": own_groups})
