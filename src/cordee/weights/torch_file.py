"""Files of `torch.save`, read and written one tensor at a time, whatever their size.

Owns finding where each tensor's bytes are. A file is a zip archive with a pickle and, uncompressed, the bytes of every
tensor (before torch 1.6: pickles, and then the bytes); read, the pickle is taken as data (`pickled.py`), of which only
the building of tensors is understood, and written, it is made with holes where the bytes go. Knows nothing of models.
"""

import argparse
import io
import mmap
import os
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol

import torch
from torch import Tensor
from torch.serialization import MAGIC_NUMBER, skip_data
from torch.storage import _storage_type_to_dtype_map

from cordee.files import RangeFile
from cordee.tensors.views import Index
from cordee.weights.pickled import Builder, Call, Mapped, Name, load
from cordee.weights.regions import Region

Keys = tuple[str, ...]

# What stands before the bytes of an entry of a zip archive, ahead of its name and further fields, whose lengths end it.
_ENTRY = struct.Struct("<4s5H3L2H")
_PICKLE, _BYTE_ORDER, _DATA = "data.pkl", "byteorder", "data/"
_DEPTH = 32  # of dicts in dicts
_DIMS = 64  # of a tensor, as many as torch allows
_ENTRIES = 2**22  # of all those dicts: they may hold one another, so that few bytes become many
UNREADABLE = (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, ValueError)  # of a corrupt file


class Opens(Protocol):
    """A path to something with bytes."""

    def open(self, mode: Literal["rb"]) -> BinaryIO: ...


class TorchFile:
    """What `torch.save` wrote: `content` as plain data, and `tensors` by the keys that lead to them in nested dicts.

    Objects that are neither tensors nor plain data stand in it as `Call`, never made; `not_read` are the names of what
    would make them. One of `UNREADABLE` if the file is corrupt."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as file:
            self.content, self.not_read = (_read_archive if zipfile.is_zipfile(file) else _read_stream)(file)
        self.tensors = {keys: view.region() for keys, view in _views(self.content)}

    def read(self, keys: Keys, index: Index) -> Tensor:
        """A slice of a tensor, sharing memory with the file."""
        return self.tensors[keys].read(self.path, index)


def tensor_in(path: Opens, start: int, size: int) -> Region:
    """Where the tensor is that stands alone in an archive of `size` bytes from `start` on in a file. One of
    `UNREADABLE` if it does not."""
    with path.open("rb") as file:
        return _tensor_in(file, start, size)


def content_in(path: Opens, start: int, size: int) -> tuple[object, list[str]]:
    """What an archive of `size` bytes from `start` on in a file holds, as `content` and `not_read` of a `TorchFile`.

    One of `UNREADABLE` if it is corrupt."""
    with path.open("rb") as file:
        return _read_archive(_window(file, start, size))


def _tensor_in(file: BinaryIO, start: int, size: int) -> Region:
    view, _ = _read_archive(_window(file, start, size))
    if not isinstance(view, _View):
        raise ValueError("it holds something else than a tensor")
    region = view.region()
    return replace(region, offset=start + region.offset)


@dataclass
class _Storage:
    """Elements of `dtype` in a file, `size` bytes from `start` on."""

    dtype: torch.dtype
    size: int
    start: int = 0


@dataclass(frozen=True)
class _View:
    """A tensor in a storage: `first`, `shape` and `strides` in elements."""

    storage: _Storage
    dtype: torch.dtype
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        numbers = (self.first, *self.shape, *self.strides)
        if not all(type(n) is int and 0 <= n < 2**63 for n in numbers) or len(self.shape) != len(self.strides):
            raise ValueError("the place of a tensor in its storage is none")
        span = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        end = self.first + 1 + span if 0 not in self.shape else 0
        if end * self.dtype.itemsize > self.storage.size:
            raise ValueError(f"a tensor of shape {self.shape} ends behind its {self.storage.size} bytes")

    def region(self) -> Region:
        return Region(self.storage.start + self.first * self.dtype.itemsize, self.shape, self.dtype, self.strides)


def _views(content: object) -> Iterator[tuple[Keys, _View]]:
    """All tensors in nested dicts, by the keys that lead to them (text or numbers), in their order."""
    waiting: list[tuple[Keys, object]] = [((), content)]
    for _ in range(_ENTRIES):
        if not waiting:
            return
        keys, found = waiting.pop()
        if isinstance(found, _View):
            yield keys, found
        elif isinstance(found, dict):
            if len(keys) == _DEPTH:
                raise ValueError(f"it holds dicts in dicts, more than {_DEPTH} deep")
            named = [(key, value) for key, value in found.items() if isinstance(key, str | int)]
            waiting += [((*keys, str(key)), value) for key, value in reversed(named)]
    raise ValueError(f"it holds more than {_ENTRIES} objects in dicts")


def _view(storage: object, first: Any, shape: Any, strides: Any, *more: object) -> _View:
    """`more`: whether it has gradients, hooks, is to be negated or conjugated; an NPU's memory format in its place."""
    if not isinstance(storage, _Storage):
        raise TypeError("a tensor without a storage")
    if any(isinstance(flags, dict) and flags for flags in more[2:]):
        raise ValueError("a tensor is negated or conjugated where it is read, which is not done here")
    return _View(storage, storage.dtype, first, _sizes(shape), _sizes(strides))


def _view_of_bytes(
    storage: object, first: Any, shape: Any, strides: Any, gradient: object, hooks: object, dtype: object, *more: object
) -> _View:
    if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
        raise TypeError("a tensor without a storage or a type")
    return _view(replace(storage, dtype=dtype), first, shape, strides, gradient, hooks, *more)


def _sizes(numbers: object) -> tuple[int, ...]:
    """The sizes of a tensor; a longer tuple, or another object, could be made into ever larger ones."""
    if not isinstance(numbers, tuple) or len(numbers) > _DIMS or not all(type(n) is int for n in numbers):
        raise TypeError("the sizes of a tensor are no numbers")
    return numbers


def _of_type(function: object, kind: object, args: Any, state: object) -> object:
    """A subclass of tensors, or a tensor with attributes: as the tensor that it is, if it is one."""
    return function.function(*args) if isinstance(function, Builder) else Call(function, (), state)


_TYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_KNOWN: dict[str, object] = {
    **{f"torch.{name}": dtype for name, dtype in (_TYPES | _storage_type_to_dtype_map()).items()},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.Size": Builder(_sizes),
    "torch._utils._rebuild_tensor": Builder(_view),
    "torch._utils._rebuild_tensor_v2": Builder(_view),
    "torch._utils._rebuild_tensor_v3": Builder(_view_of_bytes),
    "torch._utils._rebuild_parameter": Builder(lambda tensor, *_: tensor),
    "torch._utils._rebuild_parameter_with_state": Builder(lambda tensor, *_: tensor),
    "torch._tensor._rebuild_from_type_v2": Builder(_of_type),
    "torch_npu.utils.storage._rebuild_npu_tensor": Builder(_view),  # whose storage is one of the CPU
    "collections.OrderedDict": Builder(lambda: {}),
    "collections.defaultdict": Builder(lambda *_: {}),
    "argparse.Namespace": Name("argparse", "Namespace"),
}


def resolve(module: str, name: str) -> object:
    """What stands for a name in pickles of torch: types, and builders of what tensors are made of."""
    return _KNOWN.get(f"{module}.{name}", Name(module, name))


def _unpickled(data: bytes | Mapped, at: int, persistent: Callable[[object], object]) -> tuple[object, list[str], int]:
    """The content of a pickle, names in it for which nothing stands, and where it ends."""
    unknown = set()

    def noted(module: str, name: str) -> object:
        if f"{module}.{name}" not in _KNOWN:
            unknown.add(f"{module}.{name}")
        return resolve(module, name)

    content, end = load(data, at, resolve=noted, persistent=persistent)
    if isinstance(content, list):
        return [_with_settings(item) for item in content], sorted(unknown), end
    return _with_settings(content), sorted(unknown), end


def _with_settings(content: object) -> object:
    return {key: _settings(value) for key, value in content.items()} if isinstance(content, dict) else content


def _settings(value: object) -> object:
    """`value`; if it is a namespace, its settings."""
    if not (isinstance(value, Call) and value.function == _KNOWN["argparse.Namespace"]):
        return value
    if not isinstance(value.state, dict) or not all(isinstance(name, str) for name in value.state):
        raise ValueError("its settings are not named")
    settings = argparse.Namespace()
    vars(settings).update(value.state)
    return settings


def _read_archive(file: BinaryIO) -> tuple[object, list[str]]:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    root = next((each.filename.removesuffix(_PICKLE) for each in entries if each.filename.endswith("/" + _PICKLE)), "")
    found = {entry.filename.removeprefix(root): entry for entry in entries}
    if _PICKLE not in found or len(found) < len(entries):
        raise ValueError("it is an archive, but not of torch.save")
    if packed := [name for name, entry in found.items() if entry.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(f"{packed[0]} in it is compressed, which torch.save never does")
    if _BYTE_ORDER in found and _content(file, found[_BYTE_ORDER]) != sys.byteorder.encode():
        raise ValueError("its numbers are in the byte order of another machine")

    def storage(persistent_id: Any) -> _Storage:
        dtype, key, size = _described(persistent_id)
        entry = found[_DATA + key]
        if size > entry.file_size:
            raise ValueError(f"{entry.filename} has {entry.file_size} bytes of {size}")
        return _Storage(dtype, size, _start(file, entry))

    content, unknown, _ = _unpickled(_content(file, found[_PICKLE]), 0, storage)
    return content, unknown


def _start(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin. What they are is not compared with its checksum: it is that of holes."""
    file.seek(entry.header_offset)
    mark, *_, name, extra = _ENTRY.unpack(file.read(_ENTRY.size))
    start = entry.header_offset + _ENTRY.size + name + extra
    if mark != b"PK\x03\x04" or start + entry.file_size > file.seek(0, os.SEEK_END):
        raise ValueError(f"{entry.filename} is not where it should be")
    return start


def _content(file: BinaryIO, entry: zipfile.ZipInfo) -> bytes:
    file.seek(_start(file, entry))
    return file.read(entry.file_size)


def _read_stream(file: BinaryIO) -> tuple[object, list[str]]:
    """As torch wrote before its release 1.6: what it is, its content, the storages' keys, and then these."""
    with Mapped(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        (magic, at), storages = load(data), {}
        if magic != MAGIC_NUMBER:
            raise ValueError("it is no file of torch.save")
        _, at = load(data, at)
        system, at = load(data, at)
        if not isinstance(system, dict) or system.get("little_endian") is not (sys.byteorder == "little"):
            raise ValueError("its numbers are in the byte order of another machine")

        def storage(persistent_id: Any) -> _Storage:
            dtype, key, size = _described(persistent_id[:5])
            if persistent_id[5:] != (None,):
                raise ValueError("its storages are parts of others, as of torch before 0.4")
            return storages.setdefault(key, _Storage(dtype, size))

        content, unknown, at = _unpickled(data, at, storage)
        keys, at = load(data, at)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or set(keys) != set(storages):
            raise ValueError("its pickle names other storages than there are")
        for key in keys:
            storages[key].start = at + 8  # behind the number of its elements
            at += 8 + storages[key].size
        if at > len(data):
            raise ValueError("it ends before its tensors do")
    return content, unknown


def _described(persistent_id: Any) -> tuple[torch.dtype, str, int]:
    """Type, key and bytes of a storage."""
    kind, dtype, key, _, count = persistent_id
    if kind != "storage" or not isinstance(dtype, torch.dtype) or not isinstance(key, str) or type(count) is not int:
        raise TypeError("an object elsewhere that is no storage")
    return dtype, key, max(count, 0) * dtype.itemsize


def _window(file: BinaryIO, start: int, size: int) -> BinaryIO:
    """`size` bytes of `file` from `start` on, as a file of its own."""

    def read(at: int, length: int) -> bytes:
        file.seek(start + at)
        return file.read(length)

    return io.BufferedReader(RangeFile(size, read))


def create(path: Path, content: Mapping[str, object]) -> dict[Keys, Region]:
    """Write a file of `content` in which the bytes of all tensors are left out; where they go, by the tensors' keys.

    The tensors need no values: take those of `torch.empty`, which cost no memory until they are written to."""
    with skip_data():
        torch.save(content, path)
    return TorchFile(path).tensors


def append(file: BinaryIO, tensor: Tensor) -> Region:
    """Write an archive of one tensor at the end of `file`, its bytes left out; where they go. `file` is read for that.

    The tensor is as for `create`. OSError if writing fails."""
    start = file.seek(0, os.SEEK_END)
    try:
        with skip_data():
            torch.save(tensor, file)
    except RuntimeError as error:  # of torch's writer of archives
        raise OSError(str(error)) from error
    return _tensor_in(file, start, file.seek(0, os.SEEK_END) - start)
