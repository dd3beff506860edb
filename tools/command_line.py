"""Habits of every command-line program: kinds of arguments, and what a mistake of the user is answered with."""

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from logger import printable_lines

INTERRUPTED = 130  # exit code of Ctrl-C


def program(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the program's docstring as it stands: what it does, examples, exit codes."""
    return argparse.ArgumentParser(name, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def file_path(text: str) -> Path:
    """An argument that is a path; `~` is the home folder."""
    return Path(os.path.expanduser(text))


def whole(low: int = 1, high: int | None = None) -> Callable[[str], int]:
    """An argument that is an integer from `low` to `high`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= (int(text) if high is None else high):
            bound = f"from {low} on" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bound}")
        return int(text)

    return parse


def number(low: float, high: float, *, open_low: bool = False, open_high: bool = False) -> Callable[[str], float]:
    """An argument that is a number between two bounds, which `open_…` exclude."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or (open_low and value == low) or (open_high and value == high):
            words = {(False, False): "from {} to {}", (True, False): "over {} and up to {}"}
            words |= {(False, True): "from {} to below {}", (True, True): "between {} and {}"}
            bounds = words[open_low, open_high].format(low, high)
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bounds}")
        return value

    return parse


def some_of(names: Sequence[str], what: str) -> Callable[[str], list[str]]:
    """An argument that is a comma-separated list of some of `names`, each of which is a `what`."""

    def parse(text: str) -> list[str]:
        for name in (given := text.split(",")):
            if name not in names:
                raise argparse.ArgumentTypeError(f"there is no {what} {name!r}, expected some of {', '.join(names)}")
        return given

    return parse


def say(text: str, file: TextIO | None = None) -> None:
    """Print a message, whatever is in the names that it tells."""
    print(printable_lines(text), file=file)


def answer(run: Callable[[], int | None], *, mistakes: tuple[type[Exception], ...] = (ValueError, OSError)) -> int:
    """A program's exit code: what `run` returns; 2 and one line on standard error for a mistake; 130 for Ctrl-C."""
    try:
        return run() or 0
    except mistakes as error:
        say(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
