"""JSON: one object a line (.jsonl, .json), one array of objects, or objects one after the other (.json).

Owns finding where objects begin and end, without reading a file whole and without parsing, which is the workers'.
The beginning of a .json shows its form: `[` is an array, and a first line that is only `{` means that
objects take several lines."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from cordee.data.readers.chunk import CHUNK_BYTES, MAX_RECORD_BYTES, Broken, Chunk, lacks, large_line, too_large
from cordee.data.readers.stream import BOM, line_blocks, open_stream
from cordee.errors import ProblemError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_START = 1 << 16  # bytes that show the form of a file


@dataclass(frozen=True, kw_only=True)
class JsonChunk(Chunk):
    """Values, not yet parsed, each with the number of its line (`unit` "line") or its own (`unit` "record")."""

    unit: str
    first: int
    objects: bytes | list[bytes | None]  # whole lines, or one value each, None for one that is too large

    def records(self, keys: Sequence[str]) -> Iterator[tuple[str, Sequence[object] | Broken]]:
        texts = self.objects.split(b"\n") if isinstance(self.objects, bytes) else self.objects
        for number, text in enumerate(texts, self.first):
            if text is None or text.strip():
                yield f"{self.unit} {number}", _values(text, keys)


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file. Raises `ProblemError` if it ends too early or its values are not separated as they must
    be; what is wrong inside a value makes that an invalid record."""
    start = _start(path)
    by_name = "jsonl" in path.name.lower().split(".")
    if by_name or (not start.startswith(b"[") and start.split(b"\n", 1)[0].strip() != b"{"):
        yield from _lines(path)
        return
    group: list[bytes | None] = []
    size, first = 0, 1
    with open_stream(path) as stream:
        scanner = _Scanner(path, stream.file)
        for text in scanner.array() if start.startswith(b"[") else scanner.sequence():
            group.append(text)
            size += len(text or b"")
            if size >= CHUNK_BYTES:
                yield JsonChunk(source=str(path), unit="record", first=first, objects=group, done=stream.done())
                first += len(group)
                group, size = [], 0
    if group:
        yield JsonChunk(source=str(path), unit="record", first=first, objects=group, done=1.0)


def _lines(path: Path) -> Iterator[Chunk]:
    with open_stream(path) as stream:
        for block, number in line_blocks(stream.file, b"\n"):
            if block is None:
                yield large_line(str(path), number, stream.done())
            else:
                lines = block.removeprefix(BOM) if number == 1 else block
                yield JsonChunk(source=str(path), unit="line", first=number, objects=lines, done=stream.done())


def _start(path: Path) -> bytes:
    """The first line that is not blank, or as much of it as shows the form of the file."""
    start = b""
    with open_stream(path) as stream:
        while not start and (block := stream.file.read(_START)):
            start = block.removeprefix(BOM).lstrip()
        return start + stream.file.readline(_START)


def _values(text: bytes | None, keys: Sequence[str]) -> Sequence[object] | Broken:
    if text is None:
        return Broken(too_large())
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Broken(f"it is not JSON: {error}")
    if not isinstance(record, dict):
        return Broken(f"it is a JSON {type(record).__name__}, not an object")
    if not keys:
        return [record]
    if missing := [key for key in keys if key not in record]:
        texts = tuple(key for key, value in record.items() if isinstance(value, str))
        return Broken(lacks(missing[0]), texts or tuple(record))
    return [record[key] for key in keys]


def _inside(depth: int) -> bytes:
    """The pattern of what stands inside brackets: whole strings, whole brackets of so many levels, and all else."""
    brackets = rb"|[\[{]" + _inside(depth - 1) + rb"[\]}]" if depth else b""
    return rb'(?:[^"\[\]{}]++|"(?:[^"\\]++|\\.)*+"' + brackets + rb")*+"


_SPACE = re.compile(rb"[ \t\r\n]*+")
_CHARACTERS = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)  # of a string
_INSIDE = re.compile(_inside(2), re.DOTALL)  # more levels are rare, and found one by one
_WORD = re.compile(rb'[^"\[\]{},\ \t\r\n]*+')  # a number, true, null, or what is none of these


class _Scanner:
    """Values one after the other in a file, as bytes, found by brackets and quotes; None for one too large."""

    def __init__(self, path: Path, file: IO[bytes]):
        self._path = path
        self._file = file
        self._block = file.read(CHUNK_BYTES + len(BOM)).removeprefix(BOM)
        self._place = 0
        self._lines = 1  # before the block, and one
        self._values = 0
        self._inside = ""

    def array(self) -> Iterator[bytes | None]:
        """The elements of the one array that the file must be."""
        self._inside = "the array"
        self._next()
        self._take()
        more = self._next() != b"]"
        while more:
            yield self._value()
            mark = self._next()
            if not mark:
                raise self._truncated()
            if mark not in (b",", b"]"):
                raise self._problem("separator", "a comma or the closing bracket is missing")
            if more := mark == b",":
                self._take()
        self._take()
        if self._next():
            raise self._problem("trailing", "there is more behind the end of the array")

    def sequence(self) -> Iterator[bytes | None]:
        """Values with nothing but white space between them."""
        self._inside = "an object"
        while self._next():
            yield self._value()

    def _value(self) -> bytes | None:
        if self._next() in (b",", b"]", b"}"):
            raise self._problem("value", f"{self._next().decode()!r} stands where a value should")
        kept = bytearray()
        size = 0
        for piece in self._pieces():
            size += len(piece)
            if size <= MAX_RECORD_BYTES:
                kept += piece
        self._values += 1
        return bytes(kept) if size <= MAX_RECORD_BYTES else None

    def _pieces(self) -> Iterator[bytes]:
        """The pieces of the value that begins here."""
        depth = 0
        while True:
            mark = self._take()
            yield mark
            if mark == b'"':
                yield from self._rest_of_string()
            elif mark in (b"{", b"["):
                depth += 1
            elif mark in (b"}", b"]"):
                depth -= 1
            if not depth:
                break
            yield from self._run(_INSIDE)
        if mark not in (b'"', b"}", b"]"):
            yield from self._run(_WORD)

    def _rest_of_string(self) -> Iterator[bytes]:
        mark = b""
        while mark != b'"':
            yield from self._run(_CHARACTERS)
            mark = self._take()
            yield mark
            if mark == b"\\":
                yield self._take()  # the escaped character, which the block before did not hold

    def _run(self, pattern: re.Pattern[bytes]) -> Iterator[bytes]:
        """What `pattern` matches from here on, over the borders of blocks."""
        while self._more():
            start, self._place = self._place, _end(pattern, self._block, self._place)
            yield self._block[start : self._place]
            if self._place < len(self._block):
                return

    def _next(self) -> bytes:
        """The next byte that is no white space, which stays; none at the end."""
        while self._more():
            self._place = _end(_SPACE, self._block, self._place)
            if self._place < len(self._block):
                return self._block[self._place : self._place + 1]
        return b""

    def _take(self) -> bytes:
        if not self._more():
            raise self._truncated()
        self._place += 1
        return self._block[self._place - 1 : self._place]

    def _more(self) -> bool:
        """Whether there is another byte; it is in the block then."""
        if self._place == len(self._block):
            self._lines += self._block.count(b"\n")
            self._block, self._place = self._file.read(CHUNK_BYTES), 0
        return bool(self._block)

    def _truncated(self) -> ProblemError:
        return self._problem("truncated", f"the file ends inside {self._inside}: it is cut off or lacks a bracket")

    def _problem(self, kind: str, why: str) -> ProblemError:
        """What is wrong here, and where that is."""
        line = self._lines + self._block.count(b"\n", 0, self._place)
        why, fix = f"after record {self._values}: {why}", "copy it again, or write one object a line"
        return ProblemError.of("--input", f"{self._path}:{line}", why, fix, kind, limit=self._values)


def _end(pattern: re.Pattern[bytes], block: bytes, place: int) -> int:
    found = pattern.match(block, place)
    assert found is not None, "these patterns match nothing, too"
    return found.end()
