"""What is kept of every file of a large data set: arrays instead of a million Python objects.

Reading a Python object writes its reference count, so that forked loader processes would copy the pages of a list of
names, little by little, each for itself. Arrays hold no objects: however many processes read them, they exist once.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.sources.base import LARGEST_FILE
from logger import printable


class PackedNames:
    """Byte strings one after another in a single buffer, and where each ends; indexing gives `bytes`."""

    def __init__(self, names: Iterable[bytes]) -> None:
        buffer, lengths = bytearray(), bytearray()
        for name in names:
            buffer += name
            lengths += struct.pack("=I", len(name))
        self._buffer = np.array(buffer, dtype=np.uint8)  # a copy: bytearrays have room to grow
        ends = np.frombuffer(lengths, dtype=np.uint32).cumsum(dtype=np.uint64)
        self._ends = ends.astype(np.min_scalar_type(len(buffer)))  # 4 bytes each up to 4 GiB of names

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, position: int) -> bytes:
        start = int(self._ends[position - 1]) if position else 0
        return self._buffer[start : int(self._ends[position])].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        return (self[position] for position in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Memory of all names together."""
        return self._buffer.nbytes + self._ends.nbytes


# -- Zip

# The records of the zip format that matter here (PKWARE's APPNOTE.TXT, 4.3.7 to 4.3.16), each after its signature.
_LOCAL = struct.Struct("<22x2H")  # lengths of name and extra field
_CENTRAL = struct.Struct("<4x2H4x3L3H8xL")
_END = struct.Struct("<8x2L2x")  # size and start of the directory
_END_64 = struct.Struct("<36x2Q")  # the same
_LOCATOR_64_SIZE = 20  # its signature says that a 64-bit end stands right before it
_ENCRYPTED, _UTF_8 = 0x1, 0x800  # flags
_STORED, _DEFLATED = 0, 8  # methods
_TOO_WIDE = 0xFFFFFFFF  # stands for what only the 64-bit extra field can hold
_MOST = ((1 << 64) - 1, _TOO_WIDE, _TOO_WIDE, _TOO_WIDE, 255)  # of each number that is kept; larger files are refused
_MEMBER = np.dtype([("offset", "<u8"), ("size", "<u4"), ("original", "<u4"), ("crc", "<u4"), ("method", "u1")])


class ZipError(ValueError):
    """A zip file, or a member of one, that is not what the format says, or that is encrypted."""


class ZipIndex:
    """The files of a zip: 21 bytes and the name of each.

    `zipfile.ZipFile` keeps more than half a kilobyte per file, in every process that opens it. Raises ZipError for
    what is no zip file, is cut off, or holds encrypted files or methods other than stored and deflated.
    """

    def __init__(self, names: PackedNames, members: np.ndarray) -> None:
        self.names, self.members = names, members
        self._next = 0
        self._positions: dict[bytes, int] | None = None

    @classmethod
    def of(cls, path: Path) -> "ZipIndex":
        rows = bytearray()

        def names(file: BinaryIO) -> Iterator[bytes]:
            for name, numbers in zip_members(file):
                rows.extend(struct.pack("<Q3IB", *map(min, numbers, _MOST)))
                yield name

        with path.open("rb", buffering=1 << 20) as file:
            packed = PackedNames(names(file))
        return cls(packed, np.array(np.frombuffer(rows, dtype=_MEMBER)))

    def find(self, name: bytes) -> int | None:
        """Position of a file. Asking in the order of the zip costs no memory; any other order, a dictionary of all."""
        if self._positions is None:
            position = self._next
            if position < len(self.names) and self.names[position] == name:
                self._next += 1
                return position
            self._positions = {self.names[position]: position for position in range(len(self.names))}
        return self._positions.get(name)

    def take(self, positions: Sequence[int]) -> "ZipIndex":
        """The index of these files alone, in this order."""
        if np.array_equal(positions, range(len(self.names))):
            return ZipIndex(self.names, self.members)
        return ZipIndex(PackedNames(self.names[position] for position in positions), self.members[positions])

    @property
    def nbytes(self) -> int:
        """Memory of the whole index."""
        return self.names.nbytes + self.members.nbytes

    def read(self, descriptor: int, position: int) -> bytes:
        """Content of one file of the open zip. Raises ZipError or OSError where it is damaged or too large.

        It takes no more memory than the zip's directory says, and LARGEST_FILE allows.
        """
        offset, size, original, crc, method = (int(value) for value in self.members[position])
        if max(size, original) > LARGEST_FILE:
            raise ZipError(f"{max(size, original):,} bytes, expected at most {LARGEST_FILE:,}")
        header = os.pread(descriptor, 4 + _LOCAL.size, offset) if offset < 1 << 62 else b""
        if len(header) < 4 + _LOCAL.size or not header.startswith(b"PK\x03\x04"):
            raise ZipError("no file starts where the zip's directory says")
        name_length, extra_length = _LOCAL.unpack_from(header, 4)
        content = os.pread(descriptor, size, offset + len(header) + name_length + extra_length)
        if method == _DEFLATED:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, original + 1)
            except zlib.error as error:
                raise ZipError(str(error)) from error
        if len(content) != original or zlib.crc32(content) != crc:
            raise ZipError("the zip's size or checksum of this file is another one")
        return content


def as_text(name: bytes) -> str:
    """A name in a zip or a map as it is shown."""
    return printable(name.decode("utf-8", "surrogateescape"))


def zip_members(file: BinaryIO) -> Iterator[tuple[bytes, tuple[int, int, int, int, int]]]:
    """The files of an open zip in the order of its directory, which is read piece by piece. Raises ZipError.

    Of each its name in UTF-8; and where its header starts, its sizes compressed and not, its checksum, its method.
    """
    position, end, shift = _find_directory(file)
    file.seek(position)
    while position < end:
        fields = _read(file, b"PK\x01\x02", _CENTRAL, "an entry of its directory")
        flags, method, crc, size, original_size, name_length, extra_length, comment_length, offset = fields
        rest_length = name_length + extra_length + comment_length
        rest = file.read(rest_length)
        if len(rest) < rest_length:
            raise ZipError("its directory is cut off")
        position += 4 + _CENTRAL.size + rest_length
        name, extra = rest[:name_length], rest[name_length : name_length + extra_length]
        if not flags & _UTF_8 and not name.isascii():
            name = name.decode("cp437").encode()
        if flags & _ENCRYPTED:
            raise ZipError(f"{as_text(name)} is encrypted")
        if method not in (_STORED, _DEFLATED):
            raise ZipError(f"{as_text(name)} has compression method {method}, expected 0 (stored) or 8 (deflated)")
        if _TOO_WIDE in (original_size, size, offset):
            original_size, size, offset = _wide_values(extra, (original_size, size, offset))
        yield name, (offset + shift, size, original_size, crc, method)


def _find_directory(file: BinaryIO) -> tuple[int, int, int]:
    """Start and end of the directory, and the length of what stands before the zip, which its offsets do not count."""
    length = file.seek(0, os.SEEK_END)
    tail_start = max(0, length - (4 + _END.size + 0xFFFF))  # a comment of up to 65,535 bytes may follow
    file.seek(tail_start)
    tail = file.read()
    found = tail.rfind(b"PK\x05\x06")
    if found < 0 or len(tail) < found + 4 + _END.size:
        raise ZipError("it does not end as a zip file does")
    size, start = _END.unpack_from(tail, found + 4)
    end = tail_start + found
    wide_end = end - _LOCATOR_64_SIZE - (4 + _END_64.size)
    if wide_end >= 0:
        file.seek(end - _LOCATOR_64_SIZE)
        if file.read(4) == b"PK\x06\x07":
            file.seek(wide_end)
            size, start = _read(file, b"PK\x06\x06", _END_64, "its 64-bit end")
            end = wide_end
    shift = end - size - start
    if shift < 0:
        raise ZipError("its directory does not fit into the file")
    return start + shift, end, shift


def _read(file: BinaryIO, signature: bytes, record: struct.Struct, what: str) -> tuple[int, ...]:
    data = file.read(4 + record.size)
    if len(data) < 4 + record.size or not data.startswith(signature):
        raise ZipError(f"{what} is damaged or cut off")
    return record.unpack_from(data, 4)


def _wide_values(extra: bytes, values: tuple[int, int, int]) -> Iterator[int]:
    """The three values, those that do not fit 32 bits taken from the 64-bit extra field, which holds them in order."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            needed = values.count(_TOO_WIDE)
            if length >= 8 * needed and position + 4 + 8 * needed <= len(extra):
                wide = iter(struct.unpack_from(f"<{needed}Q", extra, position + 4))
                return (next(wide) if value == _TOO_WIDE else value for value in values)
        position += 4 + length
    raise ZipError("an entry of its directory lacks its 64-bit sizes")
