"""Plain text: every line is a record under the key `text`, without its line end (as `datasets` reads text)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cordee.data.readers.chunk import Broken, Chunk, Invalid, Row, valid_rows
from cordee.data.readers.stream import line_blocks
from cordee.errors import Problem, ProblemError

EXTENSIONS = (".txt", ".txt.gz")
KEY = "text"


@dataclass(frozen=True, kw_only=True)
class TextChunk(Chunk):
    """Whole lines of a file, not yet decoded."""

    source: str
    first: int
    lines: bytes

    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        lines = self.lines.replace(b"\r\n", b"\n").replace(b"\r", b"\n").removesuffix(b"\n").split(b"\n")
        return valid_rows(keys, ((f"{self.source}: line {self.first + i}", _decode(x)) for i, x in enumerate(lines)))


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file. Raises `ProblemError` if something else than the text is asked for."""
    if tuple(keys) != (KEY,):
        why = f"{path} is plain text, whose lines have no key but {KEY!r}"
        raise ProblemError([Problem("--json-keys", " ".join(keys), why, f"leave it out, or write --json-keys {KEY}")])
    for block, number, done in line_blocks(path):
        yield TextChunk(source=str(path), first=number, lines=block, done=done)


def _decode(line: bytes) -> Sequence[object] | Broken:
    try:
        return (line.decode("utf-8"),)
    except UnicodeDecodeError as error:
        return Broken(f"it is not UTF-8: {error}")
