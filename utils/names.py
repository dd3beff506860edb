"""Names of files and classes as people and programs are shown them."""

import re

# Control characters, separators of lines, marks that turn the direction of writing, and what stands for bytes that are
# no UTF-8 (surrogates): each of them breaks a line, a terminal, or the writing of a file.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def printable(name: object) -> str:
    r"""`name` on one line and in UTF-8: what does not belong there is escaped, as `\n`, `\x1b`, or `\xff` for a byte.

    Every name that reaches a log, a terminal or a file goes through here; files are opened by the name itself.
    """
    return _UNPRINTABLE.sub(_escaped, str(name))


def printable_lines(text: object) -> str:
    """A message that may have lines, each of them printable."""
    return "\n".join(map(printable, str(text).split("\n")))


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    byte = 0xDC80 <= code <= 0xDCFF  # how Python keeps a byte that is no UTF-8
    return f"\\x{code - 0xDC00:02x}" if byte else found[0].encode("unicode_escape").decode()
