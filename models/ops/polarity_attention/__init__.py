"""Polarity-aware linear attention: the public operation and the one place where its implementation is chosen."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.ops.polarity_attention.eager import polarity_attention_eager
from models.ops.polarity_attention.reference import polarity_attention_reference

BACKENDS: dict[str, Callable[..., Tensor]] = {
    "eager": polarity_attention_eager,
    "reference": polarity_attention_reference,
}


def choose_backend(backend: str = "auto") -> str:
    """The name of the implementation that runs; raises ValueError for an unknown one."""
    if backend == "auto":
        return "eager"
    if backend not in BACKENDS:
        raise ValueError(f"polarity attention has no backend {backend!r}, expected auto, {', '.join(BACKENDS)}")
    return backend


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
        key_mask: (B, n) bool, True for a real key. Masked keys contribute nothing, and both means divide by the number
            of real keys. A row without real keys gives 0.
        eps: added to both normalisers.
        backend: auto, eager or reference.

    Returns:
        (B, N, h, d) in the dtype of q. Features, state and normaliser are computed in float32, or float64 for float64.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
    """
    B, _, h, d = q.shape
    n = k.shape[1]
    if k.shape != (B, n, h, d) or v.shape != (B, n, h, d):
        raise ValueError(
            f"keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit queries {tuple(q.shape)}:"
            f" expected ({B}, n, {h}, {d})"
        )
    if exponent.shape != (h, d):
        raise ValueError(
            f"exponent has shape {tuple(exponent.shape)}, expected (heads, channels per head) = ({h}, {d})"
        )
    if key_mask is not None and (key_mask.shape != (B, n) or key_mask.dtype != torch.bool):
        raise ValueError(f"key_mask is {key_mask.dtype} {tuple(key_mask.shape)}, expected torch.bool ({B}, {n})")
    return BACKENDS[choose_backend(backend)](q, k, v, exponent, scale, position, key_mask, eps)
