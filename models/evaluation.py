"""A classifier as a benchmark asks for it: some of its classes alone, averaged over an image and its mirror image."""

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor, nn


class EvaluatedModel(nn.Module):
    """Logits of a model, or what stands for them.

    Args:
        outputs: the outputs to keep, in this order; None keeps all. The others take no part in anything after.
        flip: also look at the image mirrored left to right; what comes out is the logarithm of the mean of the two
            class probabilities, so that its softmax is that mean.
    """

    def __init__(self, model: nn.Module, outputs: Sequence[int] | None = None, flip: bool = False) -> None:
        super().__init__()
        self.model, self.flip = model, flip
        device = next(model.parameters()).device
        self.outputs = None if outputs is None else torch.tensor(outputs, device=device)

    def _logits(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return logits if self.outputs is None else logits[:, self.outputs]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, classes)."""
        logits = self._logits(images)
        if not self.flip:
            return logits
        pair = torch.stack([logits, self._logits(images.flip(3))])
        pair = pair if pair.dtype == torch.float64 else pair.float()
        return pair.log_softmax(dim=2).logsumexp(dim=0) - log(2)
