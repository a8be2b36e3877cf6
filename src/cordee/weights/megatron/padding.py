"""The rows that fill a vocabulary up to a multiple.

Owns one more operation of the rules' algebra: reading cuts the filling off, writing makes it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cordee.tensors.views import Index, Join, Leaf, Split, View

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
    def inverse(self) -> "Pad":
        return Pad(self.rows, self.padded, self.tail)

    def apply(self, views: Sequence[View]) -> list[View]:
        return Split(0, (self.rows, self.padded - self.rows)).apply(views)[:1]


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
        filling = self.padded - self.rows
        first = self.rows - filling if self.tail and filling <= self.rows else None

        def fill(index: Index) -> "Tensor":
            cut, *rest = index
            if first is not None:
                return view.read((slice(first + cut.start, first + cut.stop), *rest))
            last = view.read((slice(self.rows - 1, self.rows), *rest))
            return last.expand(cut.stop - cut.start, *last.shape[1:])

        return Join(0, (self.rows, filling)).apply([view, Leaf((filling, *view.shape[1:]), fill)])
