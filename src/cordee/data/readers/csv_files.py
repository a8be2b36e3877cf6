"""CSV with a header line; fields in quotes may hold line ends."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cordee.data.readers.chunk import CHUNK_BYTES, Broken, Chunk, Invalid, Row, valid_rows
from cordee.data.readers.stream import open_stream
from cordee.errors import Problem, ProblemError

EXTENSIONS = (".csv", ".csv.gz")
# The library's own limit of 128 Ki characters is too small for documents; without any, a missing quote would read the
# rest of the file as one field.
_FIELD_LIMIT = 1 << 28


@dataclass(frozen=True, kw_only=True)
class CsvChunk(Chunk):
    """Parsed lines, each with the number of the line it ends in."""

    source: str
    numbers: list[int]
    fields: list[tuple[str, ...] | Broken]

    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        numbered = zip(self.numbers, self.fields, strict=True)
        return valid_rows(keys, ((f"{self.source}: line {number}", fields) for number, fields in numbered))


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file. Raises `ProblemError` if its header lacks a key."""
    csv.field_size_limit(max(csv.field_size_limit(), _FIELD_LIMIT))
    with open_stream(path) as stream:
        # Bytes that are no UTF-8 become lone surrogates, which `valid_rows` finds.
        text = io.TextIOWrapper(stream.file, "utf-8-sig", "surrogateescape", newline="")
        lines: Any = csv.reader(text, strict=True)
        header = next(lines, [])
        columns = _columns(path, header, keys)
        numbers: list[int] = []
        group: list[tuple[str, ...] | Broken] = []
        size = 0
        for fields in _lines(lines, len(header)):
            chosen = fields if isinstance(fields, Broken) else tuple(fields[column] for column in columns)
            numbers.append(lines.line_num)
            group.append(chosen)
            size += 0 if isinstance(chosen, Broken) else sum(map(len, chosen))
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


def _lines(lines: Any, width: int) -> Iterator[list[str] | Broken]:
    while True:
        try:
            fields = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield Broken(f"it is not CSV: {error}")
            continue
        if fields:  # an empty line is no record
            yield fields if len(fields) == width else Broken(f"it has {len(fields)} fields, the header {width}")
