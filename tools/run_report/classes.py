"""Results by class: accuracy, which classes are taken for which, and a confusion matrix made small enough to look at.

C classes, N images. Confusions are counted sparsely, so that C² numbers are never held.
"""

from dataclasses import dataclass

import numpy as np

from tools.run_report.runs import NOTHING, Predictions


@dataclass(frozen=True)
class ByClass:
    """Images, right ones and right among the guesses, each (C,); and the confusions, most frequent first."""

    images: np.ndarray
    correct: np.ndarray
    among_guesses: np.ndarray
    confused_label: np.ndarray  # (P,) of the pairs that occur
    confused_guess: np.ndarray
    confused_count: np.ndarray

    @property
    def accuracy(self) -> np.ndarray:
        """(C,) in percent, NaN for classes without images."""
        return percent(self.correct, self.images)

    def mostly_taken_for(self) -> dict[int, tuple[int, int]]:
        """Of each class with errors, the wrong class most often guessed and how often."""
        found: dict[int, tuple[int, int]] = {}
        for label, guess, count in zip(
            self.confused_label.tolist(), self.confused_guess.tolist(), self.confused_count.tolist(), strict=True
        ):
            found.setdefault(label, (guess, count))
        return found


def percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(100.0 * part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def by_class(predictions: Predictions) -> ByClass:
    """Count `predictions` by label, and their errors by (label, guess)."""
    C, label, guess = len(predictions.classes), predictions.label, predictions.guesses[:, 0]
    wrong = label != guess
    named = wrong & (guess != NOTHING)
    pairs, counts = np.unique(label[named] * C + guess[named], return_counts=True)
    order = np.lexsort((pairs, -counts))
    return ByClass(
        images=np.bincount(label, minlength=C),
        correct=np.bincount(label[~wrong], minlength=C),
        among_guesses=np.bincount(label[predictions.among_guesses], minlength=C),
        confused_label=pairs[order] // C,
        confused_guess=pairs[order] % C,
        confused_count=counts[order],
    )


def error_blocks(results: ByClass, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """(B, B) errors in percent of the row's images, and the first class of each block (B,): C classes in their order,
    divided into at most `limit` blocks of neighbours."""
    C = len(results.images)
    blocks = min(C, limit)
    first = np.ceil(np.arange(blocks) * C / blocks).astype(int)
    block_of = np.searchsorted(first, np.arange(C), side="right") - 1
    errors = np.zeros((blocks, blocks))
    np.add.at(errors, (block_of[results.confused_label], block_of[results.confused_guess]), results.confused_count)
    images = np.bincount(block_of, weights=results.images, minlength=blocks)
    return 100 * errors / np.maximum(images, 1)[:, None], first
