"""Plain text: every line is a record under the key `text`, without its line end (as `datasets` reads text)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cordee.data.readers.chunk import Chunk, Invalid, InvalidChunk, Row, too_large, valid_rows
from cordee.data.readers.stream import line_blocks, open_stream
from cordee.errors import Problem, ProblemError

EXTENSIONS = (".txt", ".txt.gz")
KEY = "text"


@dataclass(frozen=True, kw_only=True)
class TextChunk(Chunk):
    """Whole lines of a file."""

    source: str
    first: int
    lines: str

    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        lines = self.lines.removesuffix("\n").split("\n")
        return valid_rows(keys, ((f"{self.source}: line {self.first + i}", (line,)) for i, line in enumerate(lines)))


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file. Raises `ProblemError` if something else than the text is asked for."""
    if tuple(keys) != (KEY,):
        why = f"{path} is plain text, whose lines have no key but {KEY!r}"
        raise ProblemError([Problem("--json-keys", " ".join(keys), why, f"leave it out, or write --json-keys {KEY}")])
    with open_stream(path) as stream:
        for lines, number in line_blocks(stream.text(), "\n"):
            if lines is None:
                record = Invalid(f"{path}: line {number}", too_large())
                yield InvalidChunk(record=record, done=stream.done())
            else:
                yield TextChunk(source=str(path), first=number, lines=lines, done=stream.done())
