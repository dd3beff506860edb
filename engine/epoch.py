"""One epoch of training: the loop."""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from yacs.config import CfgNode

from data.loaders import Batches
from engine.bottleneck import Times, decoding_advice, verdict
from engine.non_finite import FiniteGuard, NonFiniteError, write_report
from engine.training import Interval, Saver, Training
from logger import MetricsWriter, duration, get_logger, progress
from utils import distributed
from utils.devices import peak_memory_mb, widest
from utils.precision import autocast


def train_one_epoch(
    config: CfgNode,
    training: Training,
    batches: Batches,
    epoch: int,
    metrics: MetricsWriter,
    *,
    start: int = 0,
    interval: Interval | None = None,
    saver: Saver | None = None,
) -> None:
    """Train for one epoch, from its optimizer step `start` on, and log every PRINT_FREQ steps and at the end.

    Args:
        interval: the sums since the last log line, of a run that continues.
        saver: asked after every step whether to save or to stop.

    Raises:
        NonFiniteError: on all ranks, at the first log line or save after a step that was not finite.
        Preempted: the run was told to stop, and has saved.
    """
    training.train()
    batches.set_epoch(epoch, start * training.plan.accumulation)
    guard, interval, times = FiniteGuard(training), interval or Interval(training.device), Times()
    stream = iter(batches)
    steps = range(start, training.steps_per_epoch)
    try:
        for index in progress(steps, training.steps_per_epoch, f"epoch {epoch}", distributed.rank(), done=start):
            step, done = epoch * training.steps_per_epoch + index, index + 1
            norm = optimizer_step(training, stream, guard, interval, step)
            # Numbers stay on the device between log lines: reading one would make the host wait for the GPU, which then
            # runs out of work. So a loss that is not finite is seen here too, and its update was suppressed meanwhile.
            if done % config.PRINT_FREQ == 0 or done == training.steps_per_epoch:
                times.add(_log_interval(training, guard, interval, norm, epoch, step, metrics, batches))
                interval = Interval(training.device)
            training.scheduler.step_update(step)  # the rate of the next step (timm counts updates that are done)
            if training.profiler:
                training.profiler.step()
            if saver and any(decision := saver.decide(done)):
                guard.look_everywhere()  # nothing is saved after a step that was not finite
                saver.save(epoch, done, interval, decision.stop)
    except NonFiniteError as error:
        if error.step < 0:
            raise
        # The weights are those before that step, and its images a function of seed and position: it can be repeated.
        try:
            report = f"{write_report(training, batches, error)} says where it began"
        except Exception as problem:  # whatever it is: the first error is the one to see
            report = f"Computing the step again for a report failed ({problem})"
        raise NonFiniteError(f"{error}. {report}", error.step) from None
    if times.step > 0:
        training.verdict = verdict(
            times,
            workers=training.plan.workers,
            processes=distributed.world_size(),
            noun=batches.modality.noun,
            before=training.verdict,
            decoding=partial(decoding_advice, config, batches, training.plan.image_size),
        )
        get_logger().info("epoch %d %s", epoch, training.verdict)


def optimizer_step(
    training: Training, stream: Iterator[tuple[Tensor, Tensor]], guard: FiniteGuard, interval: Interval, step: int
) -> Tensor:
    """Accumulate gradients, clip, update the weights and their average; returns the total gradient norm."""
    optimizer, scaler = training.optimizer, training.scaler
    guard.begin_step()
    for micro in range(training.plan.accumulation):
        training.beat(step, "waiting for data")
        waiting = time.perf_counter()
        images, labels = next(stream)
        interval.data_time += time.perf_counter() - waiting
        training.beat(step, "forward pass")
        # uint8 until here: a quarter of the bytes; normalisation, erasing and mixup are the device's work
        images = images.to(training.device, non_blocking=True)
        images, targets = training.prepare(images, labels.to(training.device, non_blocking=True))
        last = micro + 1 == training.plan.accumulation
        distributed_model = isinstance(training.model, DistributedDataParallel)
        # gradients travel between processes once per step, with the last backward
        with training.model.no_sync() if distributed_model and not last else nullcontext():  # type: ignore[operator]
            with autocast(training.device, training.amp_dtype):
                loss = training.criterion(training.model(images), targets) / training.plan.accumulation
            interval.add_loss(loss.detach())
            loss = guard.see_loss(loss)  # NaN from the first bad step of a run that will stop, so that no rank updates
            training.beat(step, "backward pass")
            (scaler.scale(loss) if scaler else loss).backward()
    training.beat(step, "update")
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if scaler:
        scaler.unscale_(optimizer)  # clipping is about the gradients' own size
    # equal on all ranks after DDP's sum, so that all decide alike without asking each other
    norm = get_total_norm([p.grad for p in parameters])
    if training.clip_grad:
        clip_grads_with_norm_(parameters, training.clip_grad, norm)
    if training.clip_value:
        clip_grad_value_(parameters, training.clip_value)
    guard.see_norm(norm, step)  # tells the fused optimizer, on the device, whether this update may happen
    if scaler:
        scaler.step(optimizer)
        scaler.update()
    elif guard.allows_update():
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)  # None, not zeros: unused parameters are then left alone
    if training.ema:
        # timm's own loop counts the updates that are done; without warm-up it is the decay at every step, as released
        training.ema.update(training.bare_model, step + 1 if training.ema.use_warmup else None)
    interval.timed_steps += 1
    return norm


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
    wide = widest(training.device)
    bad = (guard.first_bad_step >= 0).to(wide)
    mine = [len(batches.unreadable), interval.data_time / interval.timed_steps, exposed_communication(training.model)]
    numbers = torch.tensor(mine, dtype=wide).to(bad.device, non_blocking=True)
    # one reduction and one copy to the host for everything that a log line says
    sums = distributed.sum_over_ranks(
        torch.cat([torch.stack([interval.loss_sum, interval.losses.to(wide), bad]), numbers])
    )
    loss_sum, losses, bad_ranks, unreadable, data, communication, grad_norm = torch.cat(
        [sums, norm.detach().to(wide)[None]]
    ).tolist()
    guard.look(bad_ranks > 0)  # raises on every rank alike, because the sum is the same everywhere
    batches.require_readable(int(unreadable))
    elapsed = time.perf_counter() - interval.start
    world_size = distributed.world_size()
    values = {
        "loss": loss_sum * training.plan.accumulation / max(losses, 1),
        "lr": training.optimizer.param_groups[0]["lr"],
        "grad_norm": grad_norm,
        "data_time": data / world_size,
        "communication_time": communication / world_size,
        "step_time": elapsed / interval.timed_steps,
        "images_per_s": training.plan.global_batch * interval.timed_steps / elapsed,
        "memory_mb": peak_memory_mb(training.device),
    }
    metrics.write("train", epoch, step + 1, **values)
    done = (step % training.steps_per_epoch) + 1
    shown = ["loss", "lr", "grad_norm", "step_time", "data_time", "communication_time", "images_per_s"]
    get_logger().info(
        "epoch %d [%d/%d] loss %.4f  lr %.3e  grad norm %.3f  step %.3f s (data %.3f, communication %.3f)"
        "  %.0f %s/s  memory %.0f MiB  %s left",
        epoch,
        done,
        training.steps_per_epoch,
        *(values[name] for name in shown),
        batches.modality.noun,
        values["memory_mb"],
        duration(_seconds_left(training, epoch, done, values["step_time"])),
    )
    steps = interval.timed_steps
    waiting = (values["data_time"] * steps, values["communication_time"] * steps)
    return Times(elapsed, *waiting, training.plan.global_batch * steps)


def _seconds_left(training: Training, epoch: int, done: int, step_time: float) -> float:
    """Of the run after `done` steps of an epoch: steps like the last ones, and breaks between epochs like the last."""
    epochs = training.plan.last_epoch - epoch
    return (epochs * training.steps_per_epoch - done) * step_time + epochs * training.pause


def exposed_communication(model: nn.Module) -> float:
    """Seconds by which the exchange of gradients outlasted the backward pass, in the last step that DDP looked at.

    DDP times one step per log line (`wrap` in engine/training.py says so) with events of its own, and waits for those
    of the step before when it does.
    """
    if not isinstance(model, DistributedDataParallel):
        return 0.0
    seen = model._get_ddp_logging_data()
    exchange, hidden = seen.get("backward_comm_time", 0), seen.get("backward_compute_comm_overlap_time", 0)
    return max(0, exchange - hidden) / 1e9
