"""Samples of a source for training and for evaluation: transform, reproducible randomness, unreadable files."""

import random
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from data.samplers import Draw
from data.sources.base import DataError, Picture, Source, UnreadableImage


class Sample(NamedTuple):
    image: torch.Tensor  # uint8 (3, H, W)
    label: int
    unreadable: tuple[str, ...] = ()  # what was skipped to find it
    position: int = -1  # in the data set; of evaluation only, and so is the name
    name: str = ""


class EvalDataset(Dataset[Sample]):
    """Every image as it is; an unreadable one raises, because a count over fewer images is not the result."""

    def __init__(self, source: Source, transform: Callable[[Picture], torch.Tensor]) -> None:
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> Sample:
        image, label = self.transform(self.source.load(index)), int(self.source.labels[index])
        return Sample(image, label, position=index, name=self.source.name(index))


class TrainDataset(Dataset[Sample]):
    """Augmented images. A sample's randomness is a function of seed and draw alone, whichever worker draws it.

    An unreadable image is replaced by the next readable one and reported in `Sample.unreadable`; more than
    `max_unreadable` in a row raise.
    """

    def __init__(
        self, source: Source, transform: Callable[[Picture], torch.Tensor], *, seed: int, max_unreadable: int
    ) -> None:
        self.source, self.transform, self.seed, self.max_unreadable = source, transform, seed, max_unreadable

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, draw: Draw) -> Sample:
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[Draw]) -> list[Sample]:
        """The samples of a batch, as DataLoader asks for them: the main process's generators are kept once for all."""
        with SampleRandomness(self.seed) as randomness:
            return [self._sample(draw, randomness) for draw in draws]

    def _sample(self, draw: Draw, randomness: "SampleRandomness") -> Sample:
        unreadable: list[str] = []
        index = draw.position
        while True:
            try:
                image = self.source.load(index)
                break
            except UnreadableImage as error:
                unreadable.append(str(error))
                if len(unreadable) > self.max_unreadable:
                    raise too_many_unreadable(len(unreadable), len(self), self.max_unreadable, unreadable) from error
                index = (index + 1) % len(self)
        randomness.start(draw)
        skipped = () if draw.repeat else tuple(unreadable)  # its repeats, on other processes, would count it again
        return Sample(self.transform(image), int(self.source.labels[index]), skipped)


def too_many_unreadable(count: int, size: int, allowed: int, names: Iterable[str]) -> DataError:
    return DataError(
        f"{count} of {size} training images are unreadable, {allowed} are allowed (DATA.MAX_UNREADABLE); for example"
        f" {next(iter(names), 'on another process')}"
    )


class SampleRandomness:
    """Python's, NumPy's and torch's generators seeded for one draw after another (or the one that is given).

    At the end the main process gets its own states back; a worker has no use for them.
    """

    def __init__(self, seed: int, draw: Draw | None = None) -> None:
        self.seed, self.draw = seed, draw

    def __enter__(self) -> "SampleRandomness":
        self.states = None
        if get_worker_info() is None:
            self.states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        if self.draw is not None:
            self.start(self.draw)
        return self

    def start(self, draw: Draw) -> None:
        """Seed for `draw`."""
        words = np.random.SeedSequence(
            (self.seed, draw.epoch, draw.position, *([draw.repeat] if draw.repeat else []))
        ).generate_state(3)
        random.seed(int(words[0]))
        np.random.seed(int(words[1]))
        torch.default_generator.manual_seed(int(words[2]))

    def __exit__(self, *exception: object) -> None:
        if self.states is not None:
            random.setstate(self.states[0])
            np.random.set_state(self.states[1])
            torch.set_rng_state(self.states[2])
