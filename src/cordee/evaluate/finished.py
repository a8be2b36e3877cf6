"""Results that outlive a killed evaluation.

Owns the file in which they are kept, a line of JSON each. Knows neither what was computed nor how."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from cordee.checkpoint.directory import MANIFEST
from cordee.checkpoint.storage import Location
from cordee.errors import ProblemError
from cordee.evaluate.requests import Piece, digest
from cordee.files import append_durably, end_last_line


class Finished:
    """Results by the key of what was computed, in a file from which an evaluation of the same `model` resumes.

    path: None keeps nothing. model: identifies the weights; results of other models are left alone.
    ProblemError if the file cannot be read or written."""

    def __init__(self, path: Path | None, model: str = ""):
        self._path = path
        self._model = model
        self.results: dict[str, Any] = {}
        if path is not None and path.exists():
            self._read(path)

    def add(self, results: Mapping[str, Any]) -> None:
        """Keep `results`, which are on the disk when this returns."""
        if self._path is None:
            return
        lines = "".join(json.dumps([self._model, key, result]) + "\n" for key, result in results.items())
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            append_durably(self._path, lines)
        except OSError as error:
            why, fix = f"it cannot be written: {error}", "make room or allow it, or give --output another name"
            raise ProblemError.of("--output", self._path, why, fix, "unwritable") from error

    def remove(self) -> None:
        """Remove the file: there is nothing left to resume."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _read(self, path: Path) -> None:
        try:
            end_last_line(path)
            for line in path.read_text(encoding="utf-8").splitlines():
                model, key, result = json.loads(line)
                if not (isinstance(key, str) and any(kind.is_result(result) for kind in get_args(Piece))):
                    raise ValueError(f"{line[:80]} is no result")
                if model == self._model:
                    self.results[key] = result
        except (OSError, ValueError, TypeError, RecursionError) as error:
            why = f"it does not hold the results of an interrupted evaluation: {error}"
            fix = "remove that file, or give --output another name"
            raise ProblemError.of("--output", path, why, fix, "corrupt") from error


def fingerprint_files(location: Location) -> str:
    """Identifies what is in a file, or in all files of a directory: names, sizes and times of the last change; in a
    store, names, sizes and the manifests of checkpoints, which have checksums."""
    if (path := location.local) is None:
        states: list[tuple[object, ...]] = list(_objects(location))
    else:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        stats = [(str(file), file.stat()) for file in files if file.is_file()]
        states = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    assert states, f"nothing is in {location}, of which a model was read"
    return digest(json.dumps(states).encode())


def _objects(location: Location) -> Iterator[tuple[object, ...]]:
    if (size := location.size()) is not None:
        yield location.url, size, location.read_bytes().hex() if location.name == MANIFEST else ""
    else:
        for child in location.iterdir():
            yield from _objects(child)
