"""Sequences of the Long Range Arena: token ids of fixed length from the cache that tools/prepare_lra.py wrote."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.findings import Report
from data.sources.base import DataError, DatasetBuilder
from data.sources.token_cache import CLOSING_BRACKET, TokenCache, open_cache
from logger import get_logger


class TokenSource:
    """The samples of one split. `load` gives ids int16 (N,), or (2, N) for pairs of documents, filled up with 0.

    Args:
        chosen: positions in the split, all by default.
        shift: what is added to a symbol to make it an id.
        dropped: a symbol that is left out.

    Raises DataError for a document longer than `length`, or ids beyond `vocabulary`.
    """

    def __init__(
        self,
        cache: TokenCache,
        split: str,
        *,
        length: int,
        vocabulary: int,
        shift: int,
        chosen: range | None = None,
        dropped: int | None = None,
    ) -> None:
        manifest = cache.manifest
        if manifest.longest > length:
            raise DataError(
                f"{cache.path}: the longest document has {manifest.longest} tokens, MODEL.LRA.LENGTH is {length}"
            )
        if manifest.symbols + shift > vocabulary:
            raise DataError(
                f"{cache.path}: {manifest.symbols} symbols need ids up to {manifest.symbols + shift - 1},"
                f" MODEL.LRA.VOCABULARY is {vocabulary}; expected at least {manifest.symbols + shift}"
            )
        self._split, self._documents = cache.splits[split], manifest.documents
        self._prefix, self._length, self._shift = f"{cache.path}/{split}/", length, shift
        self._dropped = dropped
        self._chosen = range(len(self._split.labels)) if chosen is None else chosen
        self.labels = np.asarray(self._split.labels)[self._chosen.start : self._chosen.stop]
        self.classes: tuple[str, ...] | None = tuple(manifest.classes)
        self.num_classes = len(manifest.classes)
        self.description = f"{manifest.title}, {split} split"
        self.reference = manifest.baselines.get(split, {})

    def name(self, index: int) -> str:
        return f"{self._prefix}{self._chosen[index]}"

    def load(self, index: int) -> Tensor:
        ids = np.zeros((self._documents, self._length), dtype=np.int16)
        first = self._chosen[index] * self._documents
        for row, document in zip(ids, range(first, first + self._documents), strict=True):
            symbols = self._split.document(document)
            if self._dropped is not None:
                symbols = symbols[symbols != self._dropped]
            row[: len(symbols)] = symbols
            row[: len(symbols)] += self._shift
        return torch.from_numpy(ids[0] if self._documents == 1 else ids)


class Tokens:
    """The modality of token sequences: ids int16 (B, N), or (B, 2, N) for pairs of documents, int32 on the device."""

    reads, noun = "tokens", "samples"
    function_keys: tuple[str, ...] = ("DATA.LRA.BLACK_IS_PADDING", "DATA.LRA.CLOSING_BRACKETS")

    def training_transform(self, config: CfgNode, size: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        return torch.as_tensor

    def evaluation_transform(
        self, config: CfgNode, size: tuple[int, int], *, cropped: bool = False
    ) -> Callable[[Tensor], Tensor]:
        return torch.as_tensor

    def train_batch(
        self, config: CfgNode, num_classes: int, device: torch.device, dtype: torch.dtype
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return lambda ids, labels: (ids.int(), labels)

    def inputs(self, config: CfgNode, device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
        return Tensor.int

    def require(self, config: CfgNode) -> None:
        images_only = {
            "AUG.MIXUP": config.AUG.MIXUP > 0,
            "AUG.CUTMIX": config.AUG.CUTMIX > 0,
            "AUG.REPROB": config.AUG.REPROB > 0,
            "AUG.CUTMIX_MINMAX": config.AUG.CUTMIX_MINMAX is not None,
            "TEST.FLIP": config.TEST.FLIP,
            "TEST.IMG_SIZE": config.TEST.IMG_SIZE is not None,
        }
        if given := [key for key, is_set in images_only.items() if is_set]:
            raise DataError(
                f"{given[0]} is for images; with DATA.DATASET {config.DATA.DATASET} set it to 0, null or False"
            )


def open_tokens(config: CfgNode) -> TokenCache:
    """The cache in DATA_PATH. Raises DataError where it is not one, or one of another task than DATA.LRA.TASK."""
    if not config.DATA.DATA_PATH:
        raise DataError(
            f"no data set: --data-path names the folder that `python tools/prepare_lra.py {config.DATA.LRA.TASK} --out"
            " DIR` wrote"
        )
    cache = open_cache(Path(config.DATA.DATA_PATH))
    if cache.manifest.task != config.DATA.LRA.TASK:
        raise DataError(f"{cache.path} holds the task {cache.manifest.task}, DATA.LRA.TASK is {config.DATA.LRA.TASK}")
    if cache.manifest.documents != config.MODEL.LRA.DOCUMENTS:
        raise DataError(
            f"{cache.path} has {cache.manifest.documents} document(s) a sample, MODEL.LRA.DOCUMENTS is"
            f" {config.MODEL.LRA.DOCUMENTS}"
        )
    return cache


def token_source(config: CfgNode, split: str) -> TokenSource:
    """The samples of train, val or test as a configuration asks for them.

    Text has no validation split: DATA.LRA.HELD_OUT says what stands in for it.
    """
    cache = open_tokens(config)
    manifest = cache.manifest
    chosen, stored = None, split
    if "val" not in cache.splits:
        if config.DATA.LRA.HELD_OUT:
            total = len(cache.splits["train"].labels)
            border = total - manifest.held_out
            chosen = {"train": range(border), "val": range(border, total)}.get(split)
            stored = "train" if split == "val" else split
        elif split == "val":
            stored = "test"
            get_logger().warning(
                "%s has no validation split: validation is on the test set, as in the published protocol, so the best"
                " epoch is chosen by it; DATA.LRA.HELD_OUT True holds out a tenth of training",
                manifest.title,
            )
    shift = 0 if manifest.codec.startswith("grey") and config.DATA.LRA.BLACK_IS_PADDING else 1
    return TokenSource(
        cache,
        stored,
        length=config.MODEL.LRA.LENGTH,
        vocabulary=config.MODEL.LRA.VOCABULARY,
        shift=shift,
        chosen=chosen,
        dropped=CLOSING_BRACKET if manifest.task == "listops" and not config.DATA.LRA.CLOSING_BRACKETS else None,
    )


def check_tokens(config: CfgNode, report: Report) -> None:
    """A token cache: whether it is whole, and what the model is configured for."""
    try:
        cache = open_tokens(config)
        manifest = cache.manifest
        report.facts.append(f"{cache.path}: token cache, {manifest.title}")
        for split, arrays in cache.splits.items():
            sizes = np.bincount(arrays.labels, minlength=len(manifest.classes))
            report.facts.append(
                f"{split}: {len(arrays.labels):,} samples, {len(sizes):,} classes, {sizes.min():,} to {sizes.max():,}"
                " samples a class"
            )
        report.facts.append(f"longest document: {manifest.longest:,} symbols")
        cache.verify()
        token_source(config, "train")  # raises where documents are too long for the model, or symbols too many
    except DataError as error:
        report.error(str(error))


class LongRangeArena(DatasetBuilder):
    """DATA.DATASET lra: the folder of a task, as tools/prepare_lra.py wrote it; --eval is on the test split."""

    name, modality = "lra", Tokens()
    evaluation_split = "test"

    def open(self, config: CfgNode, split: str, classes: tuple[str, ...] | None = None) -> TokenSource:
        return token_source(config, split)

    def check(self, config: CfgNode, report: Report) -> None:
        if not config.DATA.DATA_PATH:
            raise DataError("no data set: --data-path names the folder that tools/prepare_lra.py wrote")
        root = Path(config.DATA.DATA_PATH)
        if not root.is_dir():
            report.error(f"data set folder {root} {'is no folder' if root.exists() else 'does not exist'}")
            return
        check_tokens(config, report)
