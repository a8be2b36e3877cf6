"""What `datasets.load_dataset` loads, with the user's own arguments to it.

Owns `--hf-datasets-params`. The library is an extra; nothing else here needs it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cordee.data.readers.chunk import MISSING, Chunk, missing_columns, numbered, table_chunks
from cordee.errors import ProblemError, raise_all
from cordee.files import read_json

_OPTION = "--hf-datasets-params"
_ROWS = 64  # read at a time


def read_params(path: Path) -> dict[str, Any]:
    """The arguments in the file. Raises `ProblemError` if it holds no JSON object."""
    try:
        params = read_json(path)
    except (OSError, ValueError) as error:
        fix = 'write the arguments as JSON, for example {"path": "json", "data_files": "x.jsonl", "streaming": true}'
        raise ProblemError.of(_OPTION, path, f"it cannot be read as JSON: {error}", fix) from error
    if not isinstance(params, dict):
        raise ProblemError.of(_OPTION, path, "it is no JSON object", "write {name: value, ...}")
    return params


def read(params: dict[str, Any], keys: Sequence[str]) -> Iterator[Chunk]:
    """The chunks of the dataset (of its split "train", if it has several)."""
    try:
        import datasets
    except ImportError as error:
        why, fix = "it needs the library `datasets`, which is not installed", 'pip install "cordee[datasets]"'
        raise ProblemError.of(_OPTION, None, why, fix, "missing", limit="datasets") from error
    try:
        loaded = datasets.load_dataset(**params)
    except Exception as error:  # its errors depend on the dataset
        why = f"the dataset cannot be loaded: {type(error).__name__}: {error}"
        raise ProblemError.of(_OPTION, params, why, "correct the arguments of load_dataset", "unreadable") from error
    if isinstance(loaded, dict):
        if "train" not in loaded:
            why = f"it has the splits {', '.join(loaded)} and no train"
            raise ProblemError.of(_OPTION, params, why, 'choose one: "split": ...')
        loaded = loaded["train"]
    name = str(params.get("path", "dataset"))
    if loaded.column_names and keys:
        raise_all(missing_columns(name, keys, loaded.column_names))
        loaded = loaded.select_columns(list(keys))
    yield from table_chunks(name, numbered(_rows(loaded, keys)))


def _rows(loaded: Any, keys: Sequence[str]) -> Iterator[tuple[tuple[object, ...], float]]:
    total = getattr(loaded, "num_rows", None)
    count = 0
    for batch in loaded.iter(batch_size=_ROWS):
        size = len(next(iter(batch.values())))
        count += size
        if not keys:
            rows = zip(*batch.values(), strict=True)
            yield from (((dict(zip(batch, row, strict=True)),), count / total if total else 0.0) for row in rows)
            continue
        columns = [batch.get(key, [MISSING] * size) for key in keys]
        yield from ((row, count / total if total else 0.0) for row in zip(*columns, strict=True))
