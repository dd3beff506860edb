"""Polarity-aware linear attention: the public operation and the one place where its implementation is chosen."""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ..linear_attention import anywhere, choose, of_call, reason_against_triton
from .eager import PolarityFeatures, polarity_attention_eager
from .native import polarity_attention_native
from .native import reason_against as reason_against_native
from .reference import polarity_attention_reference

BACKENDS = {
    "eager": anywhere,
    "native": reason_against_native,
    "triton": reason_against_triton,
    "reference": anywhere,
}
ENVIRONMENT_VARIABLE = "POLARITY_ATTENTION_BACKEND"
# What auto means in this process: a backend by name, or by device, dtype and channels.
AUTO = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype = torch.float32, channels: int = 1) -> str:
    """The implementation that runs on tensors of this kind: the one named, or for auto triton or native where they can.

    Raises ValueError for an unknown name, and for a named backend that cannot run, with the reason.
    """
    named_by = "backend"
    if backend == "auto":
        backend, named_by = AUTO, ENVIRONMENT_VARIABLE
    return choose(backend, BACKENDS, device, dtype, channels, named_by=named_by)


def backend_of_call(backend: str, channels: int, q: Tensor, k: Tensor, *others: Tensor | None) -> str:
    """The implementation of a call on these tensors with so many channels per head. Raises ValueError as `choose`."""
    chosen = choose_backend(backend, q.device, q.dtype, channels)
    return of_call(chosen, (AUTO if backend == "auto" else backend) != "auto", q, k, *others)


def _implementation(backend: str) -> Callable[..., Tensor]:
    return {
        "eager": polarity_attention_eager,
        "native": polarity_attention_native,
        "reference": polarity_attention_reference,
        "triton": _polarity_attention_triton,
    }[backend]


def _polarity_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor,
    scale: Tensor | None,
    position: Tensor | None,
    key_mask: Tensor | None,
    eps: float,
) -> Tensor:
    from ..linear_attention.triton_op import linear_attention_triton

    return linear_attention_triton(
        q, k, v, PolarityFeatures, (exponent, scale), position=position, key_mask=key_mask, eps=eps
    )


def polarity_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    exponent: Tensor,
    *,
    scale: Tensor | None = None,
    position: Tensor | None = None,
    key_mask: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Linear attention that keeps same-signed and opposite-signed query-key interactions apart.

    PolaFormer, ICLR 2025, arXiv 2501.15061, section 4.1: features relu(±u)^p; the first half of the value channels is
    read by the same-signed stream, the second by the opposite-signed one, each with its own normaliser.

    Args:
        q: (B, N, h, d) queries.
        k: (B, n, h, d) keys; n may differ from N.
        v: (B, n, h, d) values; for odd d the same-signed stream reads the first ⌈d/2⌉ channels.
        exponent: (h, d), p = 1 + α·sigmoid(power) ≥ 1.
        scale: (h, d) positive; queries and keys are divided by it. None: 1.
        position: (n, h, d), added to the keys of every image before that division. None: 0.
        key_mask: (B, n) bool, True for a real key. Masked keys contribute nothing, and both means divide by the number
            of real keys. A row without real keys gives 0.
        eps: positive, added to both normalisers.
        backend: auto, eager, native, triton or reference (README.md). Gradients flow to every tensor but key_mask; only
            reference is differentiable more than once and in other ways than by a plain backward pass, so that auto
            takes it inside torch.func and where forward-mode AD gives an input a tangent.

    Returns:
        (B, N, h, d) in the dtype of q; 0 without keys. Features, state and normaliser are computed in float32, or
        float64 for float64.

    Raises:
        ValueError: shapes or dtypes that do not fit together, an unknown backend, or a named one that cannot run or
            lacks the derivatives that are asked for.
    """
    B, _, h, d = q.shape
    n = k.shape[1]
    if k.shape != (B, n, h, d) or v.shape != (B, n, h, d):
        raise ValueError(
            f"keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit queries {tuple(q.shape)}:"
            f" expected ({B}, n, {h}, {d})"
        )
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(
            f"queries, keys and values are {q.dtype}, {k.dtype} and {v.dtype}, expected one floating dtype"
        )
    for name, parameter in (("exponent", exponent), ("scale", scale)):
        if parameter is not None and parameter.shape != (h, d):
            raise ValueError(
                f"{name} has shape {tuple(parameter.shape)}, expected (heads, channels per head) = ({h}, {d})"
            )
    if position is not None and position.shape != (n, h, d):
        raise ValueError(f"position has shape {tuple(position.shape)}, expected (keys, heads, channels) = {(n, h, d)}")
    if not eps > 0:
        raise ValueError(f"eps is {eps}, expected a positive number: rows without a matching key divide by it")
    if key_mask is not None and (key_mask.shape != (B, n) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}, expected torch.bool ({B}, {n})")
    implementation = _implementation(backend_of_call(backend, d, q, k, v, exponent, scale, position))
    return implementation(q, k, v, exponent, scale, position, key_mask, eps)
