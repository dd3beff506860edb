"""A loss or gradient that is not finite: its update is suppressed on the device, the run ended or the step counted, and
the step computed once more for a report.
"""

import json
import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.loaders import Batches
from engine.training import Training
from logger import get_logger
from models.diagnostics import inspect_step, plain
from utils import distributed
from utils.precision import autocast


class NonFiniteError(RuntimeError):
    """Training met a loss or gradient that is not finite; the weights are those before `step`, -1 where unknown."""

    def __init__(self, message: str, step: int = -1, lr: float = 0.0) -> None:
        super().__init__(message)
        self.step, self.lr = step, lr


class FiniteGuard:
    """Suppresses updates that are not finite, on the device; the host looks when it logs or saves anyway.

    Without a scaler a step is bad when the total gradient norm (equal on all ranks) is not finite, and the fused
    optimizer leaves it out by `found_inf`. With the scaler of float16, overflowing gradients are ordinary and the
    scaler leaves them out; there a step is bad when a loss is not finite.

    Where the first bad step ends the run (no `max_skipped`), `alive` turns into NaN then and multiplies the loss from
    there on, so that no later step of any rank updates anything either.

    Running statistics, which the forward pass has updated by then, are put back to those before the step.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.statistics = training.running_statistics()
        self.before = [each.clone() for each in self.statistics]
        self._begin()

    def begin_step(self) -> None:
        """Note the running statistics before the first forward pass of a step."""
        if self.statistics:
            torch._foreach_copy_(self.before, self.statistics)

    def _begin(self) -> None:
        """Nothing bad seen since the host looked."""
        device = self.training.device
        self.alive = torch.ones((), device=device)
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.bad_lr = torch.zeros((), dtype=torch.float64, device=device)
        self._this_loss_bad = torch.zeros_like(self.bad_loss)

    def see_loss(self, loss: Tensor) -> Tensor:
        """Note whether this rank's loss is finite, and return it for backward."""
        bad = ~loss.detach().isfinite()
        self._this_loss_bad |= bad
        self.bad_loss |= bad & (self.first_bad_step < 0)
        return loss * self.alive.to(loss.dtype)

    def see_norm(self, norm: Tensor, step: int) -> None:
        """Decide, before the optimizer step of `step`, whether it may happen."""
        scaler = self.training.scaler
        bad = self._this_loss_bad if scaler else ~norm.isfinite()
        first = bad & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(first, step, self.first_bad_step)
        self.bad_lr = torch.where(first, self.training.optimizer.param_groups[0]["lr"], self.bad_lr)
        self.bad_steps += bad
        suppressed = bad
        if self.training.max_skipped is None:
            suppressed = self.first_bad_step >= 0
            self.alive = torch.where(suppressed, torch.nan, self.alive)
        if scaler is None:
            # read by fused optimizers, of others by `allows_update`
            self.training.optimizer.found_inf = suppressed.float()  # type: ignore[attr-defined]
        for now, before in zip(self.statistics, self.before, strict=True):
            now.copy_(torch.where(suppressed, before, now))
        self._this_loss_bad = torch.zeros_like(self._this_loss_bad)

    def allows_update(self) -> bool:
        """Whether to call the optimizer: a fused one leaves out a bad step by itself; for another the host looks."""
        optimizer: Any = self.training.optimizer
        return getattr(optimizer, "_step_supports_amp_scaling", False) or not bool(optimizer.found_inf)

    def look(self, bad_ranks: bool) -> None:
        """Raise NonFiniteError on every rank when the run has to end; count what was skipped otherwise.

        bad_ranks: whether any rank met a bad step since the last look (equal on all).
        """
        training, scaler = self.training, self.training.scaler
        if bad_ranks:
            mine = (int(self.first_bad_step), float(self.bad_lr), bool(self.bad_loss), int(self.bad_steps))
            seen = distributed.gather_objects(mine)
            step, lr = min((step, lr) for step, lr, _, _ in seen if step >= 0)
            ranks = [str(rank) for rank, (_, _, bad_loss, _) in enumerate(seen) if bad_loss]
            whose = (
                f"loss not finite on rank {', '.join(ranks)}" if ranks else "every loss was finite, the gradient not"
            )
            what = f"step {step}: non-finite gradient or loss at learning rate {lr:.3e} ({whose})"
            training.skipped += max(count for *_, count in seen)
            if training.max_skipped is None or training.skipped > training.max_skipped:
                limit = "" if training.max_skipped is None else f"; {training.skipped} steps skipped in this run"
                raise NonFiniteError(
                    f"{what}{limit}. The weights are those before this step; a lower TRAIN.BASE_LR, TRAIN.CLIP_GRAD or"
                    " AMP_DTYPE bfloat16 may help",
                    step,
                    lr,
                )
            get_logger().warning(
                "%s; skipped, %d of at most %d steps so far", what, training.skipped, training.max_skipped
            )
            self._begin()
        if scaler and scaler.get_scale() < 1:
            lr = training.optimizer.param_groups[0]["lr"]
            raise NonFiniteError(
                f"the float16 gradient scale fell to {scaler.get_scale():g} at learning rate {lr:.3e}: gradients"
                " overflow at every scale; use AMP_DTYPE bfloat16 or a lower TRAIN.BASE_LR"
            )

    def look_everywhere(self) -> None:
        """`look`, with the one reduction that it takes."""
        self.look(bool(distributed.sum_over_ranks((self.first_bad_step >= 0).double()) > 0))


def write_report(training: Training, batches: Batches, error: NonFiniteError) -> Path:
    """Compute the error's optimizer step once more and write what is seen to `non_finite_step_<step>_rank_<rank>.json`.

    The weights are those before that step, because its update was suppressed, and its images a function of seed, epoch
    and position. The draws of dropout, stochastic depth, mixup and erasing are new: what depends on them may differ.
    """
    step = error.step
    epoch, index = divmod(step, training.steps_per_epoch)
    start = index * training.plan.accumulation
    losses: list[float] = []
    batches.set_epoch(epoch, start)
    stream = iter(batches)

    def compute() -> None:
        for _ in range(training.plan.accumulation):
            images, labels = (t.to(training.device) for t in next(stream))
            images, targets = training.prepare(images, labels)
            with autocast(training.device, training.amp_dtype):  # not a compiled forward pass: hooks look inside
                loss = training.criterion(training.bare_model.forward(images), targets)
            losses.append(loss.item())
            loss.backward()

    training.optimizer.zero_grad(set_to_none=True)
    seen = inspect_step(training.bare_model, compute)
    training.optimizer.zero_grad(set_to_none=True)
    report = {
        "step": step,
        "epoch": epoch,
        "step_of_epoch": index,
        "rank": distributed.rank(),
        "host": socket.gethostname(),
        "learning_rate": error.lr,
        "loss_scale": training.scaler.get_scale() if training.scaler else None,
        "samples": batches.sample_names(epoch, start, training.plan.accumulation),
        "losses_computed_again": plain(losses),
        **seen,
    }
    folder = training.plan.folder
    folder.mkdir(parents=True, exist_ok=True)  # it may be another node's
    path = folder / f"non_finite_step_{step}_rank_{distributed.rank()}.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return path
