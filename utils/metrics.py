"""Evaluation as sums and counts: exact, and the same for every number of processes and every batch size."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from utils import distributed
from utils.devices import widest


@dataclass(frozen=True)
class Accuracy:
    """The result of an evaluation over all processes."""

    images: int
    correct1: int
    correct5: int
    non_finite: int  # images whose logits were not all finite; they count as wrong
    loss: float  # mean cross-entropy, without label smoothing
    classes: int | None = None  # of the model, where they are known

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * self.correct1 / self.images

    @property
    def top5(self) -> float | None:
        """Percent; None for up to five classes, where every guess is among five."""
        return None if self.classes and self.classes <= 5 else 100 * self.correct5 / self.images

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.3f} %"
        text = f"{self.images} images, top-1 {self.top1:.3f} %{top5}, loss {self.loss:.4f}"
        return text + (f", {self.non_finite} images with non-finite logits" if self.non_finite else "")


class AccuracyCounter:
    """Counts on the device; one reduction at the end.

    An image is right at k when fewer than k classes come before its label, ordered by logit and then by class index,
    so that ties have one answer on every device. Non-finite logits are wrong.
    """

    def __init__(self, device: torch.device) -> None:
        # images, correct at 1, correct at 5, non-finite, sum of losses: float64 holds the counts exactly below 2^53,
        # float32, of devices without it, below 2^24
        self.sums = torch.zeros(5, dtype=widest(device), device=device)
        self.classes = 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits (B, classes), labels (B,)."""
        logits = logits if logits.dtype == torch.float64 else logits.float()
        self.classes = logits.shape[1]
        own = logits.gather(1, labels[:, None])
        before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & before)).sum(dim=1)
        finite = logits.isfinite().all(dim=1)
        losses = F.cross_entropy(logits, labels, reduction="none").to(self.sums.dtype)
        counts = (finite.new_ones(len(labels)), finite & (rank < 1), finite & (rank < 5), ~finite)
        self.sums += torch.stack([*(count.sum().to(self.sums.dtype) for count in counts), losses.sum()])

    def result(self, expected_images: int) -> Accuracy:
        """Reduce over all processes. Raises RuntimeError unless exactly `expected_images` were counted."""
        images, correct1, correct5, non_finite, loss = distributed.sum_over_ranks(self.sums.clone()).tolist()
        if images != expected_images:
            raise RuntimeError(f"evaluation counted {images:.0f} images, the data set has {expected_images}")
        return Accuracy(int(images), int(correct1), int(correct5), int(non_finite), loss / images, self.classes)
