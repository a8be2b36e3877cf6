"""Threads that fill files with tensors, slice by slice.

Owns what `--workers` means, for all formats alike: each slice is read, converted and written by one thread, whatever
tensor and file it belongs to, so what is written does not hang on how many there are. Memory is that of a thread's
slice, at most `SLICES_HELD` times `SLICE`, for each; only a source that cannot be read by slices holds a whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from cordee.tensors.views import Index, View
from cordee.weights.codec import slices
from cordee.weights.regions import Destination
from cordee.weights.staging import Staging

SLICES_HELD = 7  # that a thread takes at most, measured: read, of another type, in order, and kept by the allocator


@dataclass(frozen=True)
class Move:
    """A tensor to be written, as `dtype`, to one destination or to several that hold the same."""

    view: View
    dtype: torch.dtype
    destinations: Sequence[Destination]


class Workers:
    """`count` threads, and one more, that read, convert and write into what `staging` makes: while all but one write,
    another reads.
    """

    def __init__(self, staging: Staging, count: int):
        self._staging = staging
        self._pool = ThreadPoolExecutor(1 + count)

    def carry(self, moves: Iterable[Move]) -> None:
        """Write all of `moves` and return when that is done. ProblemError if they cannot be written."""
        tasks = [(move, index) for move in moves for index in slices(tuple(move.view.shape), move.dtype.itemsize)]
        for _ in self._pool.map(self._carry, *zip(*tasks, strict=True)):
            pass  # results are None; the loop raises what a thread has raised

    def _carry(self, move: Move, index: Index) -> None:
        tensor = move.view.read(index).to("cpu", move.dtype)
        try:
            for destination in move.destinations:
                destination.write(tensor, index[0].start if index else 0)
        except OSError as error:
            raise self._staging.problem(error) from error

    def close(self) -> None:
        """End the threads. What they are at is finished, what waits is not begun."""
        self._pool.shutdown(cancel_futures=True)
