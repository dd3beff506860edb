"""The loops: one epoch of training, one evaluation, one throughput measurement."""

import json
import resource
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from yacs.config import CfgNode

from config import image_size, run_folder
from data import Batches
from logger import MetricsWriter, get_logger, progress
from models.classifier import TrainableModel
from models.inspection import inspect_step, plain
from utils import distributed
from utils.bottleneck import Times, verdict
from utils.metrics import Accuracy, AccuracyCounter
from utils.precision import autocast, exact_float32
from utils.predictions import PredictionRecorder
from utils.preemption import Decision


class NonFiniteError(RuntimeError):
    """Training met a loss or gradient that is not finite; the weights are those before `step`, -1 where unknown."""

    def __init__(self, message: str, step: int = -1, lr: float = 0.0) -> None:
        super().__init__(message)
        self.step, self.lr = step, lr


def _no_beat(step: int, phase: str) -> None:
    """Nobody watches."""


@dataclass
class Training:
    """What one optimizer step needs. `model` is wrapped as the loop calls it, `bare_model` is saved and evaluated.

    `beat` is told where the loop is (utils/watchdog.py); `skipped` counts the steps that were left out because
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


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


class FiniteGuard:
    """Suppresses updates that are not finite, on the device; the host looks when it logs or saves anyway.

    Without a scaler a step is bad when the total gradient norm (equal on all ranks) is not finite, and the fused
    optimizer leaves it out by `found_inf`. With the scaler of float16, overflowing gradients are ordinary and the
    scaler leaves them out; there a step is bad when a loss is not finite.

    Where the first bad step ends the run (no `max_skipped`), `alive` turns into NaN then and multiplies the loss from
    there on, so that no later step of any rank updates anything either.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self._begin()

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
            # read by fused optimizers only, which is what build_optimizer builds
            self.training.optimizer.found_inf = suppressed.float()  # type: ignore[attr-defined]
        self._this_loss_bad = torch.zeros_like(self._this_loss_bad)

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


def memory_mb(device: torch.device) -> float:
    """Largest memory use so far in MiB: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_one_epoch(
    config: CfgNode,
    training: Training,
    batches: Batches,
    epoch: int,
    metrics: MetricsWriter,
    *,
    start: int = 0,
    interval: Interval | None = None,
    keeper: Keeper | None = None,
) -> None:
    """Train for one epoch, from its optimizer step `start` on, and log every PRINT_FREQ steps and at the end.

    Args:
        interval: the sums since the last log line, of a run that continues.
        keeper: asked after every step whether to save or to stop.

    Raises:
        NonFiniteError: on all ranks, at the first log line or save after a step that was not finite.
        Preempted: the run was told to stop, and has saved.
    """
    training.model.train()
    batches.set_epoch(epoch, start * training.accumulation_steps)
    guard, interval, times = FiniteGuard(training), interval or Interval(training.device), Times()
    stream = iter(batches)
    steps = range(start, training.steps_per_epoch)
    try:
        for index in progress(steps, training.steps_per_epoch, f"epoch {epoch}", distributed.rank(), done=start):
            step, done = epoch * training.steps_per_epoch + index, index + 1
            norm = _optimizer_step(training, stream, guard, interval, step)
            if done % config.PRINT_FREQ == 0 or done == training.steps_per_epoch:
                times.add(_log_interval(training, guard, interval, norm, epoch, step, metrics, batches))
                interval = Interval(training.device)
            training.scheduler.step_update(step)
            if training.profiler:
                training.profiler.step()
            if keeper and any(decision := keeper.decide(done)):
                guard.look_everywhere()
                keeper.save(epoch, done, interval, decision.stop)
    except NonFiniteError as error:
        if error.step < 0:
            raise
        try:
            report = f"{_write_report(training, batches, error, run_folder(config))} says where it began"
        except Exception as problem:  # whatever it is: the first error is the one to see
            report = f"Computing the step again for a report failed ({problem})"
        raise NonFiniteError(f"{error}. {report}", error.step) from None
    if times.step > 0:
        why = verdict(
            times,
            workers=config.DATA.NUM_WORKERS,
            processes=distributed.world_size(),
            sequences=config.DATA.DATASET == "lra",
        )
        get_logger().info("epoch %d %s", epoch, why)


def _optimizer_step(
    training: Training, stream: Iterator[tuple[Tensor, Tensor]], guard: FiniteGuard, interval: Interval, step: int
) -> Tensor:
    """Accumulate gradients, clip, update the weights and their average; returns the total gradient norm."""
    optimizer, scaler = training.optimizer, training.scaler
    for micro in range(training.accumulation_steps):
        training.beat(step, "waiting for data")
        waiting = time.perf_counter()
        images, labels = next(stream)
        interval.data_time += time.perf_counter() - waiting
        training.beat(step, "forward pass")
        images = images.to(training.device, non_blocking=True)
        images, targets = training.prepare(images, labels.to(training.device, non_blocking=True))
        last = micro + 1 == training.accumulation_steps
        distributed_model = isinstance(training.model, DistributedDataParallel)
        # gradients travel between processes once per step, with the last backward
        with training.model.no_sync() if distributed_model and not last else nullcontext():  # type: ignore[operator]
            with autocast(training.device, training.amp_dtype):
                loss = training.criterion(training.model(images), targets) / training.accumulation_steps
            interval.add_loss(loss.detach())
            loss = guard.see_loss(loss)
            training.beat(step, "backward pass")
            (scaler.scale(loss) if scaler else loss).backward()
    training.beat(step, "update")
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scaler:
        scaler.unscale_(optimizer)
    norm = get_total_norm([p.grad for p in parameters])
    if training.clip_grad:
        clip_grads_with_norm_(parameters, training.clip_grad, norm)
    if training.clip_value:
        clip_grad_value_(parameters, training.clip_value)
    guard.see_norm(norm, step)
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if training.ema:
        training.ema.update(training.bare_model)
    interval.timed_steps += 1
    return norm


def _write_report(training: Training, batches: Batches, error: NonFiniteError, folder: Path) -> Path:
    """Compute the error's optimizer step once more and write what is seen to `non_finite_step_<step>_rank_<rank>.json`.

    The weights are those before that step, because its update was suppressed, and its images a function of seed, epoch
    and position. The draws of dropout, stochastic depth, mixup and erasing are new: what depends on them may differ.
    """
    step = error.step
    epoch, index = divmod(step, training.steps_per_epoch)
    start = index * training.accumulation_steps
    losses: list[float] = []
    batches.set_epoch(epoch, start)
    stream = iter(batches)

    def compute() -> None:
        for _ in range(training.accumulation_steps):
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
        "samples": batches.sample_names(epoch, start, training.accumulation_steps),
        "losses_computed_again": plain(losses),
        **seen,
    }
    folder.mkdir(parents=True, exist_ok=True)  # it may be another node's
    path = folder / f"non_finite_step_{step}_rank_{distributed.rank()}.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    return path


def _log_interval(
    training: Training,
    guard: FiniteGuard,
    interval: Interval,
    norm: Tensor,
    epoch: int,
    step: int,
    metrics: MetricsWriter,
    batches: Batches,
) -> Times:
    """One reduction and one look at the device: mean loss of all ranks, gradient norm, times, and whether to stop."""
    bad = (guard.first_bad_step >= 0).double()
    mine = [len(batches.unreadable), interval.data_time / interval.timed_steps, exposed_communication(training.model)]
    numbers = torch.tensor(mine, dtype=torch.float64).to(bad.device, non_blocking=True)
    sums = distributed.sum_over_ranks(
        torch.cat([torch.stack([interval.loss_sum, interval.losses.double(), bad]), numbers])
    )
    loss_sum, losses, bad_ranks, unreadable, data, communication, grad_norm = torch.cat(
        [sums, norm.detach().double()[None]]
    ).tolist()
    guard.look(bad_ranks > 0)
    batches.require_readable(int(unreadable))
    elapsed = time.perf_counter() - interval.start
    world_size = distributed.world_size()
    values = {
        "loss": loss_sum * training.accumulation_steps / max(losses, 1),
        "lr": training.optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm,
        "data_time": data / world_size,
        "communication_time": communication / world_size,
        "step_time": elapsed / interval.timed_steps,
        "images_per_s": training.global_batch * interval.timed_steps / elapsed,
        "memory_mb": memory_mb(training.device),
    }
    metrics.write("train", epoch, step + 1, **values)
    done = (step % training.steps_per_epoch) + 1
    shown = ["loss", "lr", "grad_norm", "step_time", "data_time", "communication_time", "images_per_s", "memory_mb"]
    get_logger().info(
        "epoch %d [%d/%d] loss %.4f  lr %.3e  grad norm %.3f  step %.3f s (data %.3f, communication %.3f)"
        "  %.0f images/s  memory %.0f MiB",
        epoch,
        done,
        training.steps_per_epoch,
        *(values[name] for name in shown),
    )
    steps = interval.timed_steps
    waiting = (values["data_time"] * steps, values["communication_time"] * steps)
    return Times(elapsed, *waiting, training.global_batch * steps)


def exposed_communication(model: nn.Module) -> float:
    """Seconds by which the exchange of gradients outlasted the backward pass, in the last step that DDP looked at.

    DDP times one step per log line (`wrap` in main.py says so) with events of its own, and waits for those of the step
    before when it does.
    """
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    seen = model._get_ddp_logging_data()
    exchange, hidden = seen.get("backward_comm_time", 0), seen.get("backward_compute_comm_overlap_time", 0)
    return max(0, exchange - hidden) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


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
    """Time the forward pass on synthetic images of IMG_SIZE, or ids of full length, batch by batch.

    Stops after `batches` batches, or after `seconds` once at least 3 are timed.
    """
    model.eval()
    if config.MODEL.TYPE == "lra":
        documents = () if config.MODEL.LRA.DOCUMENTS == 1 else (config.MODEL.LRA.DOCUMENTS,)
        shape = (config.DATA.BATCH_SIZE, *documents, config.MODEL.LRA.LENGTH)
        images = torch.randint(1, config.MODEL.LRA.VOCABULARY, shape, device=device)
    else:
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
