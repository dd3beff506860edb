"""Results by class: accuracy, which classes are taken for which, and a confusion matrix made small enough to look at.

C classes, N images. Confusions are counted sparsely, so that C² numbers are never held.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.imagenet import are_wordnet_ids, class_words
from utils.predictions import NOTHING, Predictions, f1_by_class


@dataclass(frozen=True, eq=False)
class ByClass:
    """Images by label, right ones, right among the best, and those taken for each class, all (C,); the confusions as
    (label, guess, images)."""

    names: list[str]
    images: np.ndarray
    correct: np.ndarray
    among_best: np.ndarray
    answers: np.ndarray
    confusions: list[tuple[int, int, int]]  # the most frequent first
    nothing: int  # images without a finite output, which are in no confusion

    @property
    def accuracy(self) -> np.ndarray:
        """(C,) in percent, NaN for classes without images."""
        return np.divide(100.0 * self.correct, self.images, out=np.full(len(self.names), np.nan), where=self.images > 0)

    @property
    def f1(self) -> np.ndarray:
        """(C,) in percent, NaN for classes that are no label and no answer."""
        return 100 * f1_by_class(self.images, self.correct, self.answers)

    @property
    def macro_f1(self) -> float:
        """Percent."""
        return float(np.nanmean(self.f1))

    @property
    def worst_first(self) -> np.ndarray:
        """The classes that have images; of equally accurate ones the larger first."""
        present = np.flatnonzero(self.images)
        return present[np.lexsort((present, -self.images[present], self.accuracy[present]))]

    def mostly_taken_for(self) -> dict[int, tuple[int, int]]:
        """Of each class with errors, the wrong class most often guessed and how often."""
        return {label: (guess, count) for label, guess, count in reversed(self.confusions)}

    def error_blocks(self, limit: int) -> tuple[np.ndarray, int]:
        """(B, B) errors between blocks of neighbouring classes, in percent of the row's images, and a block's size.

        The classes are divided in their order into at most `limit` blocks.
        """
        size = -(-len(self.names) // limit)
        images = np.add.reduceat(self.images, np.arange(0, len(self.names), size))
        label, guess, count = np.array(self.confusions, dtype=int).reshape(-1, 3).T
        errors = np.zeros((len(images), len(images)))
        np.add.at(errors, (label // size, guess // size), count)
        return 100 * errors / np.maximum(images, 1)[:, None], size


def by_class(predictions: Predictions) -> ByClass:
    """Count `predictions` by label, and their errors by (label, guess)."""
    C, label, guess = len(predictions.classes), predictions.label, predictions.top5[:, 0]
    named = (label != guess) & (guess != NOTHING)
    counts = Counter(zip(label[named].tolist(), guess[named].tolist(), strict=True))
    return ByClass(
        names=readable_classes(predictions.classes),
        images=np.bincount(label, minlength=C),
        correct=np.bincount(label[label == guess], minlength=C),
        among_best=np.bincount(label[predictions.correct(predictions.top5.shape[1])], minlength=C),
        answers=predictions.answers(C),
        confusions=[(*pair, n) for pair, n in sorted(counts.items(), key=lambda item: (-item[1], item[0]))],
        nothing=int((guess == NOTHING).sum()),
    )


def readable_classes(names: Sequence[str]) -> list[str]:
    """WordNet ids with the word that ImageNet has for them, `tench (n01440764)`; other names as they are."""
    if not are_wordnet_ids(names):
        return list(names)
    words = class_words()
    return [f"{words[name].partition(',')[0]} ({name})" if name in words else name for name in names]
