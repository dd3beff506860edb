"""Learning rate per optimizer step: linear warm-up, then cosine, linear or step decay, counted from iteration 0; or one
cycle.

`step_update(k)` after the optimizer step of iteration k sets the rate of iteration k + 1 (timm's convention).
"""

from timm.scheduler import CosineLRScheduler, StepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch.optim import Optimizer
from yacs.config import CfgNode

from config import Plan


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
        super().__init__(optimizer, t_in_epochs=False, **arguments)  # type: ignore[arg-type]

    def _get_lr(self, t: int) -> list[float]:
        rates = super()._get_lr(t)
        return rates if t < self.warmup_t else [max(rate, self.lr_min) for rate in rates]


class EpochCosineLRScheduler(CosineLRScheduler):
    """timm's cosine with one rate for an epoch: that of the schedule, counted in epochs, at the epoch before."""

    def __init__(self, optimizer: Optimizer, *, steps_per_epoch: int, **arguments: float) -> None:
        self.steps_per_epoch = steps_per_epoch
        super().__init__(optimizer, t_in_epochs=False, **arguments)  # type: ignore[arg-type]

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set what iteration `num_updates` + 1 trains with."""
        super().step_update(max(0, (num_updates + 1) // self.steps_per_epoch - 1), metric)


class OneCycleScheduler(Scheduler):
    """torch's OneCycleLR in straight lines with its default ratios, for AdamW, as a function of the step.

    Over the warm-up the rate climbs from 1/25 of the base rate to it, and beta1 falls from 0.95 to 0.85; over the rest
    the rate falls to 1/250,000 of the base rate and beta1 climbs back. (Smith and Topin 2018, arXiv 1708.07120.)
    """

    DIVISOR, FINAL_DIVISOR = 25.0, 1e4
    BETAS = (0.85, 0.95)

    def __init__(self, optimizer: Optimizer, *, t_total: int, warmup_t: int) -> None:
        if len(optimizer.defaults.get("betas", ())) != 2:
            raise ValueError(
                "TRAIN.LR_SCHEDULER.NAME onecycle cycles the first of two decay rates, which TRAIN.OPTIMIZER.NAME"
                f" {type(optimizer).__name__.lower()} does not have; adamw has"
            )
        super().__init__(optimizer, "lr", t_in_epochs=False)
        self.t_total, self.warmup_t = t_total, warmup_t
        self._set(0)

    def _rising(self, t: int) -> tuple[bool, float]:
        """Whether step t belongs to the warm-up, and how much of that phase is behind it."""
        top = self.warmup_t - 1  # the step that has the base rate
        if t < top:
            return True, t / top
        return False, min(1.0, (t - top) / max(1, self.t_total - 1 - top))

    def _get_lr(self, t: int) -> list[float]:
        rising, share = self._rising(t)
        low = 1 / self.DIVISOR if rising else 1 / (self.DIVISOR * self.FINAL_DIVISOR)
        factor = low + share * (1 - low) if rising else 1 - share * (1 - low)
        return [base * factor for base in self.base_values]

    def _set(self, t: int) -> None:
        self.update_groups(self._get_lr(t))
        rising, share = self._rising(t)
        low, high = self.BETAS
        beta1 = high - share * (high - low) if rising else low + share * (high - low)
        for group in self.optimizer.param_groups:
            group["betas"] = (beta1, group["betas"][1])

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        """Set what iteration `num_updates` + 1 trains with."""
        self._set(num_updates + 1)


def build_scheduler(
    config: CfgNode, plan: Plan, optimizer: Optimizer, steps_per_epoch: int, lr_scale: float = 1.0
) -> Scheduler:
    """The schedule of TRAIN.LR_SCHEDULER over an optimizer built with the same `lr_scale`.

    Args:
        steps_per_epoch: optimizer steps, accumulation counted.
        lr_scale: global batch / 512, applied to BASE_LR by the optimizer, and here to WARMUP_LR and MIN_LR unless
            TRAIN.SCALE_WARMUP_MIN_LR says otherwise.
    """
    name = config.TRAIN.LR_SCHEDULER.NAME
    total, warmup = plan.epochs * steps_per_epoch, plan.warmup_steps(steps_per_epoch)
    scale = lr_scale if config.TRAIN.SCALE_WARMUP_MIN_LR else 1.0
    warmup_lr, min_lr = config.TRAIN.WARMUP_LR * scale, config.TRAIN.MIN_LR * scale
    prefix = config.TRAIN.LR_SCHEDULER.WARMUP_PREFIX
    if name == "cosine" and config.TRAIN.LR_SCHEDULER.PER_EPOCH:
        return EpochCosineLRScheduler(
            optimizer,
            steps_per_epoch=steps_per_epoch,
            t_initial=max(1, plan.epochs - (warmup // steps_per_epoch if prefix else 0)),
            lr_min=min_lr,
            warmup_t=warmup // steps_per_epoch,
            warmup_lr_init=warmup_lr,
            warmup_prefix=prefix,
        )
    if name == "cosine":
        return CosineLRScheduler(
            optimizer,
            t_initial=max(1, total - warmup) if prefix else total,
            lr_min=min_lr,
            warmup_t=warmup,
            warmup_lr_init=warmup_lr,
            warmup_prefix=prefix,
            t_in_epochs=False,
        )
    if name == "linear":
        lr_end = max(0.01 * config.TRAIN.BASE_LR * lr_scale, min_lr)
        return LinearLRScheduler(optimizer, t_total=total, lr_end=lr_end, warmup_t=warmup, warmup_lr_init=warmup_lr)
    if name == "onecycle":
        return OneCycleScheduler(optimizer, t_total=total, warmup_t=warmup)
    if name == "step":
        return FlooredStepLRScheduler(
            optimizer,
            lr_min=min_lr,
            decay_t=config.TRAIN.LR_SCHEDULER.DECAY_EPOCHS * steps_per_epoch,
            decay_rate=config.TRAIN.LR_SCHEDULER.DECAY_RATE,
            warmup_prefix=prefix,
            warmup_t=warmup,
            warmup_lr_init=warmup_lr,
        )
    raise ValueError(f"TRAIN.LR_SCHEDULER.NAME {name!r} is unknown, expected cosine, linear, step or onecycle")
