"""Linear attention, the one core of this family: a state over the keys, read by the features of the queries."""

from .backends import Raw, anywhere, choose, is_symbolic, of_call, reason_against_triton
from .eager import Blocks, FeatureMap, Scratch, Stream, fill, linear_attention_eager, split_by_sign, sum_over_tokens
from .reference import linear_attention_reference

__all__ = [
    "Blocks",
    "FeatureMap",
    "Raw",
    "Scratch",
    "Stream",
    "anywhere",
    "choose",
    "fill",
    "is_symbolic",
    "linear_attention_eager",
    "linear_attention_reference",
    "of_call",
    "reason_against_triton",
    "split_by_sign",
    "sum_over_tokens",
]
