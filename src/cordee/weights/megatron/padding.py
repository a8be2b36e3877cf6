"""The rows that fill a vocabulary up to a multiple.

Owns one more operation of the rules' algebra: reading cuts the filling off, writing makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cordee.tensors.views import Index, View

if TYPE_CHECKING:
    from torch import Tensor


def padded_rows(rows: int, multiple: int) -> int:
    """`rows`, rounded up to a multiple."""
    return -(-rows // multiple) * multiple


@dataclass(frozen=True)
class Crop:
    """The first `rows` of `padded` rows. The inverse fills up: with the last row, or with the `tail`, the last rows."""

    rows: int
    padded: int
    tail: bool = False
    inputs: int = field(default=1, init=False)

    @property
    def inverse(self) -> Pad:
        return Pad(self.rows, self.padded, self.tail)

    def apply(self, views: Sequence[View]) -> list[View]:
        (view,) = views
        assert view.shape[0] == self.padded, f"{self} of shape {view.shape}"
        return [_Cropped(view, self.rows)]


@dataclass(frozen=True)
class Pad:
    """The inverse of `Crop`."""

    rows: int
    padded: int
    tail: bool = False
    inputs: int = field(default=1, init=False)

    @property
    def inverse(self) -> Crop:
        return Crop(self.rows, self.padded, self.tail)

    def apply(self, views: Sequence[View]) -> list[View]:
        (view,) = views
        assert view.shape[0] == self.rows, f"{self} of shape {view.shape}"
        return [_Padded(view, self.padded, self.tail)]


class _Cropped(View):
    def __init__(self, view: View, rows: int):
        self.view = view
        self.shape = (rows, *view.shape[1:])

    def read(self, index: Index) -> Tensor:
        return self.view.read(index)

    def read_into(self, out: Tensor, index: Index) -> None:
        self.view.read_into(out, index)


class _Padded(View):
    def __init__(self, view: View, padded: int, tail: bool):
        self.view = view
        self.shape = (padded, *view.shape[1:])
        self.tail = tail

    def read(self, index: Index) -> Tensor:
        rows, *rest = index
        real = self.view.shape[0]
        if rows.stop <= real:
            return self.view.read(index)
        held = self.view.read((slice(min(rows.start, real), real), *rest))
        filling = slice(max(rows.start, real), rows.stop)
        out = held.new_empty((rows.stop - rows.start, *held.shape[1:]))
        out[: len(held)] = held
        out[len(held) :] = self._filling(filling, tuple(rest))
        return out

    def _filling(self, rows: slice, rest: Index) -> Tensor:
        """Rows past the end; with `tail`, row i is row i - (number of rows past the end), if there are as many."""
        real, padded = self.view.shape[0], self.shape[0]
        back = padded - real
        if self.tail and back <= real:
            return self.view.read((slice(rows.start - back, rows.stop - back), *rest))
        return self.view.read((slice(real - 1, real), *rest))
