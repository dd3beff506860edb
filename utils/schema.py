"""Kinds of configuration values: what a key accepts, in words and in code. Imports nothing heavy."""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


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
        value = convert(value)
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
        if pattern and not pattern.fullmatch(str(value)):
            raise ValueError
        return str(value)

    return Kind(accepts, parse)


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


def optional(kind: Kind) -> Kind:
    return Kind(f"{kind.accepts}, or null", lambda value: None if value is None else kind.parse(value))


def either(first: Kind, second: Kind) -> Kind:
    def parse(value: Any) -> Any:
        try:
            return first.parse(value)
        except ValueError:
            return second.parse(value)

    return Kind(f"{first.accepts}, or {second.accepts}", parse)
