"""A rehearsal (--dry-run): two steps on synthetic input tell what a run will take; nothing is written."""

import io
import itertools
import time

import torch
from yacs.config import CfgNode

from data.loaders import Loaders
from engine.epoch import optimizer_step
from engine.non_finite import FiniteGuard
from engine.state import Progress, checkpoint_state, start_from_pretrained
from engine.training import Interval, Training, wrap
from logger import duration, get_logger
from utils.devices import peak_memory_mb

STEPS = 2  # the first one includes what is done once: compiling, choosing kernels, the optimizer's state


class _Count(io.RawIOBase):
    """A file that only counts what is written into it."""

    total = 0

    def write(self, content) -> int:
        self.total += len(content)
        return len(content)


def rehearse(config: CfgNode, loaders: Loaders, training: Training) -> None:
    """Say what memory and time a step takes, how many there are, their learning rates, and how large checkpoints are.

    `training` is used up: its weights, its optimizer and its schedule are moved.
    """
    logger, plan, device = get_logger(), training.plan, training.device
    start_from_pretrained(config, training, loaders)
    wrap(config, training)
    samples = training.bare_model.example_input(plan.per_process).cpu()
    if samples.is_floating_point():  # images, which travel to the device as bytes
        samples = torch.randint(0, 256, samples.shape, dtype=torch.uint8)
    stream = itertools.repeat((samples, torch.randint(loaders.num_classes, (plan.per_process,))))
    training.train()
    guard, interval, seconds = FiniteGuard(training), Interval(device), []
    for step in range(STEPS):
        start = time.perf_counter()
        optimizer_step(training, stream, guard, interval, step).item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    per_epoch, total = training.steps_per_epoch, plan.last_epoch * training.steps_per_epoch
    logger.info(
        "%d steps on synthetic input: %.3f s, then %.3f s (%.0f images/s); memory %.0f MiB",
        STEPS,
        *seconds,
        plan.global_batch / seconds[-1],
        peak_memory_mb(device),
    )
    logger.info(
        "the run: %d epochs of %d steps, %s without validation and waiting for data",
        plan.last_epoch,
        per_epoch,
        duration(total * seconds[-1]),
    )
    warmup = plan.warmup_steps(per_epoch)
    moments = {f"step {step + 1}": step for step in (0, warmup, total // 2, total - 1) if step < total}
    logger.info("learning rates: %s", ", ".join(f"{_rate(training, k):.3e} at {name}" for name, k in moments.items()))
    written = _Count()
    torch.save(checkpoint_state(config, training, loaders, Progress(), interval), written)  # type: ignore[arg-type]
    kept = config.CHECKPOINT.KEEP + (2 if training.ema else 1)
    logger.info(
        "a checkpoint has %.3f GB; up to %d of them, the best included: %.2f GB in %s",
        written.total / 1e9,
        kept,
        kept * written.total / 1e9,
        plan.folder,
    )
    logger.info("dry run: nothing was written; the same command without --dry-run trains")


def _rate(training: Training, step: int) -> float:
    """The learning rate that the schedule has for a step."""
    if step:
        training.scheduler.step_update(step - 1)
    return training.optimizer.param_groups[0]["lr"]
