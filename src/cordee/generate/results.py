"""Files of results: one of an earlier run is never replaced, and a full disk is a problem like any other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cordee import launch
from cordee.errors import ProblemError, raise_all
from cordee.files import unwritable


def check_new(path: str | None) -> None:
    """ProblemError if `--output` names a file that exists, or that this process has to write and cannot; None is no
    file."""
    if path is None:
        return
    if os.path.lexists(path):
        raise ProblemError.of("--output", path, "there is such a file already", "give the name of a new one", "taken")
    if launch.rank_info().rank == 0:  # the machines of others need not have the folder
        raise_all(unwritable("--output", path, Path(path).parent))


class NewFile:
    """A file that was not there before, written line by line; its folder is made if need be. ProblemError for what
    keeps it from being written."""

    def __init__(self, path: str):
        self._path = path
        with self._as_problems():
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "x", encoding="utf-8")  # noqa: SIM115 - closed by `close`

    def write(self, line: str) -> None:
        """Add a line, which is in the file when this returns."""
        with self._as_problems():
            self._file.write(line + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close; a failure has been raised by `write` already."""
        with suppress(OSError):
            self._file.close()

    @contextmanager
    def _as_problems(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            fix = "give the name of a new file in a place that can be written to and has room"
            raise ProblemError.of("--output", self._path, f"it is not writable: {error}", fix, "unwritable") from error
