"""CSV with a header line; fields in quotes may hold line ends.

Owns where a record ends and how large it may be. What a field means is the library's affair."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from cordee.data.readers import chunk
from cordee.data.readers.chunk import MAX_RECORD_BYTES
from cordee.data.readers.stream import ByteStream, open_stream
from cordee.errors import ProblemError, raise_all

EXTENSIONS = (".csv", ".csv.gz")


class _Lines:
    """The lines of a file up to the end of a record; one too large ends the file, as only its quote ends it."""

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

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(MAX_RECORD_BYTES + 1):
            self._number += 1
            self._characters += len(line)
            if self._characters > MAX_RECORD_BYTES:
                why, fix = chunk.too_large("the record"), "close its quote if that is missing, else cut its text"
                raise ProblemError.of("--input", f"{self._path}:{self.first}", why, fix, "too large")
            yield line


def read(path: Path, keys: Sequence[str]) -> Iterator[chunk.Chunk]:
    """The chunks of one file. Raises `ProblemError` if its header lacks a key, or a record is too large."""
    # The library's own limit of 128 Ki characters is too small for documents.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    with open_stream(path) as stream:
        yield from chunk.table_chunks(str(path), _rows(path, stream, keys), "line")


def _rows(path: Path, stream: ByteStream, keys: Sequence[str]) -> Iterator[chunk.Numbered]:
    lines = _Lines(path, stream.text(newline=""))
    records = _records(csv.reader(lines, strict=True), lines)
    header = next(records, [])
    if isinstance(header, chunk.Broken):
        raise ProblemError.of("--input", path, f"in its header: {header.why}", "give a CSV file", "corrupt")
    raise_all(chunk.missing_columns(str(path), keys, header))
    columns = [header.index(key) for key in keys]
    for fields in records:
        if isinstance(fields, chunk.Broken):
            yield lines.first, fields, stream.done()
        elif fields and len(fields) != len(header):
            yield lines.first, chunk.Broken(f"it has {len(fields)} fields, the header {len(header)}"), stream.done()
        elif fields:  # an empty line is no record
            record = tuple(fields[column] for column in columns)
            yield lines.first, record if keys else (dict(zip(header, fields, strict=True)),), stream.done()


def _records(reader: Any, lines: _Lines) -> Iterator[list[str] | chunk.Broken]:
    while True:
        lines.begin()
        try:
            yield next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield chunk.Broken(f"it is not CSV: {error}")
