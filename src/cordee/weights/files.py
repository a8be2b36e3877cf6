"""Tensors in the files of a Hugging Face directory, by the names they have there.

Owns finding the files (single, sharded with an index, safetensors or `.bin`), opening them and everything that can be
wrong with them. Knows no family and no canonical name."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cordee.errors import Findings, Problem, ProblemError, Problems, raise_all
from cordee.files import read_json
from cordee.tensors.views import Index, Shape
from cordee.weights import torch_file
from cordee.weights.codec import is_of_weights
from cordee.weights.regions import contiguous
from cordee.weights.safetensors_file import NAMES_OF_TYPES, starts
from cordee.weights.torch_file import TorchFile

SAFETENSORS, SAFETENSORS_INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
COPY_AGAIN = "download or copy the file again"

DTYPES = {name: dtype for dtype, name in NAMES_OF_TYPES.items()}
T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """What a file says of one tensor in it."""

    shape: Shape
    dtype: torch.dtype | None  # None: a type of the format that is none of weights


class TensorFile(Protocol):
    path: Path
    tensors: dict[str, Stored]

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor, sharing memory with the file where the format allows."""
        ...


class SafetensorsFile:
    """A `.safetensors` file, which the library of that name has found in order."""

    def __init__(self, path: Path):
        self.path = path
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            self.tensors = {name: Stored(tuple(s.get_shape()), DTYPES.get(s.get_dtype())) for name, s in slices.items()}
        self._starts = starts(path)

    def read(self, name: str, index: Index) -> Tensor:
        stored = self.tensors[name]
        assert stored.dtype is not None, f"{name} is of a type that is none of weights"
        return contiguous(self._starts[name], stored.shape, stored.dtype).read(self.path, index)


class BinFile:
    """A file of `torch.save`; nothing in it is run."""

    def __init__(self, path: Path):
        self.path = path
        self._file = TorchFile(path)
        content = self._file.content
        if not isinstance(content, dict) or self._file.tensors.keys() != {(name,) for name in content}:
            raise ValueError("it holds something else than tensors by name")
        self.tensors = {name: Stored(region.shape, region.dtype) for (name,), region in self._file.tensors.items()}

    def read(self, name: str, index: Index) -> Tensor:
        return self._file.read((name,), index)


UNREADABLE = (SafetensorError, *torch_file.UNREADABLE)


def opened(path: Path, opener: Callable[[Path], T], fix: str = COPY_AGAIN) -> T:
    """What `opener`, which raises one of `UNREADABLE`, makes of a file. ProblemError if it is missing or corrupt."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        return opener(path)
    except FileNotFoundError as error:
        raise ProblemError.of(str(path), None, "the file is missing", fix, "missing") from error
    except UNREADABLE as error:
        why = f"the file cannot be read: {str(error).partition(chr(10))[0] or type(error).__name__}"
        raise ProblemError.of(str(path), None, why, fix, "unreadable") from error


def unfit(file: TensorFile, name: str, shape: Shape, fix: str) -> Problems:
    """What keeps a tensor of a file from being weights of `shape`; `fix`: what to do if it has another."""
    stored, option = file.tensors[name], f"{file.path}: {name}"
    if stored.shape != shape:
        why = f"its shape is {list(stored.shape)}, in the model it is {list(shape)}"
        yield Problem(option, None, why, fix, "shape", limit=shape)
    if not is_of_weights(stored.dtype):
        why = f"weights of type {stored.dtype or 'unknown'} are quantised, which is not supported"
        yield Problem(option, None, why, "take weights that are not quantised", "dtype")


@dataclass
class _Directory(Findings):
    """Opens the files of a directory and notes what is wrong with them."""

    path: Path = field(kw_only=True)

    def problem(self, file: str, kind: str, why: str, fix: str, limit: object = None) -> None:
        self.problems.append(Problem(str(self.path / file), None, why, fix, kind, limit=limit))

    def open_all(self) -> Iterator[TensorFile]:
        """The files with weights; as in transformers safetensors come before `.bin`, and a whole file before shards."""
        for single, index, kind in ((SAFETENSORS, SAFETENSORS_INDEX, SafetensorsFile), (BIN, BIN_INDEX, BinFile)):
            if (self.path / single).is_file():
                if (self.path / index).is_file():
                    self.notes.append(f"{index} ignored: {single} is there, which transformers reads too")
                if (file := self._open(single, kind)) is not None:
                    yield file
                return
            if (self.path / index).is_file():
                yield from self._open_sharded(index, kind)
                return
        if loose := sorted(path.name for path in self.path.glob("*-of-*") if path.suffix in (".safetensors", ".bin")):
            why = f"there are shards ({', '.join(loose)}), but no {SAFETENSORS_INDEX} or {BIN_INDEX}"
            self.problem("", "index", why, "copy the index file too")
        else:
            why = f"there are no weights: neither {SAFETENSORS}, {BIN} nor an index of shards"
            self.problem("", "missing", why, "copy the weights into the directory")

    def _open(self, name: str, kind: Callable[[Path], TensorFile]) -> TensorFile | None:
        return self.attempt(lambda: opened(self.path / name, kind))

    def _open_sharded(self, index: str, kind: Callable[[Path], TensorFile]) -> Iterator[TensorFile]:
        weight_map = self._weight_map(index)
        for shard in sorted(set(weight_map.values())):
            if (file := self._open(shard, kind)) is not None:
                self._compare(index, file, {name for name, where in weight_map.items() if where == shard})
                yield file

    def _weight_map(self, index: str) -> dict[str, str]:
        try:
            weight_map = read_json(self.path / index)["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.problem(index, "index", f"not an index of shards: {error!r}", COPY_AGAIN)
            return {}
        plain = isinstance(weight_map, dict) and all(
            isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
        )
        if not plain or not weight_map:
            self.problem(index, "index", "weight_map does not map names to files of this directory", COPY_AGAIN)
            return {}
        return weight_map

    def _compare(self, index: str, file: TensorFile, named: set[str]) -> None:
        present = file.tensors.keys()
        if absent := sorted(named - present):
            why = f"it says these tensors are in {file.path.name}, where they are not: {', '.join(absent)}"
            self.problem(index, "absent", why, "copy index and shards from the same checkpoint", absent)
        if extra := sorted(present - named):
            why = f"{file.path.name} holds tensors that it does not name: {', '.join(extra)}"
            self.problem(index, "unnamed", why, "copy index and shards from the same checkpoint", extra)


def open_files(path: Path) -> tuple[dict[str, TensorFile], tuple[str, ...]]:
    """The file that holds each tensor of a Hugging Face directory, and notes of what is not read in it. ProblemError
    with all that is wrong with them."""
    directory = _Directory(path=path)
    holders = {name: file for file in directory.open_all() for name in file.tensors}
    raise_all(directory.problems)
    return holders, tuple(directory.notes)
