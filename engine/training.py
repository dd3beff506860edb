"""What a training step needs, and what is summed between two log lines."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from models.classifier import TrainableModel
from utils.faults.preemption import Decision


def _no_beat(step: int, phase: str) -> None:
    """Nobody watches."""


@dataclass
class Training:
    """What one optimizer step needs. `model` is wrapped as the loop calls it, `bare_model` is saved and evaluated.

    `beat` is told where the loop is (utils/faults/watchdog.py); `skipped` counts the steps that were left out because
    something was not finite, over the whole run.
    """

    model: nn.Module
    bare_model: TrainableModel
    optimizer: Optimizer
    scheduler: Scheduler
    criterion: nn.Module
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # data.transforms.TrainBatch or data.tokens.TokenBatch
    device: torch.device
    steps_per_epoch: int
    global_batch: int  # images per optimizer step, over all processes
    accumulation_steps: int = 1
    clip_grad: float | None = None
    clip_value: float | None = None
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    ema: ModelEmaV3 | None = None
    max_skipped: int | None = None  # None: the first step that is not finite ends the run
    skipped: int = 0
    beat: Callable[[int, str], None] = field(default=_no_beat)
    profiler: torch.profiler.profile | None = None


class Interval:
    """What is summed between two log lines: on the device what the device knows, on the host only times.

    A run that was interrupted between two log lines continues the sums, and measures times anew.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.losses = torch.zeros((), dtype=torch.int64, device=device)  # finite ones, of forward passes
        self.timed_steps = 0
        self.data_time = 0.0
        self.start = time.perf_counter()

    def add_loss(self, loss: Tensor) -> None:
        """Count a loss if it is finite."""
        finite = loss.isfinite()
        self.loss_sum += torch.where(finite, loss, 0.0).double()
        self.losses += finite

    def state(self) -> dict[str, float | int]:
        """As plain values; waits for the device."""
        return {"loss_sum": self.loss_sum.item(), "losses": int(self.losses.item())}

    def load_state(self, state: dict[str, float | int]) -> None:
        self.loss_sum.fill_(state["loss_sum"])
        self.losses.fill_(state["losses"])


class Keeper(Protocol):
    """Asked after every optimizer step, and every batch of a validation, whether to save or to stop; collective."""

    def decide(self, done: int) -> Decision:
        """What to do after `done` steps of the epoch."""
        ...

    def save(self, epoch: int, done: int, interval: Interval, stop: bool) -> None:
        """Save that position. Raises Preempted, after everything is on disk, where the run has to `stop`."""
        ...
