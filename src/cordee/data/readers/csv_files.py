"""CSV with a header line; fields in quotes may hold line ends.

Owns where a record ends and how large it may be. What a field means is the library's affair.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cordee.data.readers.chunk import (
    CHUNK_BYTES,
    MAX_RECORD_BYTES,
    Broken,
    Chunk,
    Invalid,
    Row,
    too_large,
    valid_rows,
)
from cordee.data.readers.stream import open_stream
from cordee.errors import Problem, ProblemError

EXTENSIONS = (".csv", ".csv.gz")


@dataclass(frozen=True, kw_only=True)
class CsvChunk(Chunk):
    """Parsed records, each with the number of the line it begins in."""

    source: str
    numbers: list[int]
    fields: list[tuple[str, ...] | Broken]

    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        numbered = zip(self.numbers, self.fields, strict=True)
        return valid_rows(keys, ((f"{self.source}: line {number}", fields) for number, fields in numbered))


class _Lines:
    """The lines of a file, as `csv.reader` takes them: up to the end of a record, which has a largest size.

    A record that is larger ends the file, because only its closing quote would tell where the next one begins.
    """

    def __init__(self, path: Path, text: TextIO):
        self._path = path
        self._text = text
        self._number = 0
        self._characters = 0
        self.first = 1  # line of the record

    def begin(self) -> None:
        """A record begins with the next line."""
        self.first = self._number + 1
        self._characters = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(MAX_RECORD_BYTES + 1)
        self._number += 1
        self._characters += len(line)
        if self._characters > MAX_RECORD_BYTES:
            fix = "close its quote if that is missing, else cut its text"
            raise ProblemError([Problem("--input", self._path, too_large(f"the record in line {self.first}"), fix)])
        if not line:
            raise StopIteration
        return line


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file. Raises `ProblemError` if its header lacks a key, or a record is too large."""
    # The library's own limit of 128 Ki characters is too small for documents.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    with open_stream(path) as stream:
        lines = _Lines(path, stream.text(newline=""))
        records = _records(csv.reader(lines, strict=True), lines)
        header = next(records, [])
        if isinstance(header, Broken):
            raise ProblemError([Problem("--input", path, f"in its header: {header.why}", "give a CSV file")])
        columns = _columns(path, header, keys)
        numbers: list[int] = []
        group: list[tuple[str, ...] | Broken] = []
        size = 0
        for fields in records:
            if not fields:
                continue  # an empty line is no record
            if not isinstance(fields, Broken) and len(fields) != len(header):
                fields = Broken(f"it has {len(fields)} fields, the header {len(header)}")
            chosen = fields if isinstance(fields, Broken) else tuple(fields[column] for column in columns)
            numbers.append(lines.first)
            group.append(chosen)
            size += 1 if isinstance(chosen, Broken) else 1 + sum(map(len, chosen))  # an empty row takes memory, too
            if size >= CHUNK_BYTES:
                yield CsvChunk(source=str(path), numbers=numbers, fields=group, done=stream.done())
                numbers, group, size = [], [], 0
        if group:
            yield CsvChunk(source=str(path), numbers=numbers, fields=group, done=1.0)


def _columns(path: Path, header: list[str], keys: Sequence[str]) -> list[int]:
    if missing := [key for key in keys if key not in header]:
        why = f"{path} has no such column; it has {', '.join(header) or 'none'}"
        fix = "give the names of its columns, which stand in the first line"
        raise ProblemError([Problem("--json-keys", key, why, fix) for key in missing])
    return [header.index(key) for key in keys]


def _records(reader: Any, lines: _Lines) -> Iterator[list[str] | Broken]:
    while True:
        lines.begin()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Broken(f"it is not CSV: {error}")
