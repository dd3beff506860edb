"""Linear attention, the one core of this family: a state over the keys, read by the features of the queries."""

import torch
from torch import Tensor
from torch.fx import Proxy

from .. import is_exporting
from .derivatives import beyond_plain, refusal
from .eager import Blocks, FeatureMap, Scratch, Stream, fill, linear_attention_eager, split_by_sign, sum_over_tokens
from .reference import linear_attention_reference

__all__ = [
    "Blocks",
    "FeatureMap",
    "Scratch",
    "Stream",
    "fill",
    "implementation_of",
    "linear_attention_eager",
    "linear_attention_reference",
    "split_by_sign",
    "sum_over_tokens",
]


def implementation_of(backend: str, *tensors: Tensor | None) -> str:
    """eager or reference, for the backend that MODEL.LA.BACKEND names and a call on these tensors (the first is q).

    reference where auto meets derivatives that only it has, where there is no element (the blocks of eager would be
    none), and in a graph that leaves Python, which has to hold the formula. Raises ValueError for a backend that is
    not there, or that lacks the derivatives.
    """
    if backend not in ("auto", "eager", "reference"):
        raise ValueError(
            f"backend {backend!r} is there for polarity attention alone, expected auto, eager or reference"
        )
    if any(isinstance(tensor, Proxy) for tensor in tensors):  # torch.fx, for which the whole is one operation
        return "reference" if backend == "reference" else "eager"
    if backend == "reference" or torch.jit.is_tracing() or is_exporting():
        return "reference"
    reason = beyond_plain(*tensors)
    if reason is not None and backend == "eager":
        raise ValueError(refusal(backend, reason))
    empty = any(tensor.numel() == 0 for tensor in tensors if tensor is not None)
    return "reference" if reason is not None or empty else "eager"
