"""Which implementation of linear attention computes: the one place where it is chosen, for every kernel."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import is_exporting
from .derivatives import beyond_plain, refusal


class Raw(NamedTuple):
    """Parameters as a module has them: of which map of triton_maps.py, up to two (h, ·), and alpha (`Launch`)."""

    feature_map: str
    first: Tensor | None
    second: Tensor | None
    alpha: float


# Why a backend cannot take tensors of a device, dtype and number of channels per head, or None.
Reason = Callable[[torch.device, torch.dtype, int], str | None]


def anywhere(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    return None


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def reason_against_triton(
    device: torch.device, dtype: torch.dtype, channels: int, feature_map: str = "power"
) -> str | None:
    if not has_triton():
        return "the package triton is not installed"
    from .triton_op import reason_against  # not every platform has Triton

    return reason_against(device, dtype, channels, feature_map)


def choose(
    backend: str,
    offered: Mapping[str, Reason],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    channels: int = 1,
    *,
    attention: str = "polarity",
    named_by: str = "backend",
) -> str:
    """The implementation that runs on tensors of this kind: the one named, or for auto triton or native where they can.

    Raises ValueError for an unknown name, and for a named backend that cannot run, with the reason.
    """
    if backend == "auto":
        fast = {"cuda": "triton", "cpu": "native"}.get(device.type, "eager")
        return "eager" if fast not in offered or _reason(offered[fast], device, dtype, channels) else fast
    if backend not in offered:
        names = ", ".join(offered)
        raise ValueError(f"{named_by} {backend!r} is no backend of {attention} attention, expected auto, {names}")
    if reason := _reason(offered[backend], device, dtype, channels):
        raise ValueError(f"{attention} attention's {backend} backend cannot run: {reason}")
    return backend


@torch.compiler.assume_constant_result  # torch.compile asks once instead of tracing into what asks the device
def _reason(reason: Reason, device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    return reason(device, dtype, channels)


def of_call(chosen: str, by_name: bool, q: Tensor, k: Tensor, *others: Tensor | None) -> str:
    """As `choose` said, but reference where auto meets derivatives that only it has, and where there is no element.

    Of no elements it makes none, or zeros, where the others would divide into no blocks and launch no programs. A graph
    that leaves Python (a TorchScript trace, an exported program) has to hold the formula: there it is reference too.
    Raises ValueError for a backend by name that lacks the derivatives.
    """
    if torch.jit.is_tracing() or is_exporting():
        return "reference"
    reason = beyond_plain(q, k, *others)
    if reason is not None and chosen != "reference" and by_name:
        raise ValueError(refusal(chosen, reason))
    if reason is not None or q.numel() == 0 or k.numel() == 0:
        return "reference"
    return "eager" if chosen == "native" and torch.compiler.is_compiling() else chosen


def is_symbolic(*tensors: Tensor | None) -> bool:
    """Whether torch.fx follows these, for which the whole is one operation."""
    return any(isinstance(tensor, Proxy) for tensor in tensors)
