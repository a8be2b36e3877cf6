"""What all formats that are written as files have in common.

Owns the life of such a sink: each parameter once, threads that fill the files, at the end all of it or nothing. What
files there are, and where in them a tensor goes, is the format's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from cordee.tensors.views import View
from cordee.weights.codec import Sink
from cordee.weights.staging import COMPANIONS, Staging
from cordee.weights.workers import Move, Workers


class StagedSink(Sink):
    """A model in the making, in `staging`; `workers` threads write.

    names: the parameters that it takes.
    companions: directory from which files that go with the weights are copied, those of `patterns`.
    """

    def __init__(
        self,
        staging: Staging,
        names: Iterable[str],
        companions: Path | None,
        workers: int,
        patterns: Iterable[str] = COMPANIONS,
    ):
        self._staging = staging
        self._remaining = set(names)
        self._companions = companions
        self._patterns = patterns
        self._workers = Workers(staging, workers)
        self._files = ExitStack()  # those that stay open meanwhile
        try:
            self.begin()
        except OSError as error:
            self.abort()
            raise staging.problem(error) from error

    def begin(self) -> None:
        """Make the files that are laid out beforehand. OSError if they cannot be made."""

    @abstractmethod
    def moves(self, name: str, view: View) -> Iterable[Move]:
        """Where the parts of a parameter go. ProblemError if there is no room for them."""

    @abstractmethod
    def finish(self) -> None:
        """Write what comes after the tensors. OSError if it cannot be written."""

    def take(self, name: str, view: View) -> None:
        assert name in self._remaining, f"{name} is unknown or was put before"
        self._remaining.remove(name)
        self._workers.carry(self.moves(name, view))

    def close(self) -> None:
        assert not self._remaining, f"never put: {sorted(self._remaining)}"
        self._workers.close()
        try:
            self._files.close()
            self.finish()
            self._staging.copy_companions(self._companions, self._patterns)
        except OSError as error:
            raise self._staging.problem(error) from error
        self._staging.publish()

    def abort(self) -> None:
        self._workers.close()
        self._files.close()
        self._staging.discard()
