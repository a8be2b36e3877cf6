"""From a dataset to the micro-batches of each step.

Owns which samples a step takes and reading them ahead. The place in the data is one number, the samples consumed so
far: whatever the number of ranks and the size of micro-batches, the same samples come next. Knows nothing of steps,
process groups or models."""

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from cordee.data.batch import Batch, Sample
from cordee.data.gpt_dataset import Dataset
from cordee.errors import ProblemError

Collate = Callable[[Sequence[Sample]], Batch]


class Loader:
    """Micro-batches of rank `rank` of `size`, a function of the samples consumed and nothing else.

    Micro-batches follow each other in the order of samples: one of `micro` samples on each rank takes the next
    `micro * size`, rank r the r-th `micro` of these. `order` "single" takes samples as the dataset numbers them,
    "cyclic" in a new permutation for every pass over the dataset (Megatron's cyclic sampler without data sharding, for
    one rank; its permutation depends on the ranks otherwise). With `num_workers` threads, the next step is read while
    the current one is computed."""

    def __init__(
        self,
        dataset: Dataset,
        collate: Collate,
        *,
        order: Literal["single", "cyclic"] = "single",
        rank: int = 0,
        size: int = 1,
        num_workers: int = 0,
    ):
        assert 0 <= rank < size
        self.dataset = dataset
        self.collate = collate
        self.rank, self.size = rank, size
        self._order = _Single(len(dataset)) if order == "single" else _Cyclic(len(dataset))
        self._threads = ThreadPoolExecutor(num_workers, "data") if num_workers else None
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}

    def next_step(self, consumed: int, global_batch_size: int, micro_batch_size: int | Sequence[int]) -> list[Batch]:
        """The micro-batches of the step that begins after `consumed` samples. Sizes may differ from step to step, and
        as a list, one for each micro-batch, within a step.

        Raises `ProblemError` if the dataset ends before the step does, or holds a token that `collate` refuses."""
        sizes = self._sizes(global_batch_size, micro_batch_size)
        parts = self._parts(consumed, sizes)
        self._order.require(consumed + global_batch_size)
        if self._threads is None:
            return [self._read(begin, count) for begin, count in parts]
        ready = [self._start(begin, count) for begin, count in parts]
        self._read_ahead(consumed + global_batch_size, sizes)
        return [future.result() for future in ready]

    def close(self) -> None:
        """Stop reading ahead."""
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _sizes(self, global_batch_size: int, micro_batch_size: int | Sequence[int]) -> Sequence[int]:
        """The size of each micro-batch of a rank."""
        sizes = micro_batch_size
        if isinstance(sizes, int):
            sizes = [sizes] * (global_batch_size // (sizes * self.size))
        assert sum(sizes) * self.size == global_batch_size, "a step is a whole number of micro-batches on every rank"
        return sizes

    def _parts(self, consumed: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """The first sample and the size of each micro-batch."""
        begins = itertools.accumulate((size * self.size for size in sizes), initial=consumed)
        return [(begin + self.rank * size, size) for begin, size in zip(begins, sizes, strict=False)]

    def _read(self, begin: int, count: int) -> Batch:
        indices = self._order.indices(np.arange(begin, begin + count))
        batch = self.collate([self.dataset[index] for index in indices.tolist()])
        return replace(batch, samples=torch.arange(begin, begin + count))

    def _start(self, begin: int, count: int) -> Future[Batch]:
        assert self._threads is not None
        return self._ahead.pop((begin, count), None) or self._threads.submit(self._read, begin, count)

    def _read_ahead(self, consumed: int, sizes: Sequence[int]) -> None:
        """Start on the step after this one, as if it were of the same sizes; forget what was guessed wrong."""
        for future in self._ahead.values():
            future.cancel()
        self._ahead.clear()
        parts = (part for part in self._parts(consumed, sizes) if self._order.holds(sum(part)))
        self._ahead = {part: self._start(*part) for part in parts}


class _Single:
    """Samples as the dataset numbers them, once."""

    def __init__(self, length: int):
        self.length = length

    def holds(self, end: int) -> bool:
        return end <= self.length

    def require(self, end: int) -> None:
        if not self.holds(end):
            why = f"the dataset has {self.length} samples, and the step needs the first {end}"
            fix = "build it for more samples, shorten the run, or take --dataloader-type cyclic"
            raise ProblemError.of("data", self.length, why, fix, "at least", limit=end)

    def indices(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        return places


class _Cyclic:
    """Every pass over the dataset in its own permutation, which follows from the number of the pass."""

    def __init__(self, length: int):
        self.length = length
        # A step lies in at most two passes, unless it is larger than the dataset.
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def holds(self, end: int) -> bool:
        return self.length > 0

    def require(self, end: int) -> None:
        if not self.holds(end):
            raise ProblemError.of("data", 0, "the dataset has no samples", "give it more text", "empty")

    def indices(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        passes, within = np.divmod(places, self.length)
        indices = np.empty_like(places)
        for number in np.unique(passes).tolist():
            chosen = passes == number
            indices[chosen] = self._permutation(number)[within[chosen]]
        return indices

    def _permute(self, number: int) -> npt.NDArray[np.int64]:
        return torch.randperm(self.length, generator=torch.Generator().manual_seed(number)).numpy()
