"""Samplers that are pure functions of seed, epoch and rank, so that a resumed run draws what the unbroken one would."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One training sample of one epoch: what its augmentation may depend on, beside the seed of the run."""

    epoch: int
    position: int  # in the data set
    repeat: int = 0  # which of the repetitions of one image


class TrainSampler(Sampler[Draw]):
    """A permutation of the data set per epoch, dealt to the ranks in turn; every rank gets the same number.

    The remainder of data set size and world size is left out of that epoch (another one in each).

    Args:
        samples: of this rank in an epoch, where that is not one pass over the data: passes, each with a permutation of
            its own, then follow each other without remainder, and an epoch takes up where the last one ended. So the
            sequence of samples, all ranks together, is the same for every world size.
        repeats: how often an image follows itself, dealt to different ranks and augmented anew (repeated augmentation,
            Hoffer et al. 2020, arXiv 1901.09335). An epoch is as long as without, so it sees that part of the images.
    """

    def __init__(
        self,
        size: int,
        *,
        rank: int,
        world_size: int,
        seed: int,
        samples: int | None = None,
        repeats: int = 1,
    ) -> None:
        self.size, self.rank, self.world_size, self.seed, self.repeats = size, rank, world_size, seed, repeats
        self.samples = size // world_size if samples is None else samples
        # from the first sample of an epoch to that of the next
        self.stride = size * repeats if samples is None else samples * world_size
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Iterate over `epoch`, from this rank's sample `start` on: the first ones are skipped without being loaded."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        """Samples of a whole epoch, wherever it starts."""
        return self.samples

    def __iter__(self) -> Iterator[Draw]:
        first = self.epoch * self.stride + self.rank
        number, order = -1, np.empty(0, dtype=np.int64)
        for sample in range(self.start, self.samples):
            of_pass, place = divmod(first + sample * self.world_size, self.size * self.repeats)
            if of_pass != number:
                number, order = of_pass, np.random.default_rng((self.seed, of_pass)).permutation(self.size)
            yield Draw(number, int(order[place // self.repeats]), place % self.repeats)


class EvalSampler(Sampler[int]):
    """Every image exactly once over all ranks: shards may differ by one, nothing is padded."""

    def __init__(self, size: int, *, rank: int, world_size: int) -> None:
        self.indices = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
