"""A model looked at from inside while it computes a step: where a value stops being finite, and what attention does."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import LinearKernel


def inspect_step(model: nn.Module, step: Callable[[], Any]) -> dict[str, Any]:
    """Run `step`, a forward and backward pass through `model`, and report on them as plain values.

    `modules`: for each, in the order of computation, the largest |output| and whether input and output are finite;
    `first_module_not_finite` is the first of them whose output is not. `attention`: of every kernel with a feature map
    the range of its scale, of its exponent where it has one, and of each stream's normaliser. `parameters`: largest
    |value| and |gradient|.
    Infinite and undefined numbers are strings, so that JSON can hold the report.
    """
    with _watched(model) as (modules, attention):
        step()
    report = {
        "first_module_not_finite": next((m for m in modules.values() if not m["output_finite"]), None),
        "modules": list(modules.values()),
        "attention": attention,
        "parameters": [
            {"name": name, **_extremes(p), "gradient": None if p.grad is None else _extremes(p.grad)}
            for name, p in model.named_parameters()
        ],
    }
    return plain(report)


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]]:
    """Records, in the order of computation, of every module's output, and of every kernel's insides."""
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
        if isinstance(module, LinearKernel):
            _watch_attention(module, name, attention)
    try:
        yield modules, attention
    finally:
        for handle in handles:
            handle.remove()
        for module in model.modules():
            if isinstance(module, LinearKernel):
                del module.mix


def _watch_attention(module: LinearKernel, name: str, records: dict[str, dict[str, Any]]) -> None:
    mix = module.mix

    def watched(q: Tensor, k: Tensor, v: Tensor, **named: Any) -> Tensor:
        records[name] = _attention_record(module, q, k, named.get("position"), named.get("key_mask"))
        return mix(q, k, v, **named)

    module.mix = watched  # type: ignore[method-assign]


@torch.no_grad()
def _attention_record(
    kernel: LinearKernel, q: Tensor, k: Tensor, position: Tensor | None, key_mask: Tensor | None
) -> dict[str, Any]:
    """Smallest and largest scale, exponent where there is one, and normaliser of each stream, in float64."""
    queries, keys = kernel.prepare(q.double(), k.double(), None if position is None else position.double())
    real = k.new_ones(k.shape[:2]) if key_mask is None else key_mask
    weight = (real / real.sum(dim=1, keepdim=True).clamp(min=1)).double()[:, :, None, None]
    mean = (kernel.features(keys) * weight).sum(dim=1, keepdim=True)
    found: dict[str, Tensor | None] = {"scale": kernel.divisor(), "exponent": kernel.exponent()}
    found |= {f"normaliser_{name}": (f * mean).sum(dim=-1) for name, f in kernel.query_features(queries).items()}
    return {name: [t.min().item(), t.max().item()] for name, t in found.items() if t is not None}


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
