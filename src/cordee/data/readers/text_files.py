"""Plain text: every line is a record under the key `text`, without its line end (as `datasets` reads text), or
the whole file is one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cordee.data.readers.chunk import MAX_RECORD_BYTES, Broken, Chunk, TableChunk, large_line
from cordee.data.readers.stream import line_blocks, open_stream
from cordee.errors import ProblemError

EXTENSIONS = (".txt", ".txt.gz")
KEY = "text"


@dataclass(frozen=True, kw_only=True)
class TextChunk(Chunk):
    """Whole lines of a file, from line `first` on."""

    first: int
    lines: str

    def records(self, keys: Sequence[str]) -> Iterator[tuple[str, Sequence[object]]]:
        lines = self.lines.removesuffix("\n").split("\n")
        return ((f"line {number}", (line if keys else {KEY: line},)) for number, line in enumerate(lines, self.first))


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file. Raises `ProblemError` if something else than the text is asked for."""
    _require_key(path, keys)
    with open_stream(path) as stream:
        for lines, number in line_blocks(stream.text(), "\n"):
            if lines is None:
                yield large_line(str(path), number, stream.done())
            else:
                yield TextChunk(source=str(path), first=number, lines=lines, done=stream.done())


def read_whole(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The file as one record, with its line ends. Raises `ProblemError` as `read`."""
    _require_key(path, keys)
    with open_stream(path) as stream:
        content = stream.file.read(MAX_RECORD_BYTES + 1)
    if len(content) > MAX_RECORD_BYTES:
        yield large_line(str(path), 1, 1.0)
        return
    line, value = 1, None
    try:
        value = (content.decode("utf-8-sig"),)
    except UnicodeDecodeError as error:
        line = 1 + error.object.count(b"\n", 0, error.start)
    broken = Broken("it is not valid UTF-8")
    yield TableChunk(source=str(path), unit="line", numbers=[line], values=[value or broken], done=1.0)


def _require_key(path: Path, keys: Sequence[str]) -> None:
    if keys and tuple(keys) != (KEY,):
        why = f"{path} is plain text, whose lines have no key but {KEY!r}"
        fix = f"leave it out, or write --json-keys {KEY}"
        raise ProblemError.of("--json-keys", " ".join(keys), why, fix, "missing", limit=(KEY,))
