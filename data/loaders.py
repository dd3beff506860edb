"""Data: `build_loaders` turns a configuration into training and validation batches of uint8 images."""

import itertools
import os
import signal
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from yacs.config import CfgNode

from config import batch_plan, image_size
from data.datasets import EvalDataset, Sample, TrainDataset, too_many_unreadable
from data.samplers import EvalSampler, TrainSampler
from data.sources.base import DataError, Decoder, FractionSource, Source, decode, require_folder, training_decoder
from data.sources.bundled import FASHION_MNIST, DigitsSource, FashionMnistSource
from data.sources.folder import FolderSource
from data.sources.shards import INDEX_FILE, ShardDataset, ShardEvalDataset, ShardSplit, ShardTrainDataset
from data.sources.tokens import TokenIds, TokenSource, token_source
from data.sources.zip import ZipSource, warm_page_cache
from data.transforms import Normalise, evaluation_transform, training_transform
from logger import get_logger
from utils import distributed

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

    Sequences take the place of images with DATASET lra: ids int16 (B, N), or (B, 2, N). `inputs` makes what turns a
    batch, on a device, into a model's input. `relabel` gives the label to deliver for each label of the source. Raises
    DataError when more than the allowed number of files were unreadable in one epoch.
    """

    def __init__(
        self,
        loader: DataLoader,
        max_unreadable: int = 0,
        relabel: Tensor | None = None,
        inputs: type[Normalise | TokenIds] = Normalise,
    ) -> None:
        self.loader = loader
        self.inputs = inputs
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
            except (
                DataError
            ) as error:  # a loader process sends its traceback as the message: its last line is the error
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
            raise DataError(too_many_unreadable(unreadable, self.num_images, self.max_unreadable, self._named))


class Loaders(NamedTuple):
    """`classes` are the class names by label, None where the format stores none; `num_classes` their number.

    Of sequences `description` says what `val` iterates over, and `reference` what simple answers score on it, by name,
    as fractions.
    """

    train: Batches | None
    val: Batches
    classes: tuple[str, ...] | None
    num_classes: int
    description: str = ""
    reference: Mapping[str, float] | None = None

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
    signal.set_wakeup_fd(-1)  # of the process it was forked from
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(STOP_DELAY))


def data_format(config: CfgNode, root: Path) -> str:
    """folder, zip or shards: what DATA.FORMAT says, or for auto what DATA.ZIP_MODE and the data set's folder say.

    Raises DataError where they contradict each other.
    """
    indexed = (root / INDEX_FILE).is_file()
    if config.DATA.FORMAT == "auto":
        if indexed and config.DATA.ZIP_MODE:
            raise DataError(
                f"{root} holds {INDEX_FILE}, and DATA.ZIP_MODE (--zip) asks for zip files; DATA.FORMAT zip or shards"
                " decides"
            )
        return "shards" if indexed else "zip" if config.DATA.ZIP_MODE else "folder"
    return config.DATA.FORMAT


def build_source(config: CfgNode, split: str, classes: tuple[str, ...] | None = None) -> Source | ShardSplit:
    if config.DATA.DATASET == "digits":
        return DigitsSource(split, image_size(config))
    if config.DATA.DATASET == "fashion_mnist":
        return FashionMnistSource(Path(config.DATA.DATA_PATH or FASHION_MNIST), split, image_size(config))
    if config.DATA.DATASET == "lra":
        return token_source(config, split)
    if not config.DATA.DATA_PATH:
        raise DataError("no data set: --data-path names the folder that holds train/ and val/")
    root = Path(config.DATA.DATA_PATH)
    require_folder(root)
    decoder = training_decoder(config.DATA.DECODER) if split == "train" else decode  # evaluation is exact
    return open_source(config, root, root / split, split, classes, decoder)


def open_source(
    config: CfgNode,
    root: Path,
    folder: Path,
    split: str = "val",
    classes: tuple[str, ...] | None = None,
    decoder: Decoder = decode,
) -> Source | ShardSplit:
    """The images of a split in the format that `data_format` finds in `root`: class folders in `folder`, or zip and
    map file or shards of the split in `root`. Raises DataError."""
    format = data_format(config, root)
    if format == "shards":
        return ShardSplit(root, split)
    if format == "folder":
        return FolderSource(folder, classes, decoder)
    source = ZipSource(root / f"{split}.zip", root / f"{split}_map.txt", decoder)
    local_rank, local_size = distributed.local_rank(), distributed.local_world_size()
    if config.DATA.CACHE_MODE == "full" and local_rank == 0:
        warm_page_cache(source.path)
    elif config.DATA.CACHE_MODE == "part":
        warm_page_cache(source.path, share=local_rank, shares=local_size)
    return source


def _loader_options(config: CfgNode, *, persistent: bool) -> dict[str, Any]:
    """What training and validation loaders have in common; `persistent` workers survive the end of an epoch."""
    workers = config.DATA.NUM_WORKERS
    return {
        "num_workers": workers,
        "prefetch_factor": config.DATA.PREFETCH_FACTOR if workers else None,
        "persistent_workers": persistent and workers > 0,
        "pin_memory": config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        "collate_fn": _collate,
        "worker_init_fn": _outlive_stop_signals,
        "generator": torch.Generator(),  # of its own, so that iterating draws nothing from the run's generator
    }


def evaluation_batches(
    config: CfgNode,
    source: Source | ShardSplit,
    *,
    repeated: bool = False,
    cropped: bool = False,
    relabel: Tensor | None = None,
) -> Batches:
    """This process's share of every image of a source, each exactly once over all processes.

    Args:
        repeated: evaluated after every epoch, so that keeping the workers saves starting them each time.
        cropped: the images are centre crops already (see evaluation_transform).
        relabel: the label to deliver for each label of the source.
    """
    sequences = config.DATA.DATASET == "lra"
    transform = torch.as_tensor if sequences else evaluation_transform(config, cropped=cropped)
    rank, world_size, batch_size = distributed.rank(), distributed.world_size(), config.DATA.BATCH_SIZE
    dataset: Dataset[Sample]
    sampler: Sampler | None = None
    if isinstance(source, ShardSplit):
        dataset = ShardEvalDataset(source, transform, batch_size=batch_size, rank=rank, world_size=world_size)
    else:
        dataset = EvalDataset(source, transform)
        sampler = EvalSampler(len(source.labels), rank=rank, world_size=world_size)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, **_loader_options(config, persistent=repeated))
    return Batches(loader, relabel=relabel, inputs=TokenIds if sequences else Normalise)


def _build_train(config: CfgNode, source: Source | ShardSplit) -> Batches:
    rank, world_size = distributed.rank(), distributed.world_size()
    size = source.num_images if isinstance(source, ShardSplit) else len(source.labels)
    plan = batch_plan(config, world_size)
    if size < plan.global_batch:
        raise DataError(
            f"{size} training images on {world_size} processes are less than one step of"
            f" {plan.accumulation} × {plan.per_process} images; lower DATA.BATCH_SIZE or TRAIN.GLOBAL_BATCH"
        )
    samples = None if config.TRAIN.STEPS is None else config.TRAIN.EVAL_STEPS * plan.accumulation * plan.per_process
    share = config.DATA.MAX_UNREADABLE
    max_unreadable = max(1, int(share * size)) if share > 0 else 0  # a small data set may have one
    dataset: Dataset[Sample]
    sampler: Sampler | None = None
    if isinstance(source, ShardSplit):
        if samples is not None:
            raise DataError("TRAIN.STEPS needs images that can be read in any order; shards are streamed: set EPOCHS")
        dataset = ShardTrainDataset(
            source,
            training_transform(config),
            batch_size=plan.per_process,
            rank=rank,
            world_size=world_size,
            seed=config.SEED,
            buffer=config.DATA.SHUFFLE_BUFFER,
            max_unreadable=max_unreadable,
            decoder=training_decoder(config.DATA.DECODER),
        )
    else:
        transform = torch.as_tensor if config.DATA.DATASET == "lra" else training_transform(config)
        dataset = TrainDataset(source, transform, seed=config.SEED, max_unreadable=max_unreadable)
        sampler = TrainSampler(size, rank=rank, world_size=world_size, seed=config.SEED, samples=samples)
    loader = DataLoader(
        dataset,
        batch_size=plan.per_process,
        sampler=sampler,
        drop_last=True,
        **_loader_options(config, persistent=True),
    )
    return Batches(loader, max_unreadable)


def build_loaders(config: CfgNode, *, train: bool = True) -> Loaders:
    """Loaders of this process's share of the data.

    Args:
        train: False builds only the validation loader; then `train/` need not exist and the classes are those of
            `val/`. For DATASET lra it is the test split, which training never sees.

    Raises:
        DataError: a data set that is absent, empty, badly laid out, or smaller than one step.
    """
    if config.MODEL.SWIN.IN_CHANS != 3:
        raise DataError(f"the image loaders deliver 3 channels, MODEL.SWIN.IN_CHANS is {config.MODEL.SWIN.IN_CHANS}")
    if not train:
        source = build_source(config, "test" if config.DATA.DATASET == "lra" else "val")
        batches = evaluation_batches(config, source)
        return Loaders(None, batches, source.classes, source.num_classes, *_described(source))
    train_source = build_source(config, "train")
    val_source = build_source(config, "val", train_source.classes)
    if config.DATA.TRAIN_FRACTION < 1:
        if isinstance(train_source, ShardSplit):
            raise DataError("DATA.TRAIN_FRACTION needs images that can be read in any order; shards are streamed")
        train_source = FractionSource(train_source, config.DATA.TRAIN_FRACTION)
    if train_source.classes and val_source.classes and val_source.classes != train_source.classes:
        raise DataError(
            "the labels of train_map.txt and val_map.txt disagree: class folders "
            + ", ".join(
                f"{label} is {ours} and {theirs}"
                for label, (ours, theirs) in enumerate(zip(train_source.classes, val_source.classes, strict=False))
                if ours != theirs
            )
        )
    if val_source.num_classes > train_source.num_classes:
        raise DataError(
            f"the validation set has labels up to {val_source.num_classes - 1}, the training set only"
            f" {train_source.num_classes} classes"
        )
    return Loaders(
        _build_train(config, train_source),
        evaluation_batches(config, val_source, repeated=True),
        train_source.classes,
        train_source.num_classes,
        *_described(val_source),
    )


def _described(source: Source | ShardSplit) -> tuple[str, Mapping[str, float] | None]:
    return (source.description, source.reference) if isinstance(source, TokenSource) else ("", None)
