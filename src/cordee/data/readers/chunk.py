"""What readers hand on: pieces of a source, small enough to hold many and to send to another process.

Owns the common part of all formats: what makes a record valid. Knows no format."""

import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cordee.errors import Problem, Problems

CHUNK_BYTES = 1 << 18  # about a tenth of a second of tokenizing
# What a record, as it is stored, and each of its texts may have at most. Tokenizers take one text whole: measured, up
# to 165 bytes of memory per byte of it and a second per megabyte, so about 2.8 GB in a process that tokenizes.
MAX_RECORD_BYTES = 1 << 24

Row = tuple[str, ...]  # one text per key
Numbered = tuple[int, "tuple[object, ...] | Broken", float]  # a record with its number, and the share read with it


@dataclass(frozen=True)
class Invalid:
    """A record that cannot be used: where it is, and why. `has`: the keys of one that only lacks what was asked for."""

    place: str
    why: str
    has: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Broken:
    """In the place of a record: it could not be parsed."""

    why: str
    has: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Chunk(ABC):
    """Some records of `source`. `done` is the share of the source that is read with it."""

    source: str
    done: float

    @abstractmethod
    def records(self, keys: Sequence[str]) -> Iterable[tuple[str, Sequence[object] | Broken]]:
        """The values of each record under `keys`, or without any the mapping that it is, with its place in the source.
        Parsing, the costly part of reading, is done here and not by the reader, so that each worker does its own."""

    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        """The records of which every value is text, and the others."""
        rows: list[Row] = []
        invalid: list[Invalid] = []
        for place, values in self.records(keys):
            if isinstance(values, Broken):
                invalid.append(Invalid(f"{self.source}: {place}", values.why, values.has))
            elif why := _why_invalid(keys, values):
                invalid.append(Invalid(f"{self.source}: {place}", why))
            else:
                rows.append(tuple(values))  # type: ignore[arg-type]  # every value is a str
        return rows, invalid


@dataclass(frozen=True, kw_only=True)
class TableChunk(Chunk):
    """Records of a table: one value per key each, of whatever type the table has, and the number of its `unit`."""

    unit: str
    numbers: list[int]
    values: list[tuple[object, ...] | Broken]

    def records(self, keys: Sequence[str]) -> Iterable[tuple[str, Sequence[object] | Broken]]:
        return ((f"{self.unit} {number}", values) for number, values in zip(self.numbers, self.values, strict=True))


def large_line(source: str, number: int, done: float) -> TableChunk:
    """In the place of a line of more than `MAX_RECORD_BYTES`, which the reader has skipped."""
    return TableChunk(source=source, unit="line", numbers=[number], values=[Broken(too_large())], done=done)


def too_large(what: str = "it") -> str:
    """Why a record of more than `MAX_RECORD_BYTES` is invalid."""
    return f"{what} is larger than {MAX_RECORD_BYTES >> 20} MiB, the most that one document may have: cut it"


def lacks(key: str) -> str:
    """Why a record without `key` is invalid."""
    return f"it has no {key!r}"


def other_keys(asked: Sequence[str], invalid: Sequence[Invalid]) -> Problems:
    """That records lack what was `asked` for, with the keys that there are, if that is all that is wrong with them."""
    there = tuple(dict.fromkeys(key for record in invalid for key in record.has or ()))
    if there and all(record.has is not None for record in invalid):
        why = f"no record so far has all of them; they have {', '.join(there)}"
        fix = f"name those that hold the text: --json-keys {shlex.join(there)}"
        yield Problem("--json-keys", " ".join(asked), why, fix, "missing", limit=there)


def _why_invalid(keys: Sequence[str], values: Sequence[object]) -> str | None:
    for key, value in zip(keys, values, strict=True):
        if value is MISSING:
            return lacks(key)
        if not isinstance(value, str):
            return f"its {key!r} is {'null' if value is None else type(value).__name__}, not text"
        try:
            size = len(value.encode())
        except UnicodeEncodeError as error:
            # Lone surrogates, from JSON or from bytes that are no UTF-8, are no characters: no tokenizer takes them.
            return f"its {key!r} is not valid UTF-8 from character {error.start + 1} on"
        if size > MAX_RECORD_BYTES:
            return too_large(f"its {key!r}")
    return None


class _Missing:
    """The value under a key that a record does not have."""

    def __reduce__(self) -> str:
        return "MISSING"


MISSING = _Missing()


def table_chunks(source: str, rows: Iterable[Numbered], unit: str = "row") -> Iterator[TableChunk]:
    """Group rows, given with their number and the share of the source that is read with each, to chunks of bounded
    size."""
    numbers: list[int] = []
    values: list[tuple[object, ...] | Broken] = []
    size, done = 0, 0.0
    for number, row, done in rows:
        characters = 0 if isinstance(row, Broken) else sum(map(_characters, row))
        numbers.append(number)
        # What is too large is not sent to a worker only to be refused there.
        values.append(row if characters <= MAX_RECORD_BYTES else Broken(too_large()))
        size += 1 + min(characters, MAX_RECORD_BYTES)  # rows without text take memory, too
        if size >= CHUNK_BYTES:
            yield TableChunk(source=source, unit=unit, numbers=numbers, values=values, done=done)
            numbers, values, size = [], [], 0
    if values:
        yield TableChunk(source=source, unit=unit, numbers=numbers, values=values, done=done)


def _characters(value: object) -> int:
    """Of a text, or of a whole record."""
    return len(value) if isinstance(value, str) else len(str(value)) if isinstance(value, dict) else 0


def numbered(rows: Iterable[tuple[tuple[object, ...], float]]) -> Iterator[tuple[int, tuple[object, ...], float]]:
    """Rows, given with the share of the source that is read with each, counted from 1."""
    return ((number, row, done) for number, (row, done) in enumerate(rows, 1))


def missing_columns(source: str, keys: Iterable[str], columns: Sequence[str]) -> Iterator[Problem]:
    """The keys that a table does not have."""
    why = f"{source} has no such column; it has {', '.join(columns) or 'none'}"
    for key in keys:
        if key not in columns:
            yield Problem("--json-keys", key, why, "give the names of its columns", "missing", limit=tuple(columns))
