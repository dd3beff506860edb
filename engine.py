"""The loops: one epoch of training, one evaluation, one throughput measurement."""

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from yacs.config import CfgNode

from config import image_size
from data import Batches
from data.transforms import Normalise, TrainBatch
from logger import MetricsWriter, get_logger, progress
from models.classifier import Classifier
from utils import distributed
from utils.metrics import Accuracy, AccuracyCounter
from utils.precision import autocast, exact_float32


class NonFiniteError(RuntimeError):
    """Training met a loss or gradient that is not finite; the weights are those before that step."""


@dataclass
class Training:
    """What one optimizer step needs. `model` is wrapped as the loop calls it, `bare_model` is saved and evaluated."""

    model: nn.Module
    bare_model: Classifier
    optimizer: Optimizer
    scheduler: Scheduler
    criterion: nn.Module
    prepare: TrainBatch
    device: torch.device
    steps_per_epoch: int
    accumulation_steps: int = 1
    clip_grad: float | None = None
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    ema: ModelEmaV3 | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class FiniteGuard:
    """Suppresses every update from the first non-finite step on, on the device; the host looks when it logs anyway.

    Without a scaler a step is bad when the total gradient norm (equal on all ranks) is not finite, and the fused
    optimizer skips it by `found_inf`. With the scaler of float16, overflowing gradients are ordinary and the scaler
    skips them; there a step is bad when a loss is not finite. `alive` turns into NaN at the first bad step and
    multiplies the loss from then on, so that no later step of any rank updates anything either.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.alive = torch.ones((), device=training.device)
        self.bad_loss = torch.zeros((), dtype=torch.bool, device=training.device)
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=training.device)
        self.bad_lr = torch.zeros((), dtype=torch.float64, device=training.device)

    def see_loss(self, loss: Tensor) -> Tensor:
        """Note whether this rank's loss is finite, and return it for backward."""
        self.bad_loss |= ~loss.detach().isfinite() & (self.first_bad_step < 0)
        return loss * self.alive.to(loss.dtype)

    def see_norm(self, norm: Tensor, step: int) -> None:
        """Decide, before the optimizer step of `step`, whether it may happen."""
        scaler = self.training.scaler
        bad = self.bad_loss if scaler else ~norm.isfinite()
        first = bad & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(first, step, self.first_bad_step)
        self.bad_lr = torch.where(first, self.training.optimizer.param_groups[0]["lr"], self.bad_lr)
        self.alive = torch.where(self.first_bad_step < 0, self.alive, torch.nan)
        if scaler is None:
            # read by fused optimizers only, which is what build_optimizer builds
            self.training.optimizer.found_inf = (self.first_bad_step >= 0).float()  # type: ignore[attr-defined]

    def raise_if_stopped(self, stopped: bool) -> None:
        """Raise NonFiniteError on every rank when any has stopped (`stopped` is equal on all)."""
        scaler = self.training.scaler
        if stopped:
            mine = (int(self.first_bad_step), float(self.bad_lr), bool(self.bad_loss))
            seen = distributed.gather_objects(mine)
            step, lr = min((step, lr) for step, lr, _ in seen if step >= 0)
            ranks = [str(rank) for rank, (_, _, bad_loss) in enumerate(seen) if bad_loss]
            whose = (
                f"loss not finite on rank {', '.join(ranks)}" if ranks else "every loss was finite, the gradient not"
            )
            raise NonFiniteError(
                f"step {step}: non-finite gradient or loss at learning rate {lr:.3e} ({whose}). The weights are those"
                " before this step; a lower TRAIN.BASE_LR, TRAIN.CLIP_GRAD or AMP_DTYPE bfloat16 may help"
            )
        if scaler and scaler.get_scale() < 1:
            lr = self.training.optimizer.param_groups[0]["lr"]
            raise NonFiniteError(
                f"the float16 gradient scale fell to {scaler.get_scale():g} at learning rate {lr:.3e}: gradients"
                " overflow at every scale; use AMP_DTYPE bfloat16 or a lower TRAIN.BASE_LR"
            )


class Interval:
    """What is summed between two log lines: on the device what the device knows, on the host only times."""

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.steps = 0
        self.data_time = 0.0
        self.start = time.perf_counter()


def memory_mb(device: torch.device) -> float:
    """Largest memory use so far in MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_one_epoch(config: CfgNode, training: Training, batches: Batches, epoch: int, metrics: MetricsWriter) -> None:
    """Train for one epoch and log every PRINT_FREQ optimizer steps and at the end.

    Raises NonFiniteError on all ranks at the log line after the first non-finite step.
    """
    training.model.train()
    batches.set_epoch(epoch)
    guard, interval = FiniteGuard(training), Interval(training.device)
    stream = iter(batches)
    steps = range(training.steps_per_epoch)
    for index in progress(steps, len(steps), f"epoch {epoch}", distributed.rank()):
        step = epoch * training.steps_per_epoch + index
        norm = _optimizer_step(training, stream, guard, interval, step)
        if (index + 1) % config.PRINT_FREQ == 0 or index + 1 == len(steps):
            _log_interval(config, training, guard, interval, norm, epoch, step, metrics, batches)
            interval = Interval(training.device)
        training.scheduler.step_update(step)


def _optimizer_step(
    training: Training, stream: Iterator[tuple[Tensor, Tensor]], guard: FiniteGuard, interval: Interval, step: int
) -> Tensor:
    """Accumulate gradients, clip, update the weights and their average; returns the total gradient norm."""
    optimizer, scaler = training.optimizer, training.scaler
    for micro in range(training.accumulation_steps):
        waiting = time.perf_counter()
        images, labels = next(stream)
        interval.data_time += time.perf_counter() - waiting
        images = images.to(training.device, non_blocking=True)
        images, targets = training.prepare(images, labels.to(training.device, non_blocking=True))
        last = micro + 1 == training.accumulation_steps
        distributed_model = isinstance(training.model, DistributedDataParallel)
        # gradients travel between processes once per step, with the last backward
        with training.model.no_sync() if distributed_model and not last else nullcontext():  # type: ignore[operator]
            with autocast(training.device, training.amp_dtype):
                loss = training.criterion(training.model(images), targets) / training.accumulation_steps
            interval.loss_sum += loss.detach().double()
            loss = guard.see_loss(loss)
            (scaler.scale(loss) if scaler else loss).backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scaler:
        scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in parameters])
    if training.clip_grad:
        clip_grads_with_norm_(parameters, training.clip_grad, norm)
    guard.see_norm(norm, step)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if training.ema:
        training.ema.update(training.bare_model)
    interval.steps += 1
    return norm


def _log_interval(
    config: CfgNode,
    training: Training,
    guard: FiniteGuard,
    interval: Interval,
    norm: Tensor,
    epoch: int,
    step: int,
    metrics: MetricsWriter,
    batches: Batches,
) -> None:
    """One reduction and one look at the device: mean loss of all ranks, gradient norm, and whether to stop."""
    stopped = (guard.first_bad_step >= 0).double()
    unreadable = torch.full_like(stopped, len(batches.unreadable))
    sums = distributed.sum_over_ranks(torch.stack([interval.loss_sum, stopped, unreadable]))
    loss_sum, stopped_ranks, all_unreadable, grad_norm = torch.cat([sums, norm.detach().double()[None]]).tolist()
    guard.raise_if_stopped(stopped_ranks > 0)
    batches.require_readable(int(all_unreadable))
    lr = training.optimizer.param_groups[0]["lr"]
    elapsed = time.perf_counter() - interval.start
    world_size = distributed.world_size()
    images = config.DATA.BATCH_SIZE * training.accumulation_steps * world_size * interval.steps
    values = {
        "loss": loss_sum / (interval.steps * world_size),
        "lr": lr,
        "grad_norm": grad_norm,
        "data_time": interval.data_time / interval.steps,
        "step_time": elapsed / interval.steps,
        "images_per_s": images / elapsed,
        "memory_mb": memory_mb(training.device),
    }
    metrics.write("train", epoch, step + 1, **values)
    done = (step % training.steps_per_epoch) + 1
    get_logger().info(
        "epoch %d [%d/%d] loss %.4f  lr %.3e  grad norm %.3f  step %.3f s (data %.3f)  %.0f images/s  memory %.0f MiB",
        epoch,
        done,
        training.steps_per_epoch,
        *(values[name] for name in ("loss", "lr", "grad_norm", "step_time", "data_time", "images_per_s", "memory_mb")),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(
    model: nn.Module, batches: Batches, device: torch.device, amp_dtype: torch.dtype | None = None
) -> Accuracy:
    """Top-1, top-5 and loss over every image exactly once, reduced over all processes.

    float32 with TF32 off, unless `amp_dtype` asks for autocast. The model is left in evaluation mode.
    """
    model.eval()
    counter = AccuracyCounter(device)
    normalise = Normalise(device, next(model.parameters()).dtype)
    with exact_float32():
        for images, labels in progress(batches, len(batches), "evaluation", distributed.rank()):
            images = normalise(images.to(device, non_blocking=True))
            with autocast(device, amp_dtype):
                logits = model(images)
            counter.update(logits, labels.to(device, non_blocking=True))
    return counter.result(batches.num_images)


# ---------------------------------------------------------------------------------------------------------------------
# Throughput
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Throughput:
    """Images per second of the forward pass: median, smallest and largest over `batches` timed batches."""

    median: float
    low: float
    high: float
    batches: int


@torch.inference_mode()
def throughput(
    config: CfgNode,
    model: nn.Module,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    *,
    warmup: int = 5,
    batches: int = 30,
    seconds: float = 60.0,
) -> Throughput:
    """Time the forward pass on synthetic input of BATCH_SIZE × IMG_SIZE, batch by batch.

    Stops after `batches` batches, or after `seconds` once at least 3 are timed.
    """
    model.eval()
    shape = (config.DATA.BATCH_SIZE, config.MODEL.SWIN.IN_CHANS, *image_size(config))
    images = torch.randn(shape, device=device)

    def timed() -> float:
        start = time.perf_counter()
        with autocast(device, amp_dtype):
            model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    begin = time.perf_counter()
    for _ in range(warmup):
        timed()
        if time.perf_counter() - begin > seconds:
            break
    rates: list[float] = []
    begin = time.perf_counter()
    while len(rates) < batches and (len(rates) < 3 or time.perf_counter() - begin < seconds):
        rates.append(shape[0] / timed())
    return Throughput(statistics.median(rates), min(rates), max(rates), len(rates))
