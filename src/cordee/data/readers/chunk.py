"""What readers hand on: pieces of a source, small enough to hold many and to send to another process.

Owns the common part of all formats: what makes a record valid. Knows no format.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

CHUNK_BYTES = 1 << 18  # about a tenth of a second of tokenizing
# What a record, as it is stored, and each of its texts may have at most. Tokenizers take one text whole: measured, up
# to 165 bytes of memory per byte of it and a second per megabyte, so about 2.8 GB in a process that tokenizes.
MAX_RECORD_BYTES = 1 << 24

Row = tuple[str, ...]  # one text per key


@dataclass(frozen=True)
class Invalid:
    """A record that cannot be used: where it is, and why."""

    place: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Chunk(ABC):
    """Some records of a source. `done` is the share of the source that is read with it."""

    done: float

    @abstractmethod
    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        """The records' texts under `keys`, and the records that have none. Parsing, the costly part of reading, is
        done here and not by the reader, so that each worker does its own."""


@dataclass(frozen=True, kw_only=True)
class TableChunk(Chunk):
    """Records of a table: one value per key each, of whatever type the table has."""

    source: str
    first: int  # number of the first row, from 1
    values: list[tuple[object, ...] | Broken]

    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        return valid_rows(keys, ((f"{self.source}: row {self.first + i}", row) for i, row in enumerate(self.values)))


@dataclass(frozen=True, kw_only=True)
class InvalidChunk(Chunk):
    """A record that the reader itself cannot use."""

    record: Invalid

    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        return [], [self.record]


class Broken:
    """In the place of a record: it could not be parsed."""

    def __init__(self, why: str):
        self.why = why


def too_large(what: str = "it") -> str:
    """Why a record of more than `MAX_RECORD_BYTES` is invalid."""
    return f"{what} is larger than {MAX_RECORD_BYTES >> 20} MiB, the most that one document may have: cut it"


def valid_rows(
    keys: Sequence[str], records: Iterable[tuple[str, Sequence[object] | Broken]]
) -> tuple[list[Row], list[Invalid]]:
    """Sort records, given with their places, into those of which every value is text and the others."""
    rows: list[Row] = []
    invalid: list[Invalid] = []
    for place, values in records:
        why = values.why if isinstance(values, Broken) else _why_invalid(keys, values)
        if why:
            invalid.append(Invalid(place, why))
        else:
            rows.append(tuple(values))  # type: ignore[arg-type]  # every value is a str
    return rows, invalid


def _why_invalid(keys: Sequence[str], values: Sequence[object]) -> str | None:
    for key, value in zip(keys, values, strict=True):
        if value is MISSING:
            return f"it has no {key!r}"
        if not isinstance(value, str):
            return f"its {key!r} is {'null' if value is None else type(value).__name__}, not text"
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            # Lone surrogates, from JSON or from bytes that are no UTF-8, are no characters: no tokenizer takes them.
            return f"its {key!r} is not valid Unicode text: {error}"
        if size > MAX_RECORD_BYTES:
            return too_large(f"its {key!r}")
    return None


class _Missing:
    """The value under a key that a record does not have."""

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()


def table_chunks(source: str, rows: Iterable[tuple[tuple[object, ...], float]]) -> Iterator[TableChunk]:
    """Group rows, given with the share of the source that is read with each, to chunks of bounded size."""
    group: list[tuple[object, ...] | Broken] = []
    size = count = 0
    done = 0.0
    for row, done in rows:
        characters = sum(len(value) for value in row if isinstance(value, str))
        # What is too large is not sent to a worker only to be refused there.
        group.append(row if characters <= MAX_RECORD_BYTES else Broken(too_large()))
        size += 1 + min(characters, MAX_RECORD_BYTES)  # rows without text take memory, too
        if size >= CHUNK_BYTES:
            yield TableChunk(source=source, first=count + 1, values=group, done=done)
            count += len(group)
            group, size = [], 0
    if group:
        yield TableChunk(source=source, first=count + 1, values=group, done=done)
