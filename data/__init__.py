"""Data: `build_loaders` turns a configuration into training and validation batches of uint8 images."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from yacs.config import CfgNode

from config import image_size
from data.datasets import (
    DataError,
    DigitsSource,
    EvalDataset,
    FolderSource,
    Sample,
    Source,
    TrainDataset,
    ZipSource,
    decode,
    require_folder,
    too_many_unreadable,
    training_decoder,
    warm_page_cache,
)
from data.samplers import EvalSampler, TrainSampler
from data.transforms import evaluation_transform, training_transform
from logger import get_logger
from utils import distributed


class Batches:
    """Iterates (images uint8 (B, 3, H, W), labels (B,)); names and counts this process's unreadable training images.

    Raises DataError when more than the allowed number of files were unreadable in one epoch.
    """

    def __init__(self, loader: DataLoader, max_unreadable: int = 0) -> None:
        self.loader = loader
        self.max_unreadable = max_unreadable
        self.unreadable: set[str] = set()  # in this epoch
        self._named: set[str] = set()  # in any epoch: each is logged once

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def num_images(self) -> int:
        """Images of the whole data set, over all processes."""
        return len(self.loader.dataset)  # type: ignore[arg-type]

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Iterate over `epoch`, continuing after this process's first `start` batches of it."""
        self.unreadable.clear()
        assert self.loader.batch_size is not None
        self.loader.sampler.set_epoch(epoch, start * self.loader.batch_size)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = iter(self.loader)
        while True:
            try:
                images, labels, unreadable = next(batches)
            except StopIteration:
                return
            except (
                DataError
            ) as error:  # a loader process sends its traceback as the message: its last line is the error
                lines = str(error).strip().splitlines()
                raise type(error)(lines[-1].partition(": ")[2] if len(lines) > 1 else lines[0]) from None
            self.unreadable.update(unreadable)
            for name in unreadable:
                if name not in self._named:
                    self._named.add(name)
                    get_logger().warning("unreadable image %d skipped: %s", len(self._named), name)
            self.require_readable(len(self.unreadable))
            yield images, labels

    def require_readable(self, unreadable: int) -> None:
        """Raise DataError when `unreadable` training images, of one process or of all, are more than allowed."""
        if unreadable > self.max_unreadable:
            raise DataError(too_many_unreadable(unreadable, self.num_images, self.max_unreadable, self._named))


class Loaders(NamedTuple):
    """`classes` are the class names by label, None where the format stores none; `num_classes` their number."""

    train: Batches | None
    val: Batches
    classes: tuple[str, ...] | None
    num_classes: int


def _collate(samples: list[Sample]) -> tuple[Tensor, Tensor, list[str]]:
    # straight into one tensor, in a worker one in shared memory: it is not copied on its way to the main process
    images = default_collate([sample.image for sample in samples])
    labels = torch.tensor([sample.label for sample in samples])
    return images, labels, [name for sample in samples for name in sample.unreadable]


def _build_source(config: CfgNode, split: str, classes: tuple[str, ...] | None = None) -> Source:
    if config.DATA.DATASET == "digits":
        return DigitsSource(split, image_size(config))
    if not config.DATA.DATA_PATH:
        raise DataError("no data set: --data-path names the folder that holds train/ and val/")
    root = Path(config.DATA.DATA_PATH)
    require_folder(root)
    decoder = training_decoder(config.DATA.DECODER) if split == "train" else decode  # evaluation is exact
    if not config.DATA.ZIP_MODE:
        return FolderSource(root / split, classes, decoder)
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
        "batch_size": config.DATA.BATCH_SIZE,
        "num_workers": workers,
        "prefetch_factor": config.DATA.PREFETCH_FACTOR if workers else None,
        "persistent_workers": persistent and workers > 0,
        "pin_memory": config.DATA.PIN_MEMORY and torch.cuda.is_available(),
        "collate_fn": _collate,
        "generator": torch.Generator(),  # of its own, so that iterating draws nothing from the run's generator
    }


def _build_val(config: CfgNode, source: Source, *, repeated: bool) -> Batches:
    """`repeated`: evaluated after every epoch, so that keeping the workers saves starting them each time."""
    loader = DataLoader(
        EvalDataset(source, evaluation_transform(config)),
        sampler=EvalSampler(len(source.labels), rank=distributed.rank(), world_size=distributed.world_size()),
        **_loader_options(config, persistent=repeated),
    )
    return Batches(loader)


def _build_train(config: CfgNode, source: Source) -> Batches:
    size, world_size = len(source.labels), distributed.world_size()
    if size // world_size < config.DATA.BATCH_SIZE * config.TRAIN.ACCUMULATION_STEPS:
        raise DataError(
            f"{size} training images on {world_size} processes are less than one step of"
            f" {config.TRAIN.ACCUMULATION_STEPS} × {config.DATA.BATCH_SIZE} images; lower DATA.BATCH_SIZE"
        )
    share = config.DATA.MAX_UNREADABLE
    max_unreadable = max(1, int(share * size)) if share > 0 else 0  # a small data set may have one
    loader = DataLoader(
        TrainDataset(source, training_transform(config), seed=config.SEED, max_unreadable=max_unreadable),
        sampler=TrainSampler(size, rank=distributed.rank(), world_size=world_size, seed=config.SEED),
        drop_last=True,
        **_loader_options(config, persistent=True),
    )
    return Batches(loader, max_unreadable)


def build_loaders(config: CfgNode, *, train: bool = True) -> Loaders:
    """Loaders of this process's share of the data.

    Args:
        train: False builds only the validation loader; then `train/` need not exist and the classes are those of
            `val/`.

    Raises:
        DataError: a data set that is absent, empty, badly laid out, or smaller than one step.
    """
    if config.MODEL.SWIN.IN_CHANS != 3:
        raise DataError(f"the image loaders deliver 3 channels, MODEL.SWIN.IN_CHANS is {config.MODEL.SWIN.IN_CHANS}")
    if not train:
        source = _build_source(config, "val")
        return Loaders(None, _build_val(config, source, repeated=False), source.classes, source.num_classes)
    train_source = _build_source(config, "train")
    val_source = _build_source(config, "val", train_source.classes)
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
        _build_val(config, val_source, repeated=True),
        train_source.classes,
        train_source.num_classes,
    )
