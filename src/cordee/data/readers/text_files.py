"""Plain text: every line is a record under the key `text`, without its line end (as `datasets` reads text)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cordee.data.readers.chunk import Chunk, large_line
from cordee.data.readers.stream import line_blocks, open_stream
from cordee.errors import Problem, ProblemError

EXTENSIONS = (".txt", ".txt.gz")
KEY = "text"


@dataclass(frozen=True, kw_only=True)
class TextChunk(Chunk):
    """Whole lines of a file, from line `first` on."""

    first: int
    lines: str

    def records(self, keys: Sequence[str]) -> Iterator[tuple[str, Sequence[object]]]:
        lines = self.lines.removesuffix("\n").split("\n")
        return ((f"line {number}", (line,)) for number, line in enumerate(lines, self.first))


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file. Raises `ProblemError` if something else than the text is asked for."""
    if tuple(keys) != (KEY,):
        why = f"{path} is plain text, whose lines have no key but {KEY!r}"
        fix = f"leave it out, or write --json-keys {KEY}"
        raise ProblemError([Problem("--json-keys", " ".join(keys), why, fix, "missing", limit=(KEY,))])
    with open_stream(path) as stream:
        for lines, number in line_blocks(stream.text(), "\n"):
            if lines is None:
                yield large_line(str(path), number, stream.done())
            else:
                yield TextChunk(source=str(path), first=number, lines=lines, done=stream.done())
