"""The header of a GGUF file: values by key, and the place of every tensor.

Owns the distrust of it: every count, length and offset is held against the size of the file before anything is read or
made for it, so that time and memory are bounded by that size. The format is that of ggml's `docs/gguf.md`, with what
llama.cpp's own reader demands beyond it: no arrays of arrays, and tensors that follow one another in the order of
their entries, each padded to the alignment; and the last has to end the file. Knows no key but the alignment, no model,
and of packed types only sizes."""

import math
import struct
import sys
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from cordee.files import holds_weights

MAGIC = b"GGUF"
SUFFIX = ".gguf"
VERSIONS = (2, 3)
ALIGNMENT, MAX_DIMS = 32, 4  # bytes where the file does not say; dims of a tensor
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LEAST_VALUE, _LEAST_ENTRY = 13, 24  # bytes of a key with its value, and of a tensor's entry, with empty names

Sizes = Mapping[int, tuple[int, int]]  # elements and bytes of a block, by the number of the type


@dataclass(frozen=True)
class Entry:
    """A tensor: its shape, outermost dim first, the number of its type, and where in the file it begins, in bytes."""

    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(frozen=True)
class Header:
    """`values` by key, arrays of numbers as `array`, which takes no more memory than they take in the file; tensors by
    name."""

    values: dict[str, Any]
    entries: dict[str, Entry]


def is_gguf(path: Path) -> bool:
    """Whether `path` is such a file, or a directory that has one and no other weights."""
    if path.is_file():
        with path.open("rb") as file:
            return path.suffix == SUFFIX or file.read(len(MAGIC)) == MAGIC
    return not holds_weights(path) and any(path.glob(f"*{SUFFIX}"))


def read_header(path: Path, sizes: Sizes) -> Header:
    """The header of a file. ValueError if it is none, or if what it says cannot be; OSError if it cannot be read."""
    size = path.stat().st_size
    with path.open("rb", buffering=2**20) as file:
        reader = _Reader(file, size)
        if reader.take(len(MAGIC)) != MAGIC:
            raise ValueError("it does not begin with the letters GGUF")
        version = reader.number("I")
        if version & 0xFFFF == 0:
            raise ValueError("its numbers are in the byte order of another machine")
        if version not in VERSIONS:
            raise ValueError(f"it is of version {version}, which is unknown here")
        num_tensors, num_values = reader.count(_LEAST_ENTRY), reader.count(_LEAST_VALUE)
        values: dict[str, Any] = {}
        for _ in range(num_values):
            _add(values, reader.text(), reader.value(reader.number("I")))
        entries: dict[str, Entry] = {}
        for _ in range(num_tensors):
            _add(entries, reader.text(), reader.entry())
        return Header(values, _placed(entries, size - reader.left, size, _alignment(values), sizes))


class _Reader:
    """Reads a file forward; `left`, bytes to its end, is checked before anything is read. ValueError if it is cut."""

    def __init__(self, file: BinaryIO, size: int):
        self._file = file
        self.left = size

    def take(self, nbytes: int) -> bytes:
        if nbytes > self.left:
            raise ValueError(f"it ends {nbytes - self.left:,} bytes too early for its header")
        self.left -= nbytes
        return self._file.read(nbytes)

    def number(self, code: str) -> Any:
        try:
            return struct.unpack(f"={code}", self.take(struct.calcsize(f"={code}")))[0]
        except struct.error as error:
            raise ValueError("it has become shorter") from error

    def count(self, least: int) -> int:
        """How many things follow that have `least` bytes each, or more."""
        count = int.from_bytes(self.take(8), sys.byteorder)
        if count * least > self.left:
            raise ValueError(f"its header counts {count:,} things of {least} bytes or more, and has {self.left:,} left")
        return count

    def text(self) -> str:
        return self.take(self.count(1)).decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        return self._array() if kind == _ARRAY else self.number(_code(kind))

    def _array(self) -> Any:
        kind = self.number("I")
        if kind == _STRING:
            return [self.text() for _ in range(self.count(8))]
        numbers = array(_code(kind).replace("?", "B"))
        numbers.frombytes(self.take(self.count(numbers.itemsize) * numbers.itemsize))
        return numbers

    def entry(self) -> Entry:
        """A tensor's entry behind its name; `offset` is as it stands there."""
        num_dims = self.number("I")
        if num_dims > MAX_DIMS:
            raise ValueError(f"a tensor has {num_dims:,} dims, more than {MAX_DIMS}")
        return Entry(tuple(reversed([self.number("Q") for _ in range(num_dims)])), self.number("I"), self.number("Q"))


def _code(kind: int) -> str:
    if kind not in _NUMBERS:
        raise ValueError(f"a value is of type {kind}, which is unknown or has no place there")
    return _NUMBERS[kind]


def _add(found: dict[str, Any], name: str, value: object) -> None:
    if name in found:
        raise ValueError(f"{name!r} is there twice")
    found[name] = value


def _alignment(values: Mapping[str, Any]) -> int:
    alignment = values.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, no power of two")
    return alignment


def _placed(entries: Mapping[str, Entry], end: int, size: int, alignment: int, sizes: Sizes) -> dict[str, Entry]:
    """The entries with offsets in the file, after the header's `end`, within `size`. ValueError if one is misplaced."""
    start, expected, placed = _padded(end, alignment), 0, {}
    for name, entry in entries.items():
        if entry.kind not in sizes:
            raise ValueError(f"tensor {name!r} has the unknown type {entry.kind}")
        block, nbytes = sizes[entry.kind]
        if 0 in entry.shape or (entry.shape or (1,))[-1] % block:
            raise ValueError(f"tensor {name!r} has the shape {list(entry.shape)}, packed in blocks of {block}")
        if entry.offset != expected:
            raise ValueError(f"tensor {name!r} begins at byte {entry.offset:,} of the tensors, not at {expected:,}")
        nbytes *= math.prod(entry.shape) // block
        if start + expected + nbytes > size:
            raise ValueError(f"it ends {start + expected + nbytes - size:,} bytes too early for tensor {name!r}")
        placed[name] = Entry(entry.shape, entry.kind, start + expected)
        expected += _padded(nbytes, alignment)
    if (left := size - start - expected) > 0:  # as where the last tensor is of another type, or all begin elsewhere
        raise ValueError(f"{left:,} bytes follow its last tensor, to which by its header none belong")
    return placed


def _padded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
