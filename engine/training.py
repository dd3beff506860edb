"""What a training step needs and how it is put together, and what is summed between two log lines."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from timm.loss import BinaryCrossEntropy
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from yacs.config import CfgNode

from config import REFERENCE_BATCH, ConfigError, Plan
from data.loaders import Loaders
from data.transforms import mixup_enabled
from logger import get_logger
from lr_scheduler import build_scheduler
from models.classifier import TrainableModel
from optimizer import build_optimizer, freeze, layer_groups, require_optimizer
from utils import distributed
from utils.devices import widest
from utils.faults.preemption import Decision
from utils.precision import autocast_dtype

FAR_BELOW = 1 / 16  # a scale of the learning rates below which they are hardly those that the user meant


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
    prepare: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # what the modality of the data asks for
    device: torch.device
    steps_per_epoch: int
    plan: Plan
    clip_grad: float | None = None
    clip_value: float | None = None
    amp_dtype: torch.dtype | None = None
    scaler: torch.amp.GradScaler | None = None
    ema: ModelEmaV3 | None = None
    max_skipped: int | None = None  # None: the first step that is not finite ends the run
    skipped: int = 0
    beat: Callable[[int, str], None] = lambda step, phase: None  # nobody watches
    profiler: torch.profiler.profile | None = None
    pause: float = 0.0  # seconds between the last epoch's steps and the next one's: validation, saving
    verdict: str = ""  # what bounded the last epoch

    def train(self) -> None:
        """Training mode, but for BatchNorm layers that TRAIN.FREEZE holds: they keep their statistics."""
        self.model.train()
        for module in self.bare_model.modules():
            if isinstance(module, _BatchNorm) and module.affine and not module.weight.requires_grad:
                module.eval()

    def running_statistics(self) -> list[Tensor]:
        """What BatchNorm layers gather over batches, each rank over its own: mean, variance and count of each."""
        return _statistics_of(self.bare_model)

    def share_statistics(self) -> None:
        """Give every rank rank 0's running statistics, the model's and the average's: what is saved and evaluated."""
        distributed.broadcast_tensors(
            [*self.running_statistics(), *(_statistics_of(self.ema.module) if self.ema else [])]
        )


def _statistics_of(model: nn.Module) -> list[Tensor]:
    return [each for module in model.modules() if isinstance(module, _BatchNorm) for each in module.buffers()]


class Interval:
    """What is summed between two log lines: on the device what the device knows, on the host only times.

    A run that was interrupted between two log lines continues the sums, and measures times anew.
    """

    def __init__(self, device: torch.device) -> None:
        self.loss_sum = torch.zeros((), dtype=widest(device), device=device)
        self.losses = torch.zeros((), dtype=torch.int64, device=device)  # finite ones, of forward passes
        self.timed_steps = 0
        self.data_time = 0.0
        self.start = time.perf_counter()

    def add_loss(self, loss: Tensor) -> None:
        """Count a loss if it is finite."""
        finite = loss.isfinite()
        self.loss_sum += torch.where(finite, loss, 0.0).to(self.loss_sum.dtype)
        self.losses += finite

    def state(self) -> dict[str, float | int]:
        """As plain values; waits for the device."""
        return {"loss_sum": self.loss_sum.item(), "losses": int(self.losses.item())}

    def load_state(self, state: dict[str, float | int]) -> None:
        self.loss_sum.fill_(state["loss_sum"])
        self.losses.fill_(state["losses"])


class Saver(Protocol):
    """Asked after every optimizer step, and every batch of a validation, whether to save or to stop; collective."""

    def decide(self, done: int) -> Decision:
        """What to do after `done` steps of the epoch."""
        ...

    def save(self, epoch: int, done: int, interval: Interval, stop: bool) -> None:
        """Save that position. Raises Preempted, after everything is on disk, where the run has to `stop`."""
        ...


def build_training(
    config: CfgNode, plan: Plan, model: TrainableModel, loaders: Loaders, device: torch.device
) -> Training:
    """Optimizer, schedule, scaler, average and loss around a bare model that is already on its device."""
    assert loaders.train is not None
    steps_per_epoch = len(loaders.train) // plan.accumulation
    try:
        check_training(config, model)
        optimizer = build_optimizer(config, model, plan.lr_scale)
        scheduler = build_scheduler(config, plan, optimizer, steps_per_epoch, plan.lr_scale)
        criterion = _build_criterion(config, loaders).to(device)
    except ValueError as problem:
        raise ConfigError(str(problem)) from None
    amp_dtype = autocast_dtype(config.AMP_DTYPE, device) if config.AMP else None
    get_logger().info(
        "global batch %d = %d processes × %d passes × %d samples, learning rate %.3e (%g × %.3e), %d steps an epoch,"
        " %s",
        plan.global_batch,
        plan.world_size,
        plan.accumulation,
        plan.per_process,
        config.TRAIN.BASE_LR * plan.lr_scale,
        plan.lr_scale,
        config.TRAIN.BASE_LR,
        steps_per_epoch,
        str(amp_dtype or torch.float32).removeprefix("torch."),
    )
    if plan.recipe_batch not in (None, plan.global_batch):
        ratio = plan.global_batch / plan.recipe_batch if plan.scales_lr else 1.0
        scaled = "all its learning rates are" if config.TRAIN.SCALE_WARMUP_MIN_LR else "its BASE_LR is"
        get_logger().warning(
            "the recipe has %d images a step (TRAIN.GLOBAL_BATCH), this run %d: %s",
            plan.recipe_batch,
            plan.global_batch,
            f"{scaled} {ratio:.4g} times the recipe's"
            if plan.scales_lr
            else "its learning rates stay those of the configuration (TRAIN.SCALE_LR False)",
        )
    if plan.lr_scale < FAR_BELOW:
        get_logger().warning(
            "TRAIN.BASE_LR %g is for %d images a step: with %d of them the learning rate is %.3e, 1/%.0f of what is"
            " written; TRAIN.SCALE_LR False takes the rates as they are",
            config.TRAIN.BASE_LR,
            REFERENCE_BATCH,
            plan.global_batch,
            config.TRAIN.BASE_LR * plan.lr_scale,
            1 / plan.lr_scale,
        )
    return Training(
        model=model,
        bare_model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        criterion=criterion,
        prepare=loaders.modality.train_batch(config, loaders.num_classes, device, next(model.parameters()).dtype),
        device=device,
        steps_per_epoch=steps_per_epoch,
        plan=plan,
        clip_grad=config.TRAIN.CLIP_GRAD,
        clip_value=config.TRAIN.CLIP_VALUE,
        amp_dtype=amp_dtype,
        scaler=torch.amp.GradScaler(device.type) if amp_dtype == torch.float16 else None,
        ema=_build_average(config, plan, model, steps_per_epoch) if config.EMA.ENABLE else None,
        max_skipped=config.TRAIN.MAX_SKIPPED if config.TRAIN.NON_FINITE == "skip" else None,
    )


def check_training(config: CfgNode, model: TrainableModel) -> None:
    """Freeze what TRAIN.FREEZE names. Raises ValueError where the model cannot be trained as configured."""
    freeze(model, config.TRAIN.FREEZE or ())
    require_optimizer(config.TRAIN.OPTIMIZER.NAME, config.TRAIN.OPTIMIZER.KWARGS)
    if config.TRAIN.LAYER_DECAY < 1:
        layer_groups(model, config.TRAIN.LAYER_DECAY)


def _build_criterion(config: CfgNode, loaders: Loaders) -> nn.Module:
    """The training loss. Raises ValueError for class weights that the data set does not have."""
    smoothing = 0.0 if mixup_enabled(config) else config.MODEL.LABEL_SMOOTHING  # mixup's targets are smoothed already
    given, classes, weights = config.TRAIN.CLASS_WEIGHTS, loaders.num_classes, None
    if given == "balanced":
        counts = loaders.train.class_counts(classes) if loaders.train else None
        if counts is None:
            raise ValueError(
                "TRAIN.CLASS_WEIGHTS balanced needs a data set that knows its labels; give a number a class"
            )
        weights = counts.sum() / (classes * counts.clamp(min=1))
    elif given != "none":
        if len(given) != classes:
            raise ValueError(f"TRAIN.CLASS_WEIGHTS has {len(given)} numbers, the data set {classes} classes")
        weights = torch.tensor(given)
    if config.TRAIN.LOSS == "bce":
        return BinaryCrossEntropy(smoothing, weight=weights)
    return nn.CrossEntropyLoss(weights, label_smoothing=smoothing)


def _build_average(config: CfgNode, plan: Plan, model: TrainableModel, steps_per_epoch: int) -> ModelEmaV3:
    share = plan.global_batch / 512 if config.EMA.DECAY_PER_512 else 1.0
    decay, steps = config.EMA.DECAY**share, plan.last_epoch * steps_per_epoch
    if not config.EMA.WARMUP and (span := 1 / (1 - decay)) > steps:
        get_logger().warning(
            "EMA.DECAY %g averages over about %.0f steps, and the run has %d: the average stays near the first weights;"
            " EMA.WARMUP True, or a decay of at most %.4g, lets it follow",
            config.EMA.DECAY,
            span,
            steps,
            max(0.0, 1 - 10 / steps) ** (1 / share),
        )
    return ModelEmaV3(model, decay=decay, use_warmup=config.EMA.WARMUP)


def place(model: TrainableModel, device: torch.device) -> TrainableModel:
    """Move a model to its device; dense convolutions channels last, as tokens reach and leave them in that order.

    (Their gradients come in that layout too, and DDP's buckets want both alike.)
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return model.to(device)


def wrap(config: CfgNode, training: Training) -> None:
    """Compile and distribute the model that the loop calls; `bare_model` stays what it is, and so do its parameters."""
    if config.TRAIN.SYNC_BN and training.running_statistics():
        if training.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(training.bare_model)
        else:
            get_logger().info("TRAIN.SYNC_BN is left out: PyTorch's SyncBatchNorm trains on GPUs alone")
    if config.COMPILE:
        training.bare_model.compile()  # in place: the module and its names stay what is saved
    if distributed.world_size() > 1:
        # The wrapper is for the loop alone: what is saved and evaluated is the bare model, whose names have no prefix.
        training.model = DistributedDataParallel(
            training.bare_model,
            device_ids=None if training.device.index is None else [training.device.index],
            broadcast_buffers=False,  # derived ones are equal, and running statistics are shared on their own
            gradient_as_bucket_view=True,  # gradients lie in what is sent: no second copy of them, the same bits
            find_unused_parameters=config.TRAIN.FIND_UNUSED_PARAMS,
        )
        training.model._set_ddp_runtime_logging_sample_rate(config.PRINT_FREQ)  # steps between two timed ones
