"""Evaluation of a model on one set of images or sequences: every sample exactly once, integer counts, one reduction."""

from collections.abc import Callable, Sequence
from math import log

import torch
from torch import Tensor, nn

from data.loaders import Batches
from logger import progress
from utils import distributed
from utils.metrics import Accuracy, AccuracyCounter
from utils.precision import autocast, exact_float32
from utils.predictions import PredictionRecorder


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


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Batches,
    device: torch.device,
    amp_dtype: torch.dtype | None = None,
    after_batch: Callable[[], None] | None = None,
    recorder: PredictionRecorder | None = None,
) -> Accuracy:
    """Top-1, top-5 and loss over every image exactly once, reduced over all processes.

    float32 with TF32 off, unless `amp_dtype` asks for autocast. The model is left in evaluation mode. `after_batch` is
    called equally often on every process, and may raise. `recorder` is shown every image's logits.
    """
    model.eval()
    in_step = batches.common_batches if after_batch else 0
    counter = AccuracyCounter(device)
    inputs = batches.inputs(device, next(model.parameters()).dtype)
    with exact_float32():
        stream = progress(batches.whole(), len(batches), "evaluation", distributed.rank())
        for i, batch in enumerate(stream):
            images = inputs(batch.images.to(device, non_blocking=True))
            labels = batch.labels.to(device, non_blocking=True)
            with autocast(device, amp_dtype):
                logits = model(images)
            counter.update(logits, labels)
            if recorder:
                recorder.update(logits, labels, batch.positions, batch.names)
            if after_batch and i < in_step:
                after_batch()
    return counter.result(batches.num_images)
