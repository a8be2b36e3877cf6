"""Reading files from the beginning to the end in pieces, compressed or not.

Owns opening, what a line of text is, and cutting at line ends. Knows nothing of what the lines hold."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, AnyStr

from cordee.data.readers.chunk import CHUNK_BYTES, MAX_RECORD_BYTES
from cordee.errors import ProblemError
from cordee.files import open_regular

BOM = b"\xef\xbb\xbf"


class ByteStream:
    """A file's bytes, decompressed if its name ends in .gz, and how much of the file is read."""

    def __init__(self, path: Path, raw: IO[bytes], file: IO[bytes]):
        self._size = max(path.stat().st_size, 1)
        self._raw = raw
        self.file = file

    def text(self, newline: str | None = None) -> io.TextIOWrapper:
        """The file as text: UTF-8 without a byte order mark, whose lines end in LF, CR LF or CR and nothing else.

        With `newline` None each of these reads as LF. Bytes that are no UTF-8 become lone surrogates, which
        `Chunk.rows` finds."""
        return io.TextIOWrapper(self.file, "utf-8-sig", "surrogateescape", newline=newline)  # type: ignore[arg-type]

    def done(self) -> float:
        return min(self._raw.tell() / self._size, 1.0)


@contextmanager
def open_stream(path: Path) -> Iterator[ByteStream]:
    """Raises `ProblemError` if the file is no gzip file although its name says so, or is cut off."""
    with open_regular(path) as raw:
        file: IO[bytes] = gzip.GzipFile(fileobj=raw) if path.suffix.lower() == ".gz" else raw  # type: ignore[assignment]
        try:
            if file is not raw and not raw.peek(1):
                raise EOFError("it is empty, which no gzip file is")
            yield ByteStream(path, raw, file)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            why = f"it cannot be decompressed: {error}"
            raise ProblemError.of("--input", path, why, "copy it again", "corrupt") from error


def line_blocks(file: Any, end: AnyStr) -> Iterator[tuple[AnyStr | None, int]]:
    """Blocks of whole lines of `file` (an IO[AnyStr]), which end in `end`, each with the number of its first line,
    from 1. None stands for a line of more than `MAX_RECORD_BYTES`, which is skipped without being held."""
    number = 1
    while block := file.read(CHUNK_BYTES):
        block += file.readline(MAX_RECORD_BYTES + 1)
        start = block.rfind(end, 0, -1) + 1
        if len(block) - start - block.endswith(end) <= MAX_RECORD_BYTES:
            yield block, number
            number += block.count(end)
            continue
        if start:
            yield block[:start], number
        number += block.count(end, 0, start)
        yield None, number
        number += 1
        while block and not block.endswith(end):
            block = file.readline(CHUNK_BYTES)
