"""What the training loop costs beside the model: python -m benchmarks.training_loop

Two questions. How many milliseconds a step of `train_one_epoch` takes longer than a bare loop around the same model,
optimizer and batches, on a model whose step takes about 5 ms. And by how much a checkpoint every 50 steps slows a run
whose steps take 100 ms or more. A gate comes first: both loops leave the same weights, bit for bit.
"""

import copy
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from yacs.config import CfgNode

from benchmarks import common
from benchmarks.common import CPU, Bar, Outcome, Spread, WrongResultError
from config import make_plan
from data.loaders import Batches, Loaders
from data.transforms import Images
from engine.epoch import train_one_epoch
from engine.saving import Checkpointer
from engine.training import Training
from logger import MetricsWriter
from main import build_training
from models import build_model
from utils.checkpoints.writing import CheckpointWriter
from utils.faults.preemption import StopRequest

SMALL = "MODEL.SWIN.EMBED_DIM 8 MODEL.SWIN.DEPTHS [1,1,1,1] MODEL.SWIN.NUM_HEADS [1,2,2,4] DATA.IMG_SIZE 32"
COMMON = "AUG.MIXUP 0.0 AUG.CUTMIX 0.0 AUG.REPROB 0.0 MODEL.DROP_PATH_RATE 0.0 TRAIN.WARMUP_EPOCHS 0 PRINT_FREQ 50"
CHECKPOINT_EVERY = 50
OVERHEAD_BAR_MS = 2.0
CHECKPOINT_BAR = 2.0  # per cent


class FixedBatches(Batches):
    """The same synthetic batch again and again: what loading costs is another benchmark's question."""

    def __init__(self, batch: tuple[Tensor, Tensor], steps: int) -> None:
        self.batch, self.steps = batch, steps
        self.unreadable: set[str] = set()
        self.modality = Images()

    def __len__(self) -> int:
        return self.steps

    @property
    def num_images(self) -> int:
        return self.steps * len(self.batch[0])

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Every epoch is the same."""

    def require_readable(self, unreadable: int) -> None:
        """Nothing is read."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.steps)


def configuration(name: str, options: str, folder: Path) -> CfgNode:
    return common.configuration(name, f"{COMMON} {options}", OUTPUT=folder)


def make_training(config: CfgNode, batch_size: int, steps: int) -> tuple[Training, Loaders]:
    """A run of our loop on one batch, `steps` steps an epoch."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, 3, config.DATA.IMG_SIZE, config.DATA.IMG_SIZE)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    batches = FixedBatches((images, torch.arange(batch_size) % config.MODEL.NUM_CLASSES), steps)
    loaders = Loaders(batches, batches, None, config.MODEL.NUM_CLASSES, Images())
    torch.manual_seed(0)
    return build_training(config, make_plan(config), build_model(config), loaders, CPU), loaders


def bare_loop(training: Training, batches: FixedBatches) -> None:
    """What anybody would write: forward, loss, backward, clipping, update, schedule."""
    training.model.train()
    parameters = [p for group in training.optimizer.param_groups for p in group["params"]]
    assert training.clip_grad is not None
    for step, (images, labels) in enumerate(batches):
        images, targets = training.prepare(images, labels)
        loss = training.criterion(training.model(images), targets)
        training.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_(parameters, training.clip_grad)
        training.optimizer.step()
        training.scheduler.step_update(step)


def measure_overhead(folder: Path, steps: int, repeats: int) -> dict[str, Any]:
    """Seconds per step of both loops. Raises WrongResultError where they leave other weights."""
    config = configuration("pola_swin_t", SMALL, folder)
    ours, loaders = make_training(config, 2, steps)
    bare, _ = make_training(config, 2, steps)
    assert isinstance(loaders.train, FixedBatches)
    batches, silent = loaders.train, MetricsWriter(None)
    first = copy.deepcopy(ours.bare_model.state_dict())
    train_one_epoch(config, ours, batches, 0, silent)
    bare_loop(bare, batches)
    states = ours.bare_model.state_dict(), bare.bare_model.state_dict()
    if not all(torch.equal(states[0][name], states[1][name]) for name in first):
        raise WrongResultError("our loop and the bare one leave other weights")
    if all(torch.equal(states[0][name], first[name]) for name in first):
        raise WrongResultError("neither loop changed a weight")
    calls = {
        "bare": lambda: bare_loop(bare, batches),
        "ours": lambda: train_one_epoch(config, ours, batches, 0, silent),
    }
    samples = common.interleaved_seconds(CPU, calls, repeats)
    milliseconds = {name: [1e3 * each / steps for each in seconds] for name, seconds in samples.items()}
    overhead = [ours - bare for ours, bare in zip(milliseconds["ours"], milliseconds["bare"], strict=True)]
    return {
        "steps": steps,
        "step_ms": {name: Spread.of(values) for name, values in milliseconds.items()},
        "overhead_ms": Spread.of(overhead),
    }


def train_and_save(
    config: CfgNode, training: Training, batches: Batches, saver: Checkpointer, writer: CheckpointWriter
) -> None:
    train_one_epoch(config, training, batches, 0, MetricsWriter(None), saver=saver)
    writer.wait()


def measure_checkpoints(folder: Path, batch_size: int, repeats: int) -> dict[str, Any]:
    """Seconds of 120 steps of Pola-PVT-T with checkpoints after 50 and 100, and without; the last write is waited for.

    The cost of a checkpoint is set against 50 steps.
    """
    steps, contenders = 2 * CHECKPOINT_EVERY + 20, {}
    for name, every in (("without", 0), ("with", CHECKPOINT_EVERY)):
        config = configuration("pola_pvt_t", f"CHECKPOINT.EVERY_STEPS {every} CHECKPOINT.KEEP 1", folder / name)
        training, loaders = make_training(config, batch_size, steps)
        writer = CheckpointWriter(folder / name, 1)
        saver = Checkpointer(config, training, loaders, writer, StopRequest(), lambda: True)
        assert loaders.train is not None

        contenders[name] = partial(train_and_save, config, training, loaders.train, saver, writer)
    samples = common.interleaved_seconds(CPU, contenders, repeats)
    written = list((folder / "with").glob("*.pth"))
    size = sum(path.stat().st_size for path in written) / 2**20
    if len(written) != 1 or list((folder / "without").glob("*.pth")):
        raise WrongResultError(f"expected one checkpoint, found {written}")
    added = [
        (saving - plain) / 2 / (plain / steps * CHECKPOINT_EVERY)
        for saving, plain in zip(samples["with"], samples["without"], strict=True)
    ]
    return {
        "batch_size": batch_size,
        "steps": steps,
        "checkpoint_mib": size,
        "step_ms": {name: Spread.of(values, 1e3 / steps) for name, values in samples.items()},
        "added_share": Spread.of(added),
    }


def measure(options: Namespace) -> Outcome:
    """Both questions, a table of each."""
    checkpoints = None
    with tempfile.TemporaryDirectory() as name:
        overhead = measure_overhead(Path(name), options.steps, options.repeats)
        if options.checkpoint_repeats:
            checkpoints = measure_checkpoints(Path(name), options.batch_size, options.checkpoint_repeats)
    rows = [(f"{name} loop", each.text(digits=2)) for name, each in overhead["step_ms"].items()]
    rows.append(("difference", overhead["overhead_ms"].text(digits=2)))
    common.print_table(f"a small Pola-Swin: {common.SPREAD}", ("", "ms per step"), rows)
    beyond = overhead["overhead_ms"].median
    bars = [Bar("ms per step of our loop beyond a bare one", beyond, OVERHEAD_BAR_MS, "at most")]
    if checkpoints:
        rows = [(f"{name} a checkpoint", each.text()) for name, each in checkpoints["step_ms"].items()]
        rows.append(("added by one every 50 steps, %", checkpoints["added_share"].text(100)))
        title = f"Pola-PVT-T, batch {checkpoints['batch_size']}, {checkpoints['checkpoint_mib']:.0f} MiB"
        common.print_table(f"{title}: {common.SPREAD}", ("", "ms per step"), rows)
        added = 100 * checkpoints["added_share"].median
        bars.append(Bar("% that a checkpoint every 50 steps adds", added, CHECKPOINT_BAR, "at most"))
    return Outcome({"overhead": overhead, "checkpoints": checkpoints}, bars)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = common.argument_parser("training_loop", __doc__, batch_size=1, repeats=9)
    add = parser.add_argument
    add("--steps", type=int, default=100, help="steps of a timed loop of the small model")
    add("--checkpoint-repeats", type=int, default=5, help="timed rounds of Pola-PVT-T; 0: none")
    common.run(parser.parse_args(arguments), measure)


if __name__ == "__main__":
    main()
