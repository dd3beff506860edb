"""Learning rate per optimizer step: linear warm-up, then cosine, linear or step decay, counted from iteration 0.

`step_update(k)` after the optimizer step of iteration k sets the rate of iteration k + 1 (timm's convention).
"""

from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from yacs.config import CfgNode


class LinearLRScheduler(Scheduler):
    """From the base rate at the end of the warm-up straight down to `lr_end` at `t_total`, and there from then on."""

    def __init__(
        self, optimizer: Optimizer, *, t_total: int, lr_end: float, warmup_t: int, warmup_lr_init: float
    ) -> None:
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.t_total, self.lr_end, self.warmup_t, self.warmup_lr_init = t_total, lr_end, warmup_t, warmup_lr_init
        if warmup_t:
            self.update_groups(warmup_lr_init)

    def _get_lr(self, t: int) -> list[float]:
        if t < self.warmup_t:
            share = t / self.warmup_t
            return [self.warmup_lr_init + share * (base - self.warmup_lr_init) for base in self.base_values]
        left = max(0.0, 1 - (t - self.warmup_t) / max(1, self.t_total - self.warmup_t))
        return [self.lr_end + left * (base - self.lr_end) for base in self.base_values]


class FlooredStepLRScheduler(StepLRScheduler):
    """timm's step decay that never falls below `lr_min` after the warm-up."""

    def __init__(self, optimizer: Optimizer, *, lr_min: float, **arguments: float) -> None:
        self.lr_min = lr_min
        super().__init__(optimizer, warmup_prefix=False, t_in_epochs=False, **arguments)  # type: ignore[arg-type]

    def _get_lr(self, t: int) -> list[float]:
        rates = super()._get_lr(t)
        return rates if t < self.warmup_t else [max(rate, self.lr_min) for rate in rates]


def build_scheduler(config: CfgNode, optimizer: Optimizer, steps_per_epoch: int, lr_scale: float = 1.0) -> Scheduler:
    """The schedule of TRAIN.LR_SCHEDULER over an optimizer built with the same `lr_scale`.

    Args:
        steps_per_epoch: optimizer steps, accumulation counted.
        lr_scale: global batch / 512, applied to WARMUP_LR and MIN_LR here and to BASE_LR by the optimizer.
    """
    name = config.TRAIN.LR_SCHEDULER.NAME
    total = config.TRAIN.EPOCHS * steps_per_epoch
    warmup = config.TRAIN.WARMUP_EPOCHS * steps_per_epoch
    warmup_lr, min_lr = config.TRAIN.WARMUP_LR * lr_scale, config.TRAIN.MIN_LR * lr_scale
    if name == "cosine":
        return CosineLRScheduler(
            optimizer, t_initial=total, lr_min=min_lr, warmup_t=warmup, warmup_lr_init=warmup_lr, t_in_epochs=False
        )
    if name == "linear":
        lr_end = max(0.01 * config.TRAIN.BASE_LR * lr_scale, min_lr)
        return LinearLRScheduler(optimizer, t_total=total, lr_end=lr_end, warmup_t=warmup, warmup_lr_init=warmup_lr)
    if name == "step":
        return FlooredStepLRScheduler(
            optimizer,
            lr_min=min_lr,
            decay_t=config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch,
            decay_rate=config.TRAIN.LR_SCHEDULER.DECAY_RATE,
            warmup_t=warmup,
            warmup_lr_init=warmup_lr,
        )
    raise ValueError(f"TRAIN.LR_SCHEDULER.NAME {name!r} is unknown, expected cosine, linear or step")
