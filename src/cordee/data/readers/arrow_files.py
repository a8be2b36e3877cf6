"""Tables of Apache Arrow: Parquet, and Arrow's own files and streams (as `datasets` saves them).

Owns reading their text columns a few rows at a time."""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee.data.readers.chunk import Chunk, missing_columns, numbered, table_chunks
from cordee.errors import Problem, ProblemError, raise_all
from cordee.log import logger

if TYPE_CHECKING:
    import pyarrow

EXTENSIONS = (".parquet", ".arrow")
_ROWS = 64  # read at a time
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read(path: Path, keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of one file. Raises `ProblemError` if it is damaged, or has no such columns of text."""
    import pyarrow

    rows = _parquet_rows if path.suffix.lower() == ".parquet" else _arrow_rows
    try:
        yield from table_chunks(str(path), numbered(rows(path, list(keys))))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        why = f"it is damaged or no {path.suffix[1:]} file: {error}"
        raise ProblemError.of("--input", path, why, "copy it again", "corrupt") from error


def _parquet_rows(path: Path, keys: list[str]) -> Iterator[tuple[tuple[object, ...], float]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        _check_columns(path, file.schema_arrow, keys)
        total = max(file.metadata.num_rows, 1)
        count = 0
        for batch in file.iter_batches(_ROWS, columns=keys or None, use_threads=False):
            count += batch.num_rows
            yield from ((row, count / total) for row in _rows(batch, keys))


def _arrow_rows(path: Path, keys: list[str]) -> Iterator[tuple[tuple[object, ...], float]]:
    import pyarrow
    from pyarrow import ipc

    with pyarrow.memory_map(str(path)) as file:
        size = max(file.size(), 1)
        for batch in _record_batches(ipc, file, path, keys):
            done = file.tell() / size
            # Places that lie outside of the file would end the process.
            (batch.select(keys) if keys else batch).validate(full=True)
            for start in range(0, batch.num_rows, _ROWS):
                yield from ((row, done) for row in _rows(batch.slice(start, _ROWS), keys))


def _record_batches(ipc: Any, file: "pyarrow.MemoryMappedFile", path: Path, keys: list[str]) -> Iterator[Any]:
    """The batches of an Arrow file, or of a stream: the two begin differently and share their extension."""
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    reader = ipc.open_file(file) if is_file else ipc.open_stream(file)
    _check_columns(path, reader.schema, keys)
    if is_file:
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        return
    yield from reader
    file.seek(-len(_END_OF_STREAM), io.SEEK_END)
    if file.read() != _END_OF_STREAM:  # the format lets writers leave it out
        logger.warning("%s has no end-of-stream mark: whoever wrote it may have been killed before the end", path)


def _rows(batch: "pyarrow.RecordBatch", keys: list[str]) -> Iterator[tuple[object, ...]]:
    if not keys:
        return ((record,) for record in batch.to_pylist())
    return zip(*(batch.column(key).to_pylist() for key in keys), strict=True)


def _check_columns(path: Path, schema: "pyarrow.Schema", keys: list[str]) -> None:
    columns = [name for name in schema.names if schema.get_field_index(name) >= 0]  # of one name once
    problems = list(missing_columns(str(path), keys, columns))
    for key in keys:
        # Large strings and dictionaries of strings are text, too.
        if key in columns and "string" not in (kind := str(schema.field(key).type)):
            why = f"in {path} this column is {kind}, not text"
            problems.append(Problem("--json-keys", key, why, "give a column of text", "type", limit=kind))
    raise_all(problems)
