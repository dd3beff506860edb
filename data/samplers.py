"""Samplers that are pure functions of seed, epoch and rank, so that a resumed run draws what the unbroken one would."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One training sample of one epoch: what its augmentation may depend on, beside the seed of the run."""

    epoch: int
    position: int  # in the data set


class TrainSampler(Sampler[Draw]):
    """A permutation of the data set per epoch, dealt to the ranks in turn; every rank gets the same number.

    The remainder of data set size and world size is left out of that epoch (another one in each).
    """

    def __init__(self, size: int, *, rank: int, world_size: int, seed: int) -> None:
        self.size, self.rank, self.world_size, self.seed = size, rank, world_size, seed
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Iterate over `epoch`, from this rank's sample `start` on: the first ones are skipped without being loaded."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Samples of a whole epoch, wherever it starts."""
        return self.size // self.world_size

    def __iter__(self) -> Iterator[Draw]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        mine = order[: len(self) * self.world_size][self.rank :: self.world_size][self.start :]
        return (Draw(self.epoch, int(index)) for index in mine)


class EvalSampler(Sampler[int]):
    """Every image exactly once over all ranks: shards may differ by one, nothing is padded."""

    def __init__(self, size: int, *, rank: int, world_size: int) -> None:
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
