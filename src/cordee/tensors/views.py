"""Tensors read by slices, and invertible operations on them.

Owns a small algebra of invertible operations on tensors that are read by slices. Nothing is read before it is asked
for, so one description serves loading, saving, sharded reading and shape checks. Knows no parameter, no file format and
no placement, and never imports torch: it works with the methods of the tensors it is handed.

An operation takes the foreign tensors of one parameter and gives the canonical one; its inverse takes the canonical
one and gives the foreign ones. Both are made of five:

    Rearrange   split, permute and merge dims:  "(g r d) ... -> g r d ..."
    Split       cut one dim into parts
    Join        lay parts along one dim
    Each        operations side by side, each with its own tensors
    Chain       operations one after the other

An operation that does not fit these is a further class with `inputs`, `apply` and `inverse`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Index = tuple[slice, ...]
Range = tuple[int, int]


class View:
    """A tensor of known `shape` that is read by slices, one slice of step 1 for each dim."""

    shape: Shape

    def read(self, index: Index) -> Tensor:
        raise NotImplementedError

    def read_into(self, out: Tensor, index: Index) -> None:
        """Read `index` into `out`, without building the whole of it elsewhere where that can be avoided."""
        out.copy_(self.read(index))


@dataclass(frozen=True)
class Leaf(View):
    """A tensor held elsewhere: a file, a dict, a remote shard."""

    shape: Shape
    get: Callable[[Index], Tensor]

    def read(self, index: Index) -> Tensor:
        return self.get(index)


def whole(shape: Shape) -> Index:
    """The index of all of a tensor of `shape`."""
    return tuple(slice(0, size) for size in shape)


def normalise(index: Sequence[slice] | None, shape: Shape) -> Index:
    """`index` with explicit bounds for every dim of `shape`; None and missing slices take all of their dim."""
    given = tuple(index or ())
    assert len(given) <= len(shape), f"index {given} has more dims than shape {shape}"
    bounds = [s.indices(size) for s, size in zip(given, shape, strict=False)]
    assert all(step == 1 for _, _, step in bounds), f"index {given} has a step"
    return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds) + whole(shape[len(given) :])


def _replaced(index: Index, dim: int, start: int, stop: int) -> Index:
    return (*index[:dim], slice(start, stop), *index[dim + 1 :])


class Op(Protocol):
    """An invertible map from a list of tensors to a list of tensors; `inputs` is how many it takes."""

    @property
    def inputs(self) -> int: ...

    @property
    def inverse(self) -> Op: ...

    def apply(self, views: Sequence[View]) -> list[View]: ...


@dataclass(frozen=True)
class Split:
    """One tensor cut along `dim` into parts of `sizes`."""

    dim: int
    sizes: tuple[int, ...]
    inputs: int = field(default=1, init=False)

    @property
    def inverse(self) -> Join:
        return Join(self.dim, self.sizes)

    def apply(self, views: Sequence[View]) -> list[View]:
        (view,) = views
        assert view.shape[self.dim] == sum(self.sizes), f"{self} of shape {view.shape}"
        starts = accumulate(self.sizes, initial=0)
        return [_Part(view, self.dim, start, size) for start, size in zip(starts, self.sizes, strict=False)]


class _Part(View):
    def __init__(self, view: View, dim: int, start: int, size: int):
        self.view, self.dim, self.start = view, dim, start
        self.shape = (*view.shape[:dim], size, *view.shape[dim + 1 :])

    def _outer(self, index: Index) -> Index:
        cut = index[self.dim]
        return _replaced(index, self.dim, cut.start + self.start, cut.stop + self.start)

    def read(self, index: Index) -> Tensor:
        return self.view.read(self._outer(index))

    def read_into(self, out: Tensor, index: Index) -> None:
        self.view.read_into(out, self._outer(index))


@dataclass(frozen=True)
class Join:
    """Tensors of `sizes` along `dim`, laid one after the other."""

    dim: int
    sizes: tuple[int, ...]

    @property
    def inputs(self) -> int:
        return len(self.sizes)

    @property
    def inverse(self) -> Split:
        return Split(self.dim, self.sizes)

    def apply(self, views: Sequence[View]) -> list[View]:
        assert tuple(view.shape[self.dim] for view in views) == self.sizes, f"{self} of {[v.shape for v in views]}"
        return [_Joined(list(views), self.dim)]


class _Joined(View):
    def __init__(self, views: list[View], dim: int):
        first = views[0].shape
        self.views, self.dim = views, dim
        self.starts = list(accumulate((view.shape[dim] for view in views), initial=0))
        self.shape = (*first[:dim], self.starts[-1], *first[dim + 1 :])
        rest = {(*view.shape[:dim], *view.shape[dim + 1 :]) for view in views}
        assert len(rest) == 1, f"joined along dim {dim}: {[view.shape for view in views]}"

    def _parts(self, index: Index) -> Iterator[tuple[View, Index, int]]:
        """The parts that `index` meets: the part, the index inside it, and where it goes in the result."""
        cut = index[self.dim]
        for view, begin in zip(self.views, self.starts, strict=False):
            start, stop = max(cut.start, begin), min(cut.stop, begin + view.shape[self.dim])
            if start < stop:
                yield view, _replaced(index, self.dim, start - begin, stop - begin), start - cut.start

    def read(self, index: Index) -> Tensor:
        parts = list(self._parts(index))
        if not parts:
            return self.views[0].read(_replaced(index, self.dim, 0, 0))
        view, inner, _ = parts[0]
        first = view.read(inner)
        if len(parts) == 1:
            return first
        out = first.new_empty([cut.stop - cut.start for cut in index])
        out.narrow(self.dim, 0, first.shape[self.dim]).copy_(first)
        del first  # at most one part beside the result
        for view, inner, start in parts[1:]:
            view.read_into(out.narrow(self.dim, start, inner[self.dim].stop - inner[self.dim].start), inner)
        return out

    def read_into(self, out: Tensor, index: Index) -> None:
        for view, inner, start in self._parts(index):
            view.read_into(out.narrow(self.dim, start, inner[self.dim].stop - inner[self.dim].start), inner)


@dataclass(frozen=True)
class Each:
    """Operations side by side: each takes its own `inputs` of the tensors, in order."""

    ops: tuple[Op, ...]

    @property
    def inputs(self) -> int:
        return sum(op.inputs for op in self.ops)

    @property
    def inverse(self) -> Each:
        return Each(tuple(op.inverse for op in self.ops))

    def apply(self, views: Sequence[View]) -> list[View]:
        assert len(views) == self.inputs
        remaining = iter(views)
        return [view for op in self.ops for view in op.apply([next(remaining) for _ in range(op.inputs)])]


@dataclass(frozen=True)
class Chain:
    """Operations one after the other; without any, the identity."""

    ops: tuple[Op, ...] = ()

    @property
    def inputs(self) -> int:
        return self.ops[0].inputs if self.ops else 1

    @property
    def inverse(self) -> Chain:
        return Chain(tuple(op.inverse for op in reversed(self.ops)))

    def apply(self, views: Sequence[View]) -> list[View]:
        for op in self.ops:
            views = op.apply(views)
        return list(views)


@dataclass(frozen=True)
class Rearrange:
    """Dims split, permuted and merged: `Rearrange("(g d) ... -> g 1 d ...", {"d": 128})`.

    Both sides name the same axes, outermost first; parentheses merge axes into one dim, `1` is a dim of size one and
    `...` stands for all remaining dims. `sizes` gives the axes of a merged dim, at most one of which is left out."""

    pattern: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    inputs: int = field(default=1, init=False)

    @property
    def inverse(self) -> Rearrange:
        left, right = self.pattern.split("->")
        return Rearrange(f"{right.strip()} -> {left.strip()}", self.sizes)

    def apply(self, views: Sequence[View]) -> list[View]:
        (view,) = views
        left, right = (_parse(side) for side in self.pattern.split("->"))
        rest = tuple((f"...{n}",) for n in range(len(view.shape) - sum(group != ("...",) for group in left)))
        left, right = _expanded(left, rest), _expanded(right, rest)
        assert {a for group in left for a in group} == {a for group in right for a in group}, self.pattern
        return [_Rearranged(view, left, right, self._axis_sizes(left, view.shape))]

    def _axis_sizes(self, groups: Groups, shape: Shape) -> dict[str, int]:
        assert len(groups) == len(shape), f"{self.pattern} of shape {shape}"
        sizes = dict(self.sizes)
        for group, size in zip(groups, shape, strict=True):
            unknown = [axis for axis in group if axis not in sizes]
            assert len(unknown) <= 1, f"sizes of {unknown} in {self.pattern}"
            for axis in unknown:
                sizes[axis] = size // math.prod(sizes[a] for a in group if a != axis)
            assert math.prod(sizes[a] for a in group) == size, f"{self} of shape {shape}"
        return sizes


Groups = tuple[tuple[str, ...], ...]  # the axes merged into each dim


def _parse(side: str) -> Groups:
    """The dims of one side of a pattern: "(g d) 1 h" is (("g", "d"), (), ("h",))."""
    dims = re.findall(r"\(([^)]*)\)|(\S+)", side.strip())
    return tuple(tuple(axis for axis in (merged or single).split() if axis != "1") for merged, single in dims)


def _expanded(groups: Groups, rest: Groups) -> Groups:
    return tuple(g for group in groups for g in (rest if group == ("...",) else (group,)))


class _Rearranged(View):
    """Asked for a slice, reads the smallest slice of its input that holds it, and cuts the surplus off."""

    def __init__(self, view: View, left: Groups, right: Groups, sizes: dict[str, int]):
        self.view, self.left, self.right, self.sizes = view, left, right, sizes
        self.shape = tuple(math.prod(sizes[axis] for axis in group) for group in right)
        order = [axis for group in left for axis in group]
        self.permutation = [order.index(axis) for group in right for axis in group]

    def _sizes(self, group: tuple[str, ...]) -> Shape:
        return tuple(self.sizes[axis] for axis in group)

    def read(self, index: Index) -> Tensor:
        wanted: dict[str, Range] = {}  # of every axis, the positions that hold the slice asked for
        for group, cut in zip(self.right, index, strict=True):
            wanted |= zip(group, _enclosing(self._sizes(group), cut.start, cut.stop), strict=True)
        inner, lengths, cuts = [], [], []
        for group in self.left:
            ranges, sizes = tuple(wanted[axis] for axis in group), self._sizes(group)
            read = _consecutive(ranges, sizes)
            inner.append(_merged(read, sizes))
            lengths += [stop - start for start, stop in read]
            cuts += [slice(start - first, stop - first) for (start, stop), (first, _) in zip(ranges, read, strict=True)]
        tensor = self.view.read(tuple(inner)).reshape(lengths)[tuple(cuts)].permute(self.permutation)
        return self._merge(tensor, index, wanted)

    def _merge(self, tensor: Tensor, index: Index, wanted: dict[str, Range]) -> Tensor:
        shape, cuts = [], []
        for group, cut in zip(self.right, index, strict=True):
            held = _merged(tuple(wanted[axis] for axis in group), self._sizes(group))
            shape.append(held.stop - held.start)
            cuts.append(slice(cut.start - held.start, cut.stop - held.start))
        return tensor.reshape(shape)[tuple(cuts)]


def _enclosing(sizes: Shape, start: int, stop: int) -> tuple[Range, ...]:
    """The smallest box over axes of `sizes` that holds positions [start, stop) of their merged dim."""
    if not sizes:
        return ()
    stride = math.prod(sizes[1:])
    first, last = start // stride, -(-stop // stride)
    if last - first > 1:
        return ((first, last), *((0, size) for size in sizes[1:]))
    return ((first, last), *_enclosing(sizes[1:], start - first * stride, stop - first * stride))


def _consecutive(ranges: tuple[Range, ...], sizes: Shape) -> tuple[Range, ...]:
    """The smallest box around `ranges` whose positions in the merged dim follow one another."""
    box: list[Range] = []
    for (start, stop), size in zip(ranges, sizes, strict=True):
        box.append((start, stop) if all(b - a == 1 for a, b in box) else (0, size))
    return tuple(box)


def _merged(box: tuple[Range, ...], sizes: Shape) -> slice:
    """Positions of a box of consecutive positions in the merged dim."""
    start = 0
    for (first, _), size in zip(box, sizes, strict=True):
        start = start * size + first
    return slice(start, start + math.prod(stop - first for first, stop in box))
