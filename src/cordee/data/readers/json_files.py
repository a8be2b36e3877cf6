"""JSON: one object a line (.jsonl, .json), one array of objects, or objects one after the other (.json).

Owns finding where objects begin and end, without reading a file whole and without parsing, which is the workers'.
Which of the forms a .json has is told by its beginning: `[` is an array, and a first line that is only `{` means that
objects take several lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cordee.data.readers.chunk import CHUNK_BYTES, MISSING, Broken, Chunk, Invalid, Row, valid_rows
from cordee.data.readers.stream import BOM, line_blocks, open_stream
from cordee.errors import Problem, ProblemError

EXTENSIONS = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


@dataclass(frozen=True, kw_only=True)
class JsonChunk(Chunk):
    """Objects, not yet parsed, each with the number of its line (`unit` "line") or its own (`unit` "record")."""

    source: str
    unit: str
    first: int
    objects: bytes | list[bytes]  # whole lines, or one object each

    def rows(self, keys: Sequence[str]) -> tuple[list[Row], list[Invalid]]:
        texts = self.objects.split(b"\n") if isinstance(self.objects, bytes) else self.objects
        numbered = ((self.first + i, text) for i, text in enumerate(texts) if text and not text.isspace())
        return valid_rows(keys, ((f"{self.source}: {self.unit} {n}", _values(text, keys)) for n, text in numbered))


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file."""
    if ".jsonl" in path.suffixes or _has_object_per_line(path):
        for block, number, done in line_blocks(path):
            yield JsonChunk(source=str(path), unit="line", first=number, objects=block, done=done)
        return
    group: list[bytes] = []
    size, first, done = 0, 1, 0.0
    for text, done in _objects(path):
        group.append(text)
        size += len(text)
        if size >= CHUNK_BYTES:
            yield JsonChunk(source=str(path), unit="record", first=first, objects=group, done=done)
            first += len(group)
            group, size = [], 0
    if group:
        yield JsonChunk(source=str(path), unit="record", first=first, objects=group, done=done)


def _values(text: bytes, keys: Sequence[str]) -> Sequence[object] | Broken:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Broken(f"it is not JSON: {error}")
    if not isinstance(record, dict):
        return Broken(f"it is a JSON {type(record).__name__}, not an object")
    return [record.get(key, MISSING) for key in keys]


def _has_object_per_line(path: Path) -> bool:
    with open_stream(path) as stream:
        start = stream.file.read(CHUNK_BYTES).removeprefix(BOM).lstrip()
    return not start.startswith(b"[") and start.split(b"\n", 1)[0].strip() != b"{"


def _objects(path: Path) -> Iterator[tuple[bytes, float]]:
    """The outermost objects of an array, or those that follow each other, as bytes with the share of the file read.

    Only brackets and strings are looked at: memory holds one object, and one that is broken inside does not hide the
    next. Raises `ProblemError` if the file ends inside an object.
    """
    structure = re.compile(rb'[{}"]')
    in_string = re.compile(rb'["\\]')
    buffer, begin, place, depth, quoted = b"", 0, 0, 0, False
    with open_stream(path) as stream:
        while block := stream.file.read(CHUNK_BYTES):
            # Keep what belongs to an object that is still open.
            keep = begin if depth else place
            buffer, begin, place = buffer[keep:] + block, 0, place - keep
            while found := (in_string if quoted else structure).search(buffer, place):
                mark, place = found.group(), found.end()
                if quoted:
                    if mark == b"\\":
                        if place == len(buffer):
                            place -= 1  # the escaped character comes with the next block
                            break
                        place += 1
                    else:
                        quoted = False
                elif mark == b'"':
                    quoted = True
                elif mark == b"{":
                    begin = place - 1 if depth == 0 else begin
                    depth += 1
                elif depth:
                    depth -= 1
                    if depth == 0:
                        yield buffer[begin:place], stream.done()
            else:
                place = len(buffer)
    if depth:
        why = "it ends inside an object, so it is cut off or a bracket is missing"
        raise ProblemError([Problem("--input", path, why, "copy it again, or write one object a line")])
