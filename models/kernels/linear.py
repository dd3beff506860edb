"""Linear attention without polarity, for comparisons: everything around the feature map stays what it is.

relu       φ(x) = relu(x): the positive parts alone
elu        φ(x) = 1 + elu(x): Katharopoulos et al. 2020, arXiv 2006.16236, equation 7
focused    φ(x) = ‖x₊‖/‖x₊³‖ · x₊³ with x₊ = relu(x): Han et al. 2023, arXiv 2308.00442, equation 6, with its
           power 3; norms are those of a head's channels
"""

from abc import abstractmethod

import torch
import torch.fx
from torch import Tensor
from torch.nn import functional as F

from ..ops.linear_attention import FeatureMap, Scratch, Stream, fill, sum_over_tokens
from .base import LinearKernel, register_kernel

FOCUSING_POWER = 3


class ScaledFeatures(FeatureMap):
    """φ of u = token/divisor, as many features as channels, in one stream."""

    def __init__(self, scratch: Scratch, divisor: Tensor | None) -> None:
        super().__init__(scratch)
        self.divisor = None if divisor is None else divisor.to(scratch.dtype)[:, None, :]  # (h, 1, d)
        self.moment: Tensor | None = None  # Σ u·∂/∂u

    @classmethod
    def sets(cls, head_dim: int) -> tuple[tuple[Stream, ...], ...]:
        return ((Stream(slice(0, head_dim)),),)

    @classmethod
    def width(cls, head_dim: int) -> int:
        return head_dim

    def tokens(self, block: Tensor, padding: Tensor | None = None) -> Tensor:
        u = self.scratch("u", *block.shape)
        u = u.copy_(block) if self.divisor is None else torch.div(block, self.divisor, out=u)
        return fill(u, padding)

    def key_backward(self, tokens: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        grad = self.pull_back(tokens, features, grad)
        if self.divisor is None:
            return grad
        moment = sum_over_tokens(tokens.mul_(grad)).sum(dim=0)
        self.moment = moment if self.moment is None else self.moment + moment
        return grad.div_(self.divisor)

    @abstractmethod
    def pull_back(self, u: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """Gradient of u (b, h, T, d) from that of φ(u); may overwrite it."""

    def gradients(self) -> tuple[Tensor | None, ...]:
        if self.divisor is None or self.moment is None:
            return (None,)
        return ((-self.moment / self.divisor)[:, 0],)


class ReluFeatures(ScaledFeatures):
    def key_features(self, tokens: Tensor) -> Tensor:
        return torch.clamp(tokens, min=0.0, out=self.scratch("features", *tokens.shape))

    def pull_back(self, u: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return grad.masked_fill_(u <= 0, 0.0)


class EluFeatures(ScaledFeatures):
    def key_features(self, tokens: Tensor) -> Tensor:
        return F.elu(tokens).add_(1)

    def pull_back(self, u: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        return grad.mul_(features.clamp_(max=1.0))  # 1 above 0, below it exp(u), which is the feature


class FocusedFeatures(ScaledFeatures):
    def key_features(self, tokens: Tensor) -> Tensor:
        return focused_features(tokens)

    def pull_back(self, u: Tensor, features: Tensor, grad: Tensor) -> Tensor:
        """With r = u₊/max(u₊), y = r³ and the direction e = y/‖y‖, φ = ‖u₊‖·e."""
        positive = F.relu(u)
        largest = _largest(positive)
        r = positive / largest
        norm = torch.linalg.vector_norm(r, dim=-1, keepdim=True).clamp_(min=1.0)  # 1 at least, or a zero row's 0
        cube = torch.linalg.vector_norm(r**FOCUSING_POWER, dim=-1, keepdim=True).clamp_(min=1.0)
        direction = r**FOCUSING_POWER / cube
        along = (grad * direction).sum(dim=-1, keepdim=True)
        turning = FOCUSING_POWER * norm / cube * r ** (FOCUSING_POWER - 1) * (grad - along * direction)
        return (along * r / norm + turning).masked_fill_(u <= 0, 0.0)


@register_kernel("relu")
class ReluKernel(LinearKernel):
    """relu(q)·relu(k)."""

    feature_map = ReluFeatures

    def features(self, u: Tensor) -> Tensor:
        return F.relu(u)


@register_kernel("elu")
class EluKernel(LinearKernel):
    """(1 + elu(q))·(1 + elu(k))."""

    feature_map = EluFeatures

    def features(self, u: Tensor) -> Tensor:
        return 1 + F.elu(u)


@register_kernel("focused")
class FocusedKernel(LinearKernel):
    """Powers of relu(x) that keep its norm: directions are sharpened, lengths are not."""

    feature_map = FocusedFeatures

    def features(self, u: Tensor) -> Tensor:
        return focused_features(u)


@torch.fx.wrap
def focused_features(u: Tensor) -> Tensor:
    """‖x₊‖/‖x₊³‖ · x₊³ with x₊ = relu(u) and the norms of the last axis; 0 where x₊ is."""
    positive = F.relu(u)
    direction = (positive / _largest(positive)) ** FOCUSING_POWER  # as x₊³ directed, and its power cannot overflow
    norm = torch.linalg.vector_norm(positive, dim=-1, keepdim=True)
    return norm * F.normalize(direction, dim=-1)


def _largest(positive: Tensor) -> Tensor:
    """The largest channel of each token, or where there is none a number that can be divided by."""
    return positive.detach().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(positive.dtype).tiny)
