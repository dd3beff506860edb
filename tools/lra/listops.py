"""ListOps: trees of MIN, MAX, MED and SM over digits, the text they are stored as, and their values.

After Nangia and Bowman 2018 (arXiv 1804.06028) with Long Range Arena's parameters (Tay et al. 2021, arXiv 2011.04006).

    [MAX 4 3 [MIN 2 3 ] 1 ]                                               symbols, 10 of them; the value is 4
    ( ( ( ( ( [MAX 4 ) 3 ) ( ( ( [MIN 2 ) 3 ) ] ) ) 1 ) ] )               as files have it: pairs, nested to the left
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

VERSION = 1  # of what a seed gives: raised when samples of the same seed change
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = (*map(str, range(10)), *OPERATORS, "]")  # a symbol's place is its number in the token cache
FIRST_OPERATOR, CLOSE = 10, 14
OPERATOR_SHARE = 0.25  # of the nodes above the largest depth
CHUNK = 500  # samples that are drawn from one generator
ROOTS = 8192  # trees that are drawn side by side; one in twelve has a length between 500 and 2000
TRIES = 20_000  # trees per sample, before its length counts as out of reach


class Unreachable(ValueError):
    """Parameters that hardly any tree meets."""


@dataclass(frozen=True)
class Parameters:
    """Samples have more than `min_length` and fewer than `max_length` symbols, operators 2 to `max_args` arguments, and
    the root is at depth 1 of `max_depth`."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def require_reachable(self) -> None:
        """Raise Unreachable where no tree has a length in the window."""
        longest = 1
        for _ in range(self.max_depth - 1):
            longest = min(2 + self.max_args * longest, self.max_length)
        if self.max_length - self.min_length < 2 or longest <= self.min_length:
            raise Unreachable(
                f"no tree of depth {self.max_depth} with up to {self.max_args} arguments has more than"
                f" {self.min_length} and fewer than {self.max_length} symbols"
            )


# -- Values


def apply(operator: int, values: Sequence[int]) -> int:
    """The value of an operator, by its symbol's number; MED is the median, halves cut off, and SM the sum modulo 10."""
    if operator == FIRST_OPERATOR:
        return min(values)
    if operator == FIRST_OPERATOR + 1:
        return max(values)
    if operator == FIRST_OPERATOR + 2:
        ordered, middle = sorted(values), len(values) // 2
        return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return sum(values) % 10


def _close(stack: list[tuple[int, list[int]]], place: int, levels: int | None) -> int | None:
    """The value of the innermost operator, taken off the stack; None for one whose arguments were all left out."""
    if not stack:
        raise ValueError(f"symbol {place + 1} closes an operator that was never opened")
    operator, values = stack.pop()
    if not values and levels is None:
        raise ValueError(f"the operator that symbol {place + 1} closes has no arguments")
    return apply(operator, values) if values else None


def evaluate(symbols: Sequence[int], levels: int | None = None) -> int | None:
    """The value of a sample. With `levels`, operators deeper than that, the root being at 1, are left out with all they
    hold; None where nothing is left to apply the root to.

    Raises ValueError where the symbols are no complete tree.
    """
    stack: list[tuple[int, list[int]]] = []
    skipped, last = 0, len(symbols) - 1
    for place, symbol in enumerate(symbols):
        value: int | None
        if symbol < FIRST_OPERATOR:
            value = symbol
        elif symbol < CLOSE:
            if skipped or len(stack) == levels:
                skipped += 1
            else:
                stack.append((symbol, []))
            continue
        elif skipped:
            skipped -= 1
            continue
        else:
            value = _close(stack, place, levels)
        if skipped:
            continue
        if not stack:
            if place < last:
                raise ValueError(f"the tree ends at symbol {place + 1} of {last + 1}")
            return value
        if value is not None:
            stack[-1][1].append(value)
    raise ValueError(f"{len(stack) + skipped} operators are not closed")


# -- Drawing trees

# A tree is written down as one byte per symbol: a digit, CLOSE, or an operator together with its number of arguments,
# which its text needs: ARITY + 4 × (arguments − 2) + operator.
ARITY = CLOSE + 1
MOST_ARGS = 2 + (255 - ARITY) // 4


def _text(code: int) -> str:
    """A symbol, and the parentheses that go with it: every argument and every CLOSE ends a pair."""
    if code < FIRST_OPERATOR:
        return f"{code} ) "
    if code == CLOSE:
        return "] ) ) "  # the operator's last pair, and that of the argument which the operator is
    return "( " * (3 + (code - ARITY) // 4) + f"{OPERATORS[(code - ARITY) % 4]} "


TO_TEXT = {code: _text(code) for code in (*range(10), *range(CLOSE, 256))}


def source_text(codes: bytes) -> str:
    """A tree as the Source column has it."""
    text = "".join([TO_TEXT[code] for code in codes])
    return text[: -len(" ) ")]  # the root is nobody's argument


class _Level(NamedTuple):
    """The nodes of one depth of many trees, each operator's arguments side by side and in its order."""

    tree: np.ndarray  # of each node: which tree
    is_operator: np.ndarray  # of each node
    arity: np.ndarray  # of each operator: its number of arguments, which are at the next level


def draw_chunk(parameters: Parameters, seed: int, number: int) -> list[tuple[bytes, int]]:
    """The trees of one chunk, as codes, with their values. A function of its arguments; raises Unreachable."""
    generator = np.random.default_rng([seed, number])
    found: list[tuple[bytes, int]] = []
    drawn = 0
    while len(found) < CHUNK:
        if drawn > TRIES * (len(found) + 1):
            raise Unreachable(
                f"fewer than one tree in {TRIES:,} has more than {parameters.min_length} and fewer than"
                f" {parameters.max_length} symbols; other lengths, a larger depth or more arguments are needed"
            )
        found += _fill(_draw_shapes(parameters, generator), generator)
        drawn += ROOTS
    return found[:CHUNK]


def _draw_shapes(parameters: Parameters, generator: np.random.Generator) -> list[_Level]:
    """Trees without their digits and kinds of operators, level by level; of ROOTS, those with a length in the window.

    A tree that has outgrown the window is not grown on.
    """
    size = np.zeros(ROOTS, dtype=np.int64)  # symbols: one of a digit, two of an operator
    tree, levels = np.arange(ROOTS), []
    for depth in range(1, parameters.max_depth + 1):
        is_operator = generator.random(len(tree)) <= OPERATOR_SHARE
        is_operator &= depth < parameters.max_depth
        size += np.bincount(tree, minlength=ROOTS) + np.bincount(tree[is_operator], minlength=ROOTS)
        is_operator &= size[tree] < parameters.max_length
        arity = 2 + (generator.random(int(is_operator.sum())) * (parameters.max_args - 1)).astype(np.int64)
        levels.append(_Level(tree, is_operator, arity))
        tree = np.repeat(tree[is_operator], arity)
    chosen = (parameters.min_length < size) & (size < parameters.max_length)
    return [
        _Level(tree[kept := chosen[tree]], is_operator[kept], arity[chosen[tree[is_operator]]])
        for tree, is_operator, arity in levels
    ]


def _fill(levels: list[_Level], generator: np.random.Generator) -> list[tuple[bytes, int]]:
    """Give trees their digits and kinds of operators; returns codes and value of each."""
    nothing = np.zeros(0, dtype=np.int64)
    sizes, values, codes = [nothing], [nothing], []  # of the nodes of each level, the deepest first
    for level in reversed(levels):
        value = (generator.random(len(level.tree)) * 10).astype(np.int64)  # of the digits; operators get theirs below
        kind = (generator.random(len(level.arity)) * 4).astype(np.int64)
        code, size = value.copy(), np.ones_like(value)
        if len(kind):
            code[level.is_operator] = ARITY + 4 * (level.arity - 2) + kind
            size[level.is_operator] = 2 + np.add.reduceat(sizes[-1], _starts(level.arity))
            value[level.is_operator] = _apply_all(kind, level.arity, values[-1])
        sizes.append(size)
        values.append(value)
        codes.append(code)
    ends = np.cumsum(sizes[-1])
    text = np.full(ends[-1] if len(ends) else 0, CLOSE, dtype=np.uint8)  # an operator's end is what nothing else takes
    place = ends - sizes[-1]  # of the nodes of a level
    for level, code, inner in zip(levels, reversed(codes), reversed(sizes[:-1]), strict=True):
        text[place] = code
        before = np.cumsum(inner) - inner  # symbols of all nodes at the next level that come earlier
        first = np.repeat(place[level.is_operator] + 1 - before[_starts(level.arity)], level.arity)
        place = first + before
    return [(text[a:b].tobytes(), int(v)) for a, b, v in zip(ends - sizes[-1], ends, values[-1], strict=True)]


def _starts(arity: np.ndarray) -> np.ndarray:
    """Where the arguments of each operator begin among all arguments."""
    return np.cumsum(arity) - arity


def _apply_all(kind: np.ndarray, arity: np.ndarray, arguments: np.ndarray) -> np.ndarray:
    """`apply` for many operators at once; `arguments` holds those of the first, of the second, and so on."""
    starts = _starts(arity)
    ordered = arguments[np.lexsort((arguments, np.repeat(np.arange(len(arity)), arity)))]
    results = (
        ordered[starts],
        ordered[starts + arity - 1],
        (ordered[starts + (arity - 1) // 2] + ordered[starts + arity // 2]) // 2,
        np.add.reduceat(arguments, starts) % 10,
    )
    return np.choose(kind, results)


# -- Reference answers

LEVELS = range(1, 6)


@dataclass(frozen=True)
class Constants:
    """The most frequent label, of all samples and of those with the same first symbol."""

    overall: int
    by_first: dict[int, int]

    @classmethod
    def fit(cls, first: np.ndarray, labels: np.ndarray) -> "Constants":
        """From the first symbol and the label of every training sample."""
        by_first = {int(s): int(np.bincount(labels[first == s]).argmax()) for s in np.unique(first)}
        return cls(int(np.bincount(labels).argmax()), by_first)


def baselines(documents: Sequence[np.ndarray], labels: np.ndarray, constants: Constants) -> dict[str, float]:
    """Accuracies of answers that need no learning, or hardly any.

    Where ignoring the operators below a level leaves nothing to apply the root to, the answer is its constant.
    """
    symbols = [document.tolist() for document in documents]
    expected = labels.tolist()
    by_root = [constants.by_first.get(s[0], constants.overall) for s in symbols]
    answers = {"majority class": [constants.overall] * len(symbols), "best constant per root operator": by_root}
    for levels in LEVELS:
        values = [evaluate(s, levels) for s in symbols]
        answers[f"operators to depth {levels}"] = [
            constant if value is None else value for value, constant in zip(values, by_root, strict=True)
        ]
    return {
        name: sum(a == b for a, b in zip(given, expected, strict=True)) / len(expected)
        for name, given in answers.items()
    }
