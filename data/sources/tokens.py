"""Sequences of the Long Range Arena: token ids of fixed length from the cache that tools/prepare_lra.py wrote."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from yacs.config import CfgNode

from data.sources.base import DataError
from data.sources.token_cache import TokenCache, open_cache
from logger import get_logger


class TokenSource:
    """The samples of one split. `load` gives ids int16 (N,), or (2, N) for pairs of documents, filled up with 0.

    Args:
        chosen: positions in the split, all by default.
        shift: what is added to a symbol to make it an id.

    Raises:
        DataError: a document longer than `length`, or ids beyond `vocabulary`.
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
            row[: len(symbols)] = symbols
            row[: len(symbols)] += self._shift
        return torch.from_numpy(ids[0] if self._documents == 1 else ids)


class TokenIds:
    """What a batch of a token source becomes on the device: ids as the embedding takes them."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """The arguments are those of data.transforms.Normalise; ids need neither."""

    def __call__(self, ids: Tensor) -> Tensor:
        return ids.int()


class TokenBatch:
    """ids and labels to the model's input and target."""

    def __call__(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return ids.int(), labels


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
    )
