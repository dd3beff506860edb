"""What rank 0 shows of a run beside its numbers: curves.png, and in TensorBoard what the model gets and learns."""

import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.loaders import Loaders
from data.transforms import TrainBatch
from engine.memory import memory_problem
from engine.profiling import step_profiler
from engine.state import Progress, percent, stored_position
from engine.tracking import Tracking
from engine.training import Training
from logger import MetricsWriter, Sink, get_logger
from models.files import CheckpointError, load_checkpoint
from models.kernels import Kernel
from utils import distributed
from utils.checkpoints.naming import BESTS, run_file
from utils.checkpoints.writing import CheckpointWriter
from utils.curves import CurvesInBackground
from utils.environment import ENVIRONMENT_FILE, environment_with, short_path
from utils.faults.watchdog import Watchdog
from utils.files import write_atomically

PICTURES = 8  # inputs that are shown
PICTURE = "docs/images/polaformer.png"  # one to try commands on, where the data set has no files of its own


class InputWatch:
    """Stands in for `prepare` of a training, and keeps the first images that the model is given, on their device.

    The copy is queued like any other operation there: the host never waits for it.
    """

    def __init__(self, training: Training, count: int = PICTURES) -> None:
        assert isinstance(training.prepare, TrainBatch)
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
        normalise = self.prepare.normalise
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
        shows_images = metrics.tensorboard and isinstance(training.prepare, TrainBatch)
        self.inputs = InputWatch(training) if shows_images else None

    def epoch_ended(self, epochs: int) -> None:
        """Show the run after `epochs` finished ones: inputs once per start, exponents and, where due, curves always."""
        self.curves.epoch_ended()
        if not self.metrics.tensorboard:
            return
        step = epochs * self.training.steps_per_epoch
        if self.inputs and (pictures := self.inputs.pictures()) is not None:
            self.metrics.tensorboard.write_images("inputs", pictures, step)
            self.training.prepare = self.inputs.prepare  # once is enough: they are large
            self.inputs.kept = None
        named = {f"exponent/{name}": values for name, values in exponents(self.training.bare_model).items()}
        self.metrics.tensorboard.write_histograms(named, step)

    def draw_curves(self) -> Path | None:
        """Draw the curves of the whole run, now; returns where they are."""
        return self.curves.draw()

    def close(self) -> None:
        """End what is being drawn."""
        self.curves.close()


def claim(kind: str, top1: float, epochs: int) -> str:
    """An accuracy in percent, and whose it is."""
    weights = "the average of the weights (EMA)" if kind == "ema" else "the model"
    return f"{top1:.3f} % ({weights} after {epochs} {'epoch' if epochs == 1 else 'epochs'})"


def python_command() -> str:
    """How this interpreter is called from here."""
    found = shutil.which("python")
    same = found and os.path.realpath(found) == os.path.realpath(sys.executable)
    return "python" if same else short_path(sys.executable)


class BestWeights(NamedTuple):
    """What a file of best weights says of itself: the `kind` (model, ema) that is best there, its top-1 in percent."""

    kind: str
    top1: float
    epoch: int
    path: Path

    def __str__(self) -> str:
        return claim(self.kind, self.top1, self.epoch)


def best_weights(folder: Path) -> list[BestWeights]:
    """Those whose files in a run folder are there and whole: what can be evaluated again."""
    found = []
    for kind, best in BESTS.items():
        if (path := folder / best.file).is_file():
            try:
                checkpoint = load_checkpoint(path)
                found.append(BestWeights(kind, percent(checkpoint, best.key), stored_position(checkpoint).epoch, path))
            except (CheckpointError, OSError) as problem:
                get_logger().warning("%s cannot be used: %s", path, problem)
    return found


class RunFiles:
    """What a run leaves in its folder beside log and checkpoints: configuration, environment, metrics and curves.

    Rank 0 writes it; on the others everything here does nothing.
    """

    def __init__(
        self, config: CfgNode, training: Training, progress: Progress, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` raises OSError where nothing may be written into the folder."""
        self.folder, is_main = training.plan.folder, distributed.rank() == 0
        self.epochs, self.last_epoch = progress.epoch, training.plan.last_epoch
        continues = progress > Progress(config.TRAIN.START_EPOCH)
        tracked = is_main and config.TRACKER != "none"
        self.tracking = Tracking(config, self.folder, continues=continues) if tracked else None
        self.metrics = MetricsWriter(
            self.folder if is_main else None,
            config.TENSORBOARD,
            epoch=progress.epoch,
            step=progress.epoch * training.steps_per_epoch + progress.done,
            check=check,
            **({"follow": self.tracking.log} if self.tracking else {}),
        )
        self.monitor, self._about = None, dict[str, Sink]()
        if is_main:
            about = {
                "config.yaml": config.dump().encode(errors="backslashreplace"),
                ENVIRONMENT_FILE: environment_with(self.folder, training.device, training.plan.world_size),
            }

            def write(name: str) -> None:
                check()
                write_atomically(self.folder / name, about[name])

            self._about = {name: Sink(str(self.folder / name), write) for name in about}
            for name, sink in self._about.items():
                sink.put(name)
            self.monitor = Monitor(training, self.folder, self.metrics)

    def restore(self) -> None:
        """Write what is known of the run into a folder that is made anew."""
        self.metrics.restore()
        self._complete()

    def _complete(self) -> None:
        for name, sink in self._about.items():
            if (self.folder / name).exists():
                sink.flush()
            else:
                sink.drop()
                sink.put(name)

    def epoch_ended(self, epochs: int) -> None:
        """`epochs` are finished."""
        self.epochs = epochs
        self._complete()
        if self.metrics.best:
            kind, (top1, when) = max(self.metrics.best.items(), key=lambda each: each[1][0])
            get_logger().info("best so far: %s", claim(kind, top1, when))
        if self.monitor:
            self.monitor.epoch_ended(epochs)

    def summarise(self, progress: Progress, loaders: Loaders, main_file: str) -> None:
        """Draw the curves of the whole run; say where it lies, how good it is, and what can be done with it."""
        if self.monitor is None:
            return
        logger, folder = get_logger(), self.folder
        logger.info("drawing the curves")
        curves = self.monitor.draw_curves()
        held = best_weights(folder)
        best = max(held, key=lambda each: each.top1, default=None)  # of equals the model's
        logger.info("run folder: %s", short_path(folder))
        if best:
            others = "".join(f"; {each}" for each in held if each is not best)
            logger.info("best top-1: %s%s", best, others)
        else:
            logger.warning("the run folder holds no best weights that can be read")
        if curves:
            logger.info("curves: %s", short_path(curves))
        checkpoint = short_path(best.path if best else run_file(folder, progress.position))
        averaged = best is not None and best.kind == "ema"
        python, home = python_command(), Path(main_file).parent

        def say(what: str, script: str, *words: str) -> None:
            logger.info("%s: %s", what, shlex.join([python, short_path(home / script), *words]))

        weights = ["--opts", "MODEL.WEIGHTS", "ema"] if averaged else []
        say("evaluate it with", "main.py", "--eval", "--resume", checkpoint, *weights)
        say("report", "tools/report.py", short_path(folder))
        if loaders.modality.noun != "images":
            return
        picture = short_path(loaders.picture or home / PICTURE)
        chosen = ["--checkpoint", checkpoint, *(["--ema"] if averaged else [])]
        say("predict", "tools/predict.py", picture, *chosen)
        if any(isinstance(module, Kernel) for module in self.monitor.training.bare_model.modules()):
            say("attention maps", "tools/visualize_attention.py", picture, *chosen)

    def close(self) -> None:
        """The loop ends, in whatever way."""
        self.metrics.close()
        self._complete()
        if self.monitor:
            self.monitor.close()
        if self.tracking:
            report = {"folder": str(self.folder), "epochs": self.epochs, "finished": self.epochs >= self.last_epoch}
            for kind, (top1, epochs) in self.metrics.best.items():
                report |= {f"best/{kind}/top1": top1, f"best/{kind}/epochs": epochs}
            self.tracking.finish(report)


@contextmanager
def watched(
    config: CfgNode,
    training: Training,
    loaders: Loaders,
    record: RunFiles,
    writer: CheckpointWriter | None,
    watchdog: Watchdog,
    expected: tuple[type[Exception], ...],
) -> Iterator[None]:
    """Around the loop: a watchdog that ends a run which stands still, the profiler, and what has to be closed after.

    Errors that are not `expected`, and may come from a process that is gone, the watchdog explains.
    """
    training.beat = watchdog.beat
    if writer:
        writer.waiting = watchdog.go_on
    training.profiler = step_profiler(config, training.plan.folder)
    try:
        with watchdog.watching(), training.profiler or nullcontext():
            try:
                yield
            except RuntimeError as error:  # a collective that failed says little: the watchdog knows who is gone
                if not isinstance(error, expected) and not memory_problem(error):
                    watchdog.explain(error)
                raise
    finally:
        loaders.close()
        record.close()
