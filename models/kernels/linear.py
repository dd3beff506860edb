"""Linear attention without polarity, for comparisons: everything around the feature map stays what it is.

relu       φ(x) = relu(x): the positive parts alone
elu        φ(x) = 1 + elu(x): Katharopoulos et al. 2020, arXiv 2006.16236, equation 7
focused    φ(x) = ‖x₊‖/‖x₊³‖ · x₊³ with x₊ = relu(x): Han et al. 2023, arXiv 2308.00442, equation 6, with its
           power 3; norms are those of a head's channels
"""

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from .base import LinearKernel, register_kernel

FOCUSING_POWER = 3


@register_kernel("relu")
class ReluKernel(LinearKernel):
    """relu(q)·relu(k)."""

    def features(self, u: Tensor) -> Tensor:
        return F.relu(u)


@register_kernel("elu")
class EluKernel(LinearKernel):
    """(1 + elu(q))·(1 + elu(k))."""

    def features(self, u: Tensor) -> Tensor:
        return 1 + F.elu(u)


@register_kernel("focused")
class FocusedKernel(LinearKernel):
    """Powers of relu(x) that keep its norm: directions are sharpened, lengths are not."""

    def features(self, u: Tensor) -> Tensor:
        return focused_features(u)


@torch.fx.wrap
def focused_features(u: Tensor) -> Tensor:
    """‖x₊‖/‖x₊³‖ · x₊³ with x₊ = relu(u) and the norms of the last axis; 0 where x₊ is."""
    positive = F.relu(u)
    largest = positive.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(u.dtype).tiny)
    direction = (positive / largest) ** FOCUSING_POWER  # the same direction as x₊³, and its power cannot overflow
    norm = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    return norm * F.normalize(direction, dim=-1)
