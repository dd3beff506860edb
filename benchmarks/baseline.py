"""The fixed baseline of every figure: polarity attention as the paper's equations are usually typed, under autograd.

Contiguous (B, h, N, d) copies, four features relu(±u)^p, three concatenations, and for each of the two streams one
state product, one output product and one normaliser product. It never changes, so that ratios stay comparable.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.kernels import polarity


def literal_polarity_attention(
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
    """Takes what `models.ops.polarity_attention` takes, so that a model can call it; `backend` has no effect.

    As in the released models, tensors return to the type of v before the features are computed. Low-precision inputs
    need autocast, as features are float32 wherever the exponent is.

    Raises ValueError for a key mask, which the baseline does not support.
    """
    if key_mask is not None:
        raise ValueError("the literal baseline has no key mask: choose an image size that the windows divide")
    if position is not None:
        k = k + position
    if scale is not None:
        q, k = q / scale, k / scale
    q, k, v = (t.to(v.dtype).transpose(1, 2).contiguous() for t in (q, k, v))  # (B, h, N or n, d)
    n = k.shape[2]
    power = exponent[:, None, :]  # (h, 1, d)
    positive_q, negative_q = torch.relu(q) ** power, torch.relu(-q) ** power
    positive_k, negative_k = torch.relu(k) ** power, torch.relu(-k) ** power
    same = torch.cat([positive_q, negative_q], dim=-1)  # (B, h, N, 2d)
    opposite = torch.cat([negative_q, positive_q], dim=-1)
    key_features = torch.cat([positive_k, negative_k], dim=-1)  # (B, h, n, 2d)
    mean_key = key_features.mean(dim=2, keepdim=True).mT  # (B, h, 2d, 1)
    streams = []
    for query_features, values in zip((same, opposite), v.chunk(2, dim=-1), strict=False):  # d = 1 has one stream
        state = key_features.mT @ (values / n)  # (B, h, 2d, d/2)
        streams.append(query_features @ state / (query_features @ mean_key + eps))
    return torch.cat(streams, dim=-1).transpose(1, 2).to(v.dtype)


@contextmanager
def patched_model_attention(op: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, polarity blocks of all models compute with `op`."""
    ours = polarity.polarity_attention
    polarity.polarity_attention = op
    try:
        yield
    finally:
        polarity.polarity_attention = ours
