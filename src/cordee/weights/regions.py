"""Tensors as ranges of bytes in files: what large files are read from and written into, piece by piece.

Owns the reading and writing of such a range. Knows no names of models."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cordee.tensors.views import Index, Shape

COPIED = 16 * 2**20  # bytes that are read into memory at most; more is mapped


@dataclass(frozen=True)
class Region:
    """A tensor's place in a file: where its first element is, in bytes, and how its elements follow one another."""

    offset: int
    shape: Shape
    dtype: torch.dtype
    strides: Shape

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def read(self, path: Path, index: Index = ()) -> Tensor:
        """A slice of the tensor: a copy if it is small and in one piece; else, and for all of it, sharing memory with
        the file, which is mapped as long as the slice lives. Reading is faster than touching a page at a time, but
        takes memory beside the destination. OSError if it fails."""
        if index and (piece := self._piece(index)) is not None and piece.nbytes <= COPIED:
            return piece.copy(path)
        return self._map(path)[index]

    def _piece(self, index: Index) -> "Region | None":
        """The slice as a region of its own, if it is less than the whole and its elements stand without gaps."""
        if self != contiguous(self.offset, self.shape, self.dtype):
            return None
        assert all(part.step in (None, 1) for part in index), f"index {index} has a step"
        bounds = [part.indices(size)[:2] for part, size in zip(index, self.shape, strict=False)]
        bounds += [(0, size) for size in self.shape[len(bounds) :]]
        shape = tuple(max(0, stop - start) for start, stop in bounds)
        cut = [dim for dim, size in enumerate(self.shape) if shape[dim] != size]
        if not cut or any(size != 1 for size in shape[: cut[-1]]):
            return None
        first = sum(start * stride for (start, _), stride in zip(bounds, self.strides, strict=True))
        return contiguous(self.offset + first * self.dtype.itemsize, shape, self.dtype)

    def copy(self, path: Path) -> Tensor:
        """The tensor, whose elements stand without gaps, in memory of its own. OSError if it cannot be read."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        data, offset = tensor.view(-1).view(torch.uint8).numpy().data, self.offset
        descriptor = os.open(path, os.O_RDONLY)
        try:
            while data:
                if not (count := os.preadv(descriptor, [data], offset)):
                    raise OSError(f"{path} has become shorter")
                data, offset = data[count:], offset + count
        finally:
            os.close(descriptor)
        return tensor

    def _map(self, path: Path) -> Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        end = self.offset + span * self.dtype.itemsize
        empty = torch.empty(0, dtype=self.dtype)
        if 0 in self.shape:
            return empty.new_empty(self.shape)
        mapped = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=end)
        return empty.set_(cast(torch.UntypedStorage, mapped[self.offset : end]), 0, self.shape, self.strides)

    def write(self, descriptor: int, tensor: Tensor, first_row: int = 0) -> None:
        """Put `tensor` into rows `first_row` and following."""
        assert tensor.dtype == self.dtype and tensor.shape[1:] == self.shape[1:], f"{tensor.shape} into {self}"
        assert first_row + (tensor.shape[0] if tensor.ndim else 0) <= (self.shape[0] if self.shape else 0), f"{self}"
        row = self.strides[0] * self.dtype.itemsize if self.shape else 0
        write_at(descriptor, tensor, self.offset + first_row * row)


@dataclass(frozen=True)
class Destination:
    """Where a tensor goes: a region of a file that is being written, from its row `row` on."""

    path: Path
    region: Region
    row: int = 0

    def write(self, tensor: Tensor, first_row: int = 0) -> None:
        """Put `tensor` into rows `first_row` and following. Any thread may. OSError if that fails."""
        descriptor = os.open(self.path, os.O_WRONLY)
        try:
            self.region.write(descriptor, tensor, self.row + first_row)
        finally:
            os.close(descriptor)


def contiguous(offset: int, shape: Shape, dtype: torch.dtype) -> Region:
    """A region whose elements stand without gaps."""
    return Region(offset, shape, dtype, tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape))))


def write_at(descriptor: int, tensor: Tensor, offset: int) -> None:
    """Write the elements of `tensor`, in order, to a file from byte `offset` on."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
