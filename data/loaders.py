"""Data: `build_loaders` turns a configuration into training and validation batches of uint8 images."""

import itertools
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from torchvision.transforms.functional import get_image_size
from yacs.config import CfgNode

from config import Plan
from data.builders import builder_of
from data.datasets import EvalDataset, Sample, TrainDataset, too_many_unreadable
from data.samplers import EvalSampler, TrainSampler
from data.sources.base import DataError, FractionSource, Modality, Source, UnreadableImage
from data.sources.shards import ShardDataset, ShardEvalDataset, ShardSplit, ShardTrainDataset
from data.transforms import Images, Normalise
from logger import get_logger
from utils import distributed
from utils.devices import PINNING, device_type
from utils.environment import share_of_cores

# Seconds that a loader process goes on after SIGTERM: longer than the run has to save.
STOP_DELAY = int(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", 30)) + 10


class Batch(NamedTuple):
    """What a loader process sends: images uint8 (B, 3, H, W), labels (B,), the names of images that were skipped as
    unreadable, and in evaluation each image's position in the data set and its name."""

    images: Tensor
    labels: Tensor
    unreadable: list[str]
    positions: list[int]
    names: list[str]


class Batches:
    """Iterates (images uint8 (B, 3, H, W), labels (B,)); names and counts this process's unreadable training images.

    With token sequences ids int16 (B, N), or (B, 2, N), take the place of images. `inputs` makes what turns a batch, on
    a device, into a model's input. `relabel` gives the label to deliver for each label of the source. Raises
    DataError when more than the allowed number of files were unreadable in one epoch.
    """

    def __init__(
        self,
        loader: DataLoader,
        max_unreadable: int = 0,
        relabel: Tensor | None = None,
        modality: Modality = Images(),
        inputs: Callable[[torch.device, torch.dtype], Callable[[Tensor], Tensor]] = Normalise,
    ) -> None:
        self.loader = loader
        self.modality, self.inputs = modality, inputs
        self.max_unreadable = max_unreadable
        self.relabel = relabel
        self.unreadable: set[str] = set()  # in this epoch
        self._named: set[str] = set()  # in any epoch: each is logged once

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def num_images(self) -> int:
        """Images of the whole data set, over all processes."""
        dataset = self.loader.dataset
        return dataset.split.num_images if isinstance(dataset, ShardDataset) else len(dataset)  # type: ignore[arg-type]

    def class_counts(self, classes: int) -> Tensor | None:
        """Images of each class of a training set; None for streams, which do not know them."""
        dataset = self.loader.dataset
        if not isinstance(dataset, TrainDataset):
            return None
        return torch.from_numpy(np.bincount(np.asarray(dataset.source.labels), minlength=classes))

    @property
    def is_stream(self) -> bool:
        """Whether the order of an epoch depends on the number of processes and workers, as that of shards does."""
        return isinstance(self.loader.dataset, IterableDataset)

    @property
    def common_batches(self) -> int:
        """Batches that every process has, where the shards' lengths differ by one image."""
        assert self.loader.batch_size is not None
        return self.num_images // distributed.world_size() // self.loader.batch_size

    def sample_names(self, epoch: int, start: int, batches: int) -> list[str]:
        """The files of this process's training batches `start` to `start + batches` of an epoch; none for streams."""
        size, dataset, sampler = self.loader.batch_size, self.loader.dataset, self.loader.sampler
        if not isinstance(dataset, TrainDataset):
            return []
        assert isinstance(sampler, TrainSampler)
        assert size is not None
        sampler.set_epoch(epoch, start * size)
        return [dataset.source.name(draw.position) for draw in itertools.islice(sampler, batches * size)]

    @cached_property
    def sample_sizes(self) -> tuple[list[str], list[int]]:
        """Names, and shorter sides in pixels, of a few training images; of streams and sequences none."""
        dataset = self.loader.dataset
        if not isinstance(dataset, TrainDataset) or self.modality.reads != Images.reads:
            return [], []
        names, sides = [], []
        for index in range(0, len(dataset), max(1, len(dataset) // 8)):
            with suppress(UnreadableImage):
                sides.append(min(get_image_size(dataset.source.load(index))))
                names.append(dataset.source.name(index))
        return names, sides

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Iterate over `epoch`, continuing after this process's first `start` batches of it."""
        self.unreadable.clear()
        assert self.loader.batch_size is not None
        streams = isinstance(self.loader.dataset, IterableDataset)
        order = self.loader.dataset if streams else self.loader.sampler
        order.set_epoch(epoch, start * self.loader.batch_size)  # type: ignore[union-attr]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((batch.images, batch.labels) for batch in self.whole())

    def whole(self) -> Iterator[Batch]:
        """The batches with what belongs to them beside images and labels."""
        batches = iter(self.loader)
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except DataError as error:  # a loader process sends its traceback as the message, which the error ends
                traceback.clear_frames(error.__traceback__)  # or a cycle keeps the loader's processes waiting
                lines = str(error).strip().splitlines()
                raise type(error)(lines[-1].partition(": ")[2] if len(lines) > 1 else lines[0]) from None
            self.unreadable.update(batch.unreadable)
            for name in batch.unreadable:
                if name not in self._named:
                    self._named.add(name)
                    get_logger().warning("unreadable image %d skipped: %s", len(self._named), name)
            self.require_readable(len(self.unreadable))
            yield batch if self.relabel is None else batch._replace(labels=self.relabel[batch.labels])

    def close(self) -> None:
        """End the loader processes that outlive an epoch. Left to the end of the program they would be sent SIGTERM."""
        if self.loader._iterator is not None:
            self.loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
            self.loader._iterator = None

    def require_readable(self, unreadable: int) -> None:
        """Raise DataError when `unreadable` training images, of one process or of all, are more than allowed."""
        if unreadable > self.max_unreadable:
            raise too_many_unreadable(unreadable, self.num_images, self.max_unreadable, self._named)


class Loaders(NamedTuple):
    """`classes` are the class names by label, None where the format stores none; `num_classes` their number.

    `modality` says what the samples are. Where a source has one, `description` says what `val` iterates over, and
    `reference` what simple answers score on it, by name, as fractions.
    """

    train: Batches | None
    val: Batches
    classes: tuple[str, ...] | None
    num_classes: int
    modality: Modality
    description: str = ""
    reference: Mapping[str, float] | None = None

    @property
    def picture(self) -> Path | None:
        """The file of a validation image, where each has one."""
        dataset = self.val.loader.dataset
        file = Path(dataset.source.name(0) if isinstance(dataset, EvalDataset) else "")
        return file if file.is_file() else None

    def close(self) -> None:
        for batches in (self.train, self.val):
            if batches:
                batches.close()


def _collate(samples: list[Sample]) -> Batch:
    # straight into one tensor, in a worker one in shared memory: it is not copied on its way to the main process
    images = default_collate([sample.image for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    unreadable = [name for sample in samples for name in sample.unreadable]
    placed = [sample for sample in samples if sample.position >= 0]
    return Batch(images, labels, unreadable, [s.position for s in placed], [s.name for s in placed])


def _outlive_stop_signals(worker: int) -> None:
    """A loader process that was told to stop with the whole run goes on for a while, so that the run can save."""
    if not hasattr(signal, "alarm"):  # Windows has no signals to outlive
        return
    signal.set_wakeup_fd(-1)  # of the process it was forked from
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(STOP_DELAY))


def _loader_options(config: CfgNode, plan: Plan, *, persistent: bool) -> dict[str, Any]:
    """What training and validation loaders have in common; `persistent` workers survive the end of an epoch."""
    workers = plan.workers
    return {
        "num_workers": workers,
        "prefetch_factor": config.DATA.PREFETCH_FACTOR if workers else None,
        "persistent_workers": persistent and workers > 0,
        "pin_memory": config.DATA.PIN_MEMORY and device_type(config.DEVICE) in PINNING,
        "collate_fn": _collate,
        "worker_init_fn": _outlive_stop_signals,
        "generator": torch.Generator(),  # of its own, so that iterating draws nothing from the run's generator
    }


def evaluation_batches(
    config: CfgNode,
    modality: Modality,
    source: Source | ShardSplit,
    plan: Plan,
    *,
    repeated: bool = False,
    cropped: bool = False,
    relabel: Tensor | None = None,
) -> Batches:
    """This process's share of every sample of a source, each exactly once over all processes.

    Args:
        repeated: evaluated after every epoch, so that keeping the workers saves starting them each time.
        cropped: the images are centre crops already (see evaluation_transform).
        relabel: the label to deliver for each label of the source.
    """
    transform = modality.evaluation_transform(config, plan.image_size, cropped=cropped)
    rank, world_size, batch_size = distributed.rank(), distributed.world_size(), config.DATA.BATCH_SIZE
    dataset: Dataset[Sample]
    sampler: Sampler | None = None
    if isinstance(source, ShardSplit):
        dataset = ShardEvalDataset(source, transform, batch_size=batch_size, rank=rank, world_size=world_size)
    else:
        dataset = EvalDataset(source, transform)
        sampler = EvalSampler(len(source.labels), rank=rank, world_size=world_size)
    loader = DataLoader(
        dataset, batch_size=batch_size, sampler=sampler, **_loader_options(config, plan, persistent=repeated)
    )
    return Batches(loader, relabel=relabel, modality=modality, inputs=partial(modality.inputs, config))


def _build_train(config: CfgNode, modality: Modality, source: Source | ShardSplit, plan: Plan) -> Batches:
    rank, world_size = distributed.rank(), plan.world_size
    size = source.num_images if isinstance(source, ShardSplit) else len(source.labels)
    if size < plan.global_batch:
        key = "DATA.BATCH_SIZE" if config.TRAIN.GLOBAL_BATCH is None else "TRAIN.GLOBAL_BATCH"
        raise DataError(
            f"{size} training images on {world_size} processes are less than one step of"
            f" {plan.accumulation} × {plan.per_process} images; lower {key}"
        )
    samples = None if plan.epoch_steps is None else plan.epoch_steps * plan.accumulation * plan.per_process
    share = config.DATA.MAX_UNREADABLE
    max_unreadable = max(1, int(share * size)) if share > 0 else 0  # a small data set may have one
    transform = modality.training_transform(config, plan.image_size)
    dataset: Dataset[Sample]
    sampler: Sampler | None = None
    if isinstance(source, ShardSplit):
        if samples is not None:
            raise DataError("TRAIN.STEPS needs images that can be read in any order; shards are streamed: set EPOCHS")
        if config.AUG.REPEATS > 1:
            raise DataError("AUG.REPEATS needs images that can be read in any order; shards are streamed: set it to 1")
        dataset = ShardTrainDataset(
            source,
            transform,
            batch_size=plan.per_process,
            rank=rank,
            world_size=world_size,
            seed=config.SEED,
            buffer=config.DATA.SHUFFLE_BUFFER,
            max_unreadable=max_unreadable,
        )
    else:
        dataset = TrainDataset(source, transform, seed=config.SEED, max_unreadable=max_unreadable)
        sampler = TrainSampler(
            size,
            rank=rank,
            world_size=world_size,
            seed=config.SEED,
            samples=samples,
            repeats=config.AUG.REPEATS,
        )
    options = _loader_options(config, plan, persistent=True)
    loader = DataLoader(dataset, batch_size=plan.per_process, sampler=sampler, drop_last=True, **options)
    return Batches(loader, max_unreadable, modality=modality)


def build_loaders(
    config: CfgNode, plan: Plan, *, train: bool = True, trained_on: Sequence[str] | None = None
) -> Loaders:
    """Loaders of this process's share of the data.

    Args:
        plan: of the configuration and the number of processes.
        train: False builds only the loader of what --eval is on; then `train/` need not exist.
        trained_on: then, the names of a model's classes. Where all of the data set's are among them, its labels become
            theirs; else the classes are those of the data set.

    Raises:
        DataError: a data set that is absent, empty, badly laid out, or smaller than one step.
    """
    builder = builder_of(config)
    modality = builder.modality
    modality.require(config)
    _announce_workers(config, plan, 2 if train else 1)
    if not train:
        source = builder.open(config, builder.evaluation_split)
        own = source.classes
        classes = tuple(trained_on or ())
        if not own or not classes or not set(own) - {""} <= set(classes):
            classes = () if own is None or "" in own else own
        relabel = None
        if own and classes and classes != own:
            output = {name: label for label, name in enumerate(classes)}
            relabel = torch.tensor([output.get(name, 0) for name in own])  # labels without a name have no images
        batches = evaluation_batches(config, modality, source, plan, relabel=relabel)
        num_classes = len(classes) or source.num_classes
        return Loaders(None, batches, classes or None, num_classes, modality, *_described(source))
    train_source = builder.open(config, "train")
    val_source = builder.open(config, "val", train_source.classes)
    if config.DATA.TRAIN_FRACTION < 1:
        if isinstance(train_source, ShardSplit):
            raise DataError("DATA.TRAIN_FRACTION needs images that can be read in any order; shards are streamed")
        train_source = FractionSource(train_source, config.DATA.TRAIN_FRACTION)
    _require_same_classes(train_source, val_source)
    if train_source.num_classes == 1:
        get_logger().warning("the training set has one class: there is nothing to tell apart")
    _name_absent_classes(train_source, val_source)
    return Loaders(
        _build_train(config, modality, train_source, plan),
        evaluation_batches(config, modality, val_source, plan, repeated=True),
        train_source.classes,
        train_source.num_classes,
        modality,
        *_described(val_source),
    )


def _announce_workers(config: CfgNode, plan: Plan, loaders: int) -> None:
    """One line on the loader processes that start, of which a core for each is enough; it stands for torch's."""
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    wanted, cores = config.DATA.NUM_WORKERS, share_of_cores()
    if not wanted:
        return
    about = ""
    if wanted > cores:
        fits = f"{cores} {'fits' if cores == 1 else 'fit'} its share of the cores"
        about = f": {fits}, and the default of {wanted} is lowered" if plan.workers < wanted else f", as asked: {fits}"
    get_logger().info(
        "each of the run's %d processes starts %d loader processes%s%s",
        plan.world_size,
        plan.workers,
        " for training and as many for validation" if loaders == 2 else "",
        about,
    )


def _require_same_classes(train: Source | ShardSplit, val: Source | ShardSplit) -> None:
    """Raise DataError where the labels of the two splits do not mean the same."""
    names = enumerate(zip(train.classes or (), val.classes or (), strict=False))
    if differing := [f"{label} is {ours} and {theirs}" for label, (ours, theirs) in names if theirs not in ("", ours)]:
        folders = ", ".join(differing[:5])
        raise DataError(
            f"the labels of training and validation (of zips, train_map.txt and val_map.txt) disagree: {folders}"
        )
    if val.num_classes > train.num_classes:
        raise DataError(
            f"the validation set has labels up to {val.num_classes - 1}, the training set only"
            f" {train.num_classes} classes"
        )


def _name_absent_classes(train: Source | ShardSplit, val: Source | ShardSplit) -> None:
    """Warn of classes without a validation image; what shards hold is not known before they are read."""
    present = range(train.num_classes) if isinstance(val, ShardSplit) else np.unique(val.labels)
    absent = sorted(set(range(train.num_classes)).difference(present))
    if absent:
        names = [train.classes[label] if train.classes else str(label) for label in absent[:5]]
        more = ", …" if len(absent) > 5 else ""
        message = "%d of %d classes have no image in the validation set: %s%s"
        get_logger().warning(message, len(absent), train.num_classes, ", ".join(names), more)


def _described(source: object) -> tuple[str, Mapping[str, float] | None]:
    """What a source says of itself beyond its samples, where it does."""
    return getattr(source, "description", ""), getattr(source, "reference", None)
