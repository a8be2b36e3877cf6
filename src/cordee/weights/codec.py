"""The two ends of every transfer of weights.

Owns what a format has to offer to be read from (`Source`) and written to (`Sink`). Both speak of one model in
canonical names and global shapes; which files, names and layouts are behind them is each format's own affair."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from cordee.families.registry import ModelSpec
from cordee.tensors.views import Index, Leaf, Shape, View, normalise, whole
from cordee.weights.regions import COPIED

SLICE = COPIED  # bytes that are moved at a time: small enough for caches, large enough for disks


def slices(shape: Shape, itemsize: int) -> Iterator[Index]:
    """All of a tensor of `shape` in runs of rows of about `SLICE` bytes."""
    if not shape:
        yield ()
        return
    rows = max(1, SLICE // max(1, itemsize * torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *whole(shape[1:]))


def type_of(view: View) -> torch.dtype:
    """The type of what a view reads; one element is read for that."""
    return view.read(tuple(slice(0, min(1, size)) for size in view.shape)).dtype


def is_of_weights(dtype: torch.dtype | None) -> bool:
    """Whether weights are stored in this type as they are: not quantised, and no numbers of another kind."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class PlannedFile:
    """A file with weights to be written: its path in the output directory, and the bytes of its tensors."""

    path: str
    nbytes: int


class Source(ABC):
    """Weights that can be read, whole or in part, one tensor at a time.

    notes: what reading left out or corrected, in words; the caller reports it once.
    assets: directory with the tokenizer and other files that go with the weights, None if none is known.
    exact: whether a value has the same bits in whichever slice it is read; sums and products differ by a rounding."""

    spec: ModelSpec
    notes: tuple[str, ...] = ()
    assets: Path | None = None
    exact: bool = True

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.spec.shapes()

    def names(self) -> list[str]:
        """Canonical names of all parameters, in the order of the forward."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a parameter."""
        return self._shapes[name]

    def drop_values(self, option: str) -> None:
        """Be a language model without the value head that it may have. ProblemError, of `option`, if it is none."""
        self.spec = self.spec.without_values(option, notes := [])
        self.notes = (*self.notes, *notes)
        self._shapes = {name: shape for name, shape in self._shapes.items() if name != "score.weight"}

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Type in which a parameter is stored."""

    @abstractmethod
    def view(self, name: str) -> View:
        """A parameter, to be read by slices onto the CPU."""

    def tensor(self, name: str, index: Sequence[slice] | None = None) -> Tensor:
        """A parameter on the CPU, or the part of it that `index` (slices of step 1) cuts out.

        The result may share memory with the file behind it and must not be written to."""
        return self.view(name).read(normalise(index, self.shape(name)))

    def copy_into(self, out: Tensor, name: str, index: Sequence[slice] | None = None) -> None:
        """Copy a parameter, or the part at `index`, into `out` of the same shape, converting its type."""
        self.view(name).read_into(out, normalise(index, self.shape(name)))

    def skip(self, name: str) -> None:  # noqa: B027 - nothing is to be done where each process reads for itself
        """Read nothing of a parameter. Whoever reads walks all names in order and skips those that it does not need:
        reading some sources is collective."""


class Sink(ABC):
    """Where weights go. Used as a context: left normally it is complete, left by an exception it leaves nothing."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Take one whole parameter."""
        self.take(name, Leaf(tuple(tensor.shape), lambda index: tensor.detach()[index]))

    @abstractmethod
    def take(self, name: str, view: View) -> None:
        """Take one whole parameter, which is read by the slices that the format needs."""

    @abstractmethod
    def close(self) -> None:
        """Complete what is written and give it its name."""

    @abstractmethod
    def abort(self) -> None:
        """Remove what has been written."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if kind is not None:
            self.abort()
            return
        try:
            self.close()
        except BaseException:
            self.abort()
            raise
