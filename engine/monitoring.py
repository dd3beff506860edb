"""What rank 0 shows of a run beside its numbers: curves.png, and in TensorBoard what the model gets and learns."""

from pathlib import Path

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.transforms import Normalise
from engine.state import Progress
from engine.training import Training
from logger import MetricsWriter
from models.classifier import Classifier
from models.kernels import Kernel
from utils import distributed
from utils.curves import CurvesInBackground
from utils.environment import record_environment

PICTURES = 8  # inputs that are shown


class InputWatch:
    """Stands in for `prepare` of a training, and keeps the first images that the model is given, on their device.

    The copy is queued like any other operation there: the host never waits for it.
    """

    def __init__(self, training: Training, count: int = PICTURES) -> None:
        self.prepare, self.count = training.prepare, count
        self.kept: Tensor | None = None
        training.prepare = self

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        images, targets = self.prepare(images, labels)
        if self.kept is None:
            self.kept = images[: self.count].detach().clone()
        return images, targets

    def pictures(self) -> Tensor | None:
        """What was kept (B, 3, H, W) with the normalisation undone, 0 to 1; waits for the device."""
        if self.kept is None:
            return None
        normalise = Normalise(self.kept.device, self.kept.dtype)
        return (self.kept * normalise.std + normalise.mean).clamp(0, 1).float().cpu()


def exponents(model: nn.Module) -> dict[str, Tensor]:
    """The exponents of every attention layer whose kernel learns them, by its block's name, (h·d) each.

    Empty where none are learned; waits for the device once.
    """
    found = {
        name.removesuffix(".attn"): exponent.detach().flatten()
        for name, module in model.named_modules()
        if isinstance(module, Kernel) and (exponent := module.exponent()) is not None and exponent.requires_grad
    }
    if not found:
        return {}
    values = torch.cat(list(found.values())).float().cpu()
    return dict(zip(found, values.split([len(each) for each in found.values()]), strict=True))


class Monitor:
    """Told after every epoch; neither a full disk nor a failed drawing ends the run."""

    def __init__(self, training: Training, folder: Path, metrics: MetricsWriter) -> None:
        self.training, self.metrics = training, metrics
        self.curves = CurvesInBackground(folder)
        shows_images = metrics.tensorboard and isinstance(training.bare_model, Classifier)
        self.inputs = InputWatch(training) if shows_images else None

    def epoch_ended(self, epochs: int) -> None:
        """Show the run after `epochs` finished ones: inputs once per start, exponents and, where due, curves always."""
        self.curves.epoch_ended()
        if not self.metrics.tensorboard:
            return
        step = epochs * self.training.steps_per_epoch
        if self.inputs and (pictures := self.inputs.pictures()) is not None:
            self.metrics.write_images("inputs", pictures, step)
            self.training.prepare = self.inputs.prepare  # once is enough: they are large
            self.inputs.kept = None
        named = {f"exponent/{name}": values for name, values in exponents(self.training.bare_model).items()}
        self.metrics.write_histograms(named, step)

    def draw_curves(self) -> Path | None:
        """Draw the curves of the whole run, now; returns where they are."""
        return self.curves.draw()

    def close(self) -> None:
        """End what is being drawn."""
        self.curves.close()


class RunRecord:
    """What a run leaves in its folder beside log and checkpoints: configuration, environment, metrics and curves.

    Rank 0 writes it; on the others everything here does nothing.
    """

    def __init__(self, config: CfgNode, training: Training, progress: Progress) -> None:
        folder, is_main = training.plan.folder, distributed.rank() == 0
        self.metrics = MetricsWriter(
            folder if is_main else None,
            config.TENSORBOARD,
            epoch=progress.epoch,
            step=progress.epoch * training.steps_per_epoch + progress.done,
        )
        self.monitor = None
        if is_main:
            (folder / "config.yaml").write_text(config.dump(), encoding="utf-8")
            record_environment(folder, training.device, training.plan.world_size)
            self.monitor = Monitor(training, folder, self.metrics)

    def epoch_ended(self, epochs: int) -> None:
        """`epochs` are finished."""
        if self.monitor:
            self.monitor.epoch_ended(epochs)

    def close(self) -> None:
        """The run ends, in whatever way."""
        if self.monitor:
            self.monitor.close()
