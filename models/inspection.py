"""A model looked at from inside while it computes a step: where a value stops being finite, and what attention does."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from models.attention import PolarityKernel


def inspect_step(model: nn.Module, step: Callable[[], Any]) -> dict[str, Any]:
    """Run `step`, a forward and backward pass through `model`, and report on them as plain values.

    `modules`: for each, in the order of computation, the largest |output| and whether input and output are finite;
    `first_module_not_finite` is the first of them whose output is not. `polarity_attention`: the range of exponent and
    scale, and the smallest and largest normaliser of both streams. `parameters`: largest |value| and |gradient|.
    Infinite and undefined numbers are strings, so that JSON can hold the report.
    """
    with _watched(model) as (modules, attention):
        step()
    report = {
        "first_module_not_finite": next((m for m in modules.values() if not m["output_finite"]), None),
        "modules": list(modules.values()),
        "polarity_attention": attention,
        "parameters": [
            {"name": name, **_extremes(p), "gradient": None if p.grad is None else _extremes(p.grad)}
            for name, p in model.named_parameters()
        ],
    }
    return plain(report)


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
        if _is_polarity(module):
            _watch_attention(module, name, attention)
    try:
        yield modules, attention
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if _is_polarity(module):
                del module.mix


def _is_polarity(module: nn.Module) -> TypeGuard[PolarityKernel]:
    """True for the attention whose kernel has an exponent and two normalisers, unlike those it is compared with."""
    return isinstance(module, PolarityKernel) and module.attention == "polarity"


def _watch_attention(module: PolarityKernel, name: str, records: dict[str, dict[str, Any]]) -> None:
    mix = module.mix

    def watched(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        records[name] = _attention_record(module, q, k, named.get("position"), named.get("key_mask"))
        return mix(q, k, v, **named)

    module.mix = watched  # type: ignore[method-assign]


@torch.no_grad()
def _attention_record(
    module: PolarityKernel, q: Tensor, k: Tensor, position: Tensor | None, key_mask: Tensor | None
) -> dict[str, Any]:
    """Ranges of exponent and scale, and the smallest and largest normaliser of both streams, in float64."""
    heads = (module.num_heads, -1)
    divisor = module.divisor()
    exponent, scale = module.exponent().double(), q.new_ones(1).double() if divisor is None else divisor.double()
    real = k.new_ones(k.shape[:2]) if key_mask is None else key_mask
    weight = (real / real.sum(dim=1, keepdim=True).clamp(min=1)).double()[:, :, None, None]
    queries = (q.double() / scale).unflatten(-1, heads)
    keys = ((k.double() if position is None else k.double() + position.double()) / scale).unflatten(-1, heads)
    positive_mean, negative_mean = (
        ((sign * keys).clamp(min=0).pow(exponent) * weight).sum(dim=1, keepdim=True) for sign in (1, -1)
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


def plain(value: Any) -> Any:
    """The same with infinite and undefined numbers as strings: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
