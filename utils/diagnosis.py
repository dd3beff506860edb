"""What happened when a loss or gradient was not finite: the batch is computed once more, looked at module by module.

The weights are those before the bad step, because its update was suppressed, and a batch is a function of seed, epoch
and position. Draws of dropout, stochastic depth, mixup and erasing are new ones, so what depends on them may differ.
"""

import json
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data import Batches
from models.attention import PolaLinearAttention
from utils import distributed
from utils.precision import autocast

if TYPE_CHECKING:
    from engine import Training


def write_report(training: "Training", batches: Batches, step: int, folder: Path) -> Path:
    """Compute optimizer step `step` once more and write `non_finite_step_<step>_rank_<rank>.json`; returns its path.

    It holds the batch's files, learning rate, loss scale, the largest activation of every module, the largest value and
    gradient of every parameter, the first module whose output is not finite, and of every polarity attention the range
    of its exponent and its smallest normaliser. Infinite and undefined numbers are written as strings.
    """
    epoch, index = divmod(step, training.steps_per_epoch)
    start = index * training.accumulation_steps
    model, losses = training.bare_model, []
    training.optimizer.zero_grad(set_to_none=True)
    batches.set_epoch(epoch, start)
    stream = iter(batches)
    with _watched(model) as (modules, attention):
        for _ in range(training.accumulation_steps):
            images, labels = (t.to(training.device) for t in next(stream))
            images, targets = training.prepare(images, labels)
            with autocast(training.device, training.amp_dtype):
                loss = training.criterion(model.forward(images), targets)  # not a compiled one: hooks look inside
            losses.append(loss.item())
            loss.backward()
    first = next((record for record in modules.values() if not record["output_finite"]), None)
    scaler = training.scaler
    report = {
        "step": step,
        "epoch": epoch,
        "step_of_epoch": index,
        "rank": distributed.rank(),
        "host": socket.gethostname(),
        "learning_rate": training.optimizer.param_groups[0]["lr"],
        "loss_scale": scaler.get_scale() if scaler else None,
        "samples": batches.sample_names(epoch, start, training.accumulation_steps),
        "losses_computed_again": losses,
        "first_module_not_finite": first,
        "modules": list(modules.values()),
        "polarity_attention": attention,
        "parameters": [
            {"name": name, **_extremes(p), "gradient": None if p.grad is None else _extremes(p.grad)}
            for name, p in model.named_parameters()
        ],
    }
    training.optimizer.zero_grad(set_to_none=True)
    path = folder / f"non_finite_step_{step}_rank_{distributed.rank()}.json"
    folder.mkdir(parents=True, exist_ok=True)  # it may be another node's
    path.write_text(json.dumps(_plain(report), indent=1), encoding="utf-8")
    return path


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]]:
    """Records, in the order of computation, of every module's output, and of every polarity attention's insides."""
    modules: dict[str, dict[str, Any]] = {}
    attention: dict[str, dict[str, Any]] = {}
    handles = []

    def note(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            finite_input = all(bool(t.isfinite().all()) for t in inputs if isinstance(t, Tensor))
            modules[name] = {
                "name": name,
                "type": type(module).__name__,
                "input_finite": finite_input,
                "output_finite": bool(output.isfinite().all()),
                "largest_output": _extremes(output)["largest"],
            }

    for name, module in model.named_modules():
        handles.append(module.register_forward_hook(lambda m, inputs, output, name=name: note(name, m, inputs, output)))
        if isinstance(module, PolaLinearAttention):
            _watch_attention(module, name, attention)
    try:
        yield modules, attention
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, PolaLinearAttention):
                del module.attend


def _watch_attention(module: PolaLinearAttention, name: str, records: dict[str, dict[str, Any]]) -> None:
    attend = module.attend

    def watched(q: Tensor, k: Tensor, *rest: Any, **named: Any) -> Tensor:
        records[name] = _attention_record(module, q, k)
        return attend(q, k, *rest, **named)

    module.attend = watched  # type: ignore[method-assign]


@torch.no_grad()
def _attention_record(module: PolaLinearAttention, q: Tensor, k: Tensor) -> dict[str, Any]:
    """Ranges of exponent and scale, and the smallest and largest normaliser of both streams, in float64."""
    heads = (module.num_heads, -1)
    exponent, scale = module.exponent().double(), F.softplus(module.scale.double())
    queries = (q.double() / scale).unflatten(-1, heads)
    keys = ((k.double() + module.positional_encoding.double()) / scale).unflatten(-1, heads)
    positive_mean, negative_mean = (
        (sign * keys).clamp(min=0).pow(exponent).mean(dim=1, keepdim=True) for sign in (1, -1)
    )
    positive, negative = ((sign * queries).clamp(min=0).pow(exponent) for sign in (1, -1))
    same = (positive * positive_mean + negative * negative_mean).sum(dim=-1)
    opposite = (negative * positive_mean + positive * negative_mean).sum(dim=-1)
    return {
        "exponent": [exponent.min().item(), exponent.max().item()],
        "scale": [scale.min().item(), scale.max().item()],
        "normaliser_same": [same.min().item(), same.max().item()],
        "normaliser_opposite": [opposite.min().item(), opposite.max().item()],
    }


def _extremes(t: Tensor) -> dict[str, Any]:
    return {"largest": t.detach().abs().max().item(), "finite": bool(t.isfinite().all())}


def _plain(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
