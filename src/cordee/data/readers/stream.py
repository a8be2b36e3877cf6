"""Reading files from the beginning to the end in pieces, compressed or not.

Owns opening and cutting at line ends. Knows nothing of what the lines hold.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cordee.data.readers.chunk import CHUNK_BYTES
from cordee.errors import Problem, ProblemError

BOM = b"\xef\xbb\xbf"


class ByteStream:
    """A file's bytes, unpacked if its name ends in .gz, and how much of the file is read."""

    def __init__(self, path: Path, raw: IO[bytes], file: IO[bytes]):
        self._size = max(path.stat().st_size, 1)
        self._raw = raw
        self.file = file

    def done(self) -> float:
        return min(self._raw.tell() / self._size, 1.0)


@contextmanager
def open_stream(path: Path) -> Iterator[ByteStream]:
    """Raises `ProblemError` if the file is no gzip file although its name says so, or is cut off."""
    with open(path, "rb") as raw:
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw  # type: ignore[assignment]
        try:
            yield ByteStream(path, raw, file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ProblemError(
                [Problem("--input", path, f"it cannot be unpacked: {error}", "copy it again")]
            ) from error


def line_blocks(path: Path) -> Iterator[tuple[bytes, int, float]]:
    """Blocks of whole lines, each with the number of its first line (from 1) and the share of the file read."""
    number = 1
    with open_stream(path) as stream:
        while block := stream.file.read(CHUNK_BYTES):
            block += stream.file.readline()
            yield block.removeprefix(BOM) if number == 1 else block, number, stream.done()
            number += block.count(b"\n")
