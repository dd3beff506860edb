"""Kinds of configuration values: what a key accepts, in words and in code. Imports nothing heavy."""

import ast
import os
import re
import reprlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

LONGEST_TEXT = 4096  # characters; also the longest path of Linux
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlevel = 2


def shown(value: Any) -> str:
    """A value as a message shows it, cut where it is long or deep."""
    try:
        return _REPR.repr(value)[:200]
    except ValueError:  # Python refuses to write out integers of thousands of digits
        return "a number of thousands of digits"


def decoded(text: str) -> Any:
    """The Python value that a text spells, null and ~ as None; the text itself where it spells none.

    YAML 1.1 reads 5e-4 and None as text, and words of a command line are text.
    """
    if text in ("null", "~"):
        return None
    try:
        return ast.literal_eval(text) if len(text) <= LONGEST_TEXT else text
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


@dataclass(frozen=True)
class Kind:
    """What a key accepts: `parse` turns a decoded value into its canonical form or raises ValueError."""

    accepts: str
    parse: Callable[[Any], Any]


def _number(
    types: tuple[type, ...], convert: Callable[[Any], Any], name: str, low: float, high: float, open_high: bool
) -> Kind:
    bounds = "" if low == -float("inf") else f" ≥ {low:g}"
    if high != float("inf"):
        bounds += f" and {'<' if open_high else '≤'} {high:g}"

    def parse(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, types):
            raise ValueError
        try:
            value = convert(value)
        except OverflowError:
            raise ValueError from None
        if not (low <= value < high if open_high else low <= value <= high):  # NaN fails both
            raise ValueError
        return value

    return Kind(f"{name}{bounds}", parse)


def integer(low: float = -float("inf"), high: float = float("inf")) -> Kind:
    return _number((int,), int, "an integer", low, high, False)


def real(low: float = -float("inf"), high: float = sys.float_info.max, open_high: bool = False) -> Kind:
    kind = _number((int, float), float, "a number", low, high, open_high)
    return kind if high != sys.float_info.max else Kind(kind.accepts.split(" and ≤")[0], kind.parse)


def choice(*names: str) -> Kind:
    def parse(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in names:
            raise ValueError
        return value.lower()

    return Kind("one of " + ", ".join(names), parse)


def text(pattern: re.Pattern[str] | None = None, accepts: str = "a string") -> Kind:
    def parse(value: Any) -> str:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        value = str(value)
        if len(value) > LONGEST_TEXT or "\0" in value or (pattern and not pattern.fullmatch(value)):
            raise ValueError
        return value

    return Kind(accepts, parse)


def file_path() -> Kind:
    """A file or folder; `~` is the home folder. An empty text stands for none."""
    kind = text(accepts=f"a path of at most {LONGEST_TEXT} characters")
    return Kind(kind.accepts, lambda value: os.path.expanduser(kind.parse(value)))


def folder_name() -> Kind:
    """One or more parts of a path below another one."""

    def parse(value: Any) -> str:
        value = text().parse(value)
        if (
            not value.strip("./ ")
            or value.startswith(("/", "~"))
            or ".." in value.split("/")
            or not value.isprintable()
        ):
            raise ValueError
        return str(value)

    return Kind("the name of a folder below OUTPUT: no absolute path, no `..`, no line break", parse)


def boolean() -> Kind:
    def parse(value: Any) -> bool:
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Kind("True or False", parse)


def sequence(item: Kind, length: int | None = None, make: type = list) -> Kind:
    def parse(value: Any) -> Any:
        if not isinstance(value, list | tuple) or (length is not None and len(value) != length) or not value:
            raise ValueError
        return make(item.parse(v) for v in value)

    return Kind(f"a list of {length or 'one or more'} × {item.accepts}", parse)


def keywords() -> Kind:
    """Names with plain values, or lists of them."""
    plain = str | int | float | bool | None

    def parse(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict) or not all(isinstance(name, str) and name.isidentifier() for name in value):
            raise ValueError
        for entry in value.values():
            if not all(isinstance(each, plain) for each in (entry if isinstance(entry, list | tuple) else [entry])):
                raise ValueError
        return {name: decoded(entry) if isinstance(entry, str) else entry for name, entry in value.items()}

    return Kind("names with values, {name: value, …}", parse)


def lower(kind: Kind) -> Kind:
    """A text whose case does not matter."""
    return Kind(kind.accepts, lambda value: kind.parse(value).lower())


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.accepts}, or null", lambda value: None if value is None else kind.parse(value))


def either(first: Kind, second: Kind) -> Kind:
    def parse(value: Any) -> Any:
        try:
            return first.parse(value)
        except ValueError:
            return second.parse(value)

    return Kind(f"{first.accepts}, or {second.accepts}", parse)
