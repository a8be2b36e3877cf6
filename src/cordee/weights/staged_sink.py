"""What all formats that are written as files have in common.

Owns the life of such a sink (each parameter once, at the end all of it or nothing) and what `--workers` means: each
slice is read, converted and written by one thread, whatever tensor and file it belongs to, so the number of threads
does not change what is written. Memory is that of a thread's slice, at most `SLICES_HELD` times `SLICE`, for each; only
a source that cannot be read by slices holds a whole tensor. Which files there are, and where in them a tensor goes, is
the format's."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from cordee.families.registry import ModelSpec
from cordee.tensors.views import Index, View
from cordee.weights.codec import Sink, slices, type_of
from cordee.weights.regions import Destination
from cordee.weights.staging import ASSETS, Staging

SLICES_HELD = 7  # that a thread takes at most, measured: read, of another type, in order, and kept by the allocator


@dataclass(frozen=True)
class Move:
    """A tensor to be written, as `dtype`, to one destination or to several that hold the same."""

    view: View
    dtype: torch.dtype
    destinations: Sequence[Destination]


@dataclass(frozen=True)
class Output:
    """Where a model is written, and how.

    assets: directory from which files that go with the weights are copied.
    workers: threads that write, while one more reads.
    overwrite: replace a model directory at `path`."""

    path: Path
    assets: Path | None = None
    workers: int = 1
    overwrite: bool = False


class StagedSink(Sink):
    """The weights of `spec` in the making; they appear under their path when they are complete.

    dtypes: in which they are written, by canonical name; one that is not there is kept as it is put.
    ProblemError if something is at the path that must not be replaced."""

    patterns: ClassVar[Iterable[str]] = ASSETS  # of the assets' names

    def __init__(self, output: Output, spec: ModelSpec, dtypes: Mapping[str, torch.dtype]):
        self.spec = spec
        self._output = output
        self._dtypes = dtypes
        self._written: set[torch.dtype] = set()
        self._shapes = spec.shapes()
        self._remaining = set(self._shapes)
        self._staging = Staging(output.path, overwrite=output.overwrite)
        self._pool = ThreadPoolExecutor(1 + output.workers)
        self._files = ExitStack()  # those that stay open meanwhile
        try:
            with self._staging.writing():
                self.begin(self._staging.scratch)
        except BaseException:
            self.abort()
            raise

    def begin(self, folder: Path) -> None:
        """Make the files that are laid out beforehand, in `folder`. OSError if they cannot be made."""

    @abstractmethod
    def moves(self, name: str, view: View, dtype: torch.dtype) -> Iterable[Move]:
        """Where the parts of a parameter go. OSError if there is no room for them."""

    def finish(self) -> None:
        """Write what comes after the tensors. OSError if it cannot be written."""
        self._staging.write_config(self.spec.hf_config, self._written)

    def take(self, name: str, view: View) -> None:
        assert name in self._remaining, f"{name} is unknown or was put before"
        assert tuple(view.shape) == self._shapes[name], f"{name}: {tuple(view.shape)} != {self._shapes[name]}"
        self._remaining.remove(name)
        dtype = self._dtypes.get(name) or type_of(view)
        self._written.add(dtype)
        with self._staging.writing():
            moves = list(self.moves(name, view, dtype))
        tasks = [(move, index) for move in moves for index in slices(tuple(move.view.shape), dtype.itemsize)]
        for _ in self._pool.map(self._carry, *zip(*tasks, strict=True)):
            pass  # results are None; the loop raises what a thread has raised

    def _carry(self, move: Move, index: Index) -> None:
        tensor = move.view.read(index).to("cpu", move.dtype)
        with self._staging.writing():
            for destination in move.destinations:
                destination.write(tensor, index[0].start if index else 0)

    def close(self) -> None:
        assert not self._remaining, f"never put: {sorted(self._remaining)}"
        self._end_threads()
        with self._staging.writing():
            self._files.close()
            self.finish()
            self._staging.copy_assets(self._output.assets, self.patterns)
        self._staging.publish()

    def abort(self) -> None:
        self._end_threads()
        self._files.close()
        self._staging.discard()

    def _end_threads(self) -> None:
        """What they are at is finished, what waits is not begun."""
        self._pool.shutdown(cancel_futures=True)
