"""Files of `torch.save`, read and written one tensor at a time, whatever their size.

Owns finding where each tensor's bytes are, and the distrust of what else such a file holds. A file is a zip archive
with a pickle and, uncompressed, the bytes of every tensor: read, only the pickle is loaded, and written, it is made
with holes where the bytes go. Knows nothing of models.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals, skip_data

from cordee.families.rules import Index
from cordee.weights.regions import Region, contiguous

logger = logging.getLogger("cordee")

Keys = tuple[str, ...]

# What stands before the bytes of an entry of a zip archive, ahead of its name and further fields, whose lengths end it.
_ENTRY = struct.Struct("<4s5H3L2H")

# Objects of these packages lie in every training checkpoint beside the weights: settings, random states, timers. They
# are replaced by a stand-in, so that neither are they made nor need the packages be there.
_PASSED_OVER = re.compile(r"(megatron|mindspeed|mindspeed_llm|modellink|ascendspeed|deepspeed|numpy|_codecs)\..*")


class Opaque:
    """Stands for an object of a class that is not to be run."""

    def __init__(self, *arguments: object) -> None:
        self.arguments = arguments

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return "(not read)"


class ForeignCode(ValueError):
    """A file whose pickle names code that has no place beside weights."""

    def __init__(self, names: Sequence[str]):
        super().__init__(f"loading it would run code that has no place beside weights: {', '.join(names)}")


class TorchFile:
    """What `torch.save` wrote: `content` as it was, its tensors without their values, and `tensors` by their keys.

    Raises ForeignCode if loading would run anything but the building of tensors and plain data, unless `trusted`, and
    one of `UNREADABLE` if the file is damaged. Files from before torch 1.6 are held in memory.
    """

    def __init__(self, path: Path, *, trusted: bool = False):
        self.path = path
        self.passed_over: list[str] = []
        if mappable := zipfile.is_zipfile(path):
            self._check_byte_order()
            self.content = self._load(trusted)
        else:
            self.content = self._load_old(trusted)
        found = dict(_tensors(self.content))
        self._held = None if mappable else found
        self.tensors = {keys: _region(tensor) for keys, tensor in found.items()}

    def read(self, keys: Keys, index: Index) -> Tensor:
        """A slice of a tensor, sharing memory with the file."""
        if self._held is not None:
            return self._held[keys][index]
        return self.tensors[keys].read(self.path, index)

    def _load_old(self, trusted: bool) -> Any:
        with safe_globals([argparse.Namespace]):
            return torch.load(self.path, map_location="cpu", weights_only=not trusted)

    def _load(self, trusted: bool) -> Any:
        if trusted:
            return torch.load(self.path, map_location="meta", weights_only=False)
        with safe_globals([argparse.Namespace]):
            foreign = sorted(get_unsafe_globals_in_checkpoint(self.path))
        if refused := [name for name in foreign if not _PASSED_OVER.fullmatch(name)]:
            raise ForeignCode(refused)
        self.passed_over = foreign
        stand_ins = [(type("Opaque", (Opaque,), {}), name) for name in foreign]
        with safe_globals([argparse.Namespace, *stand_ins]):
            return torch.load(self.path, map_location="meta", weights_only=True)

    def _check_byte_order(self) -> None:
        with zipfile.ZipFile(self.path) as archive:
            for name in archive.namelist():
                if name.endswith("/byteorder") and archive.read(name).decode() != sys.byteorder:
                    raise ValueError("its numbers are in the byte order of another machine")


UNREADABLE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    RuntimeError,
    OSError,
    EOFError,
    KeyError,
    ValueError,
)


def _tensors(content: object, keys: Keys = ()) -> Iterator[tuple[Keys, Tensor]]:
    """All tensors in nested dicts, by the keys that lead to them."""
    if isinstance(content, Tensor):
        yield keys, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _tensors(value, (*keys, str(key)))


def _region(tensor: Tensor) -> Region:
    start = tensor.untyped_storage()._checkpoint_offset or 0  # None if the file is held in memory
    offset = start + int(tensor.storage_offset()) * tensor.element_size()
    return Region(offset, tuple(tensor.shape), tensor.dtype, tensor.stride())


def create(path: Path, content: Mapping[str, object]) -> dict[Keys, Region]:
    """Write a file of `content` in which the bytes of all tensors are left out; where they go, by the tensors' keys.

    The tensors need no values: take those of `torch.empty`, which cost no memory until they are written to.
    """
    with skip_data():
        torch.save(content, path)
    return TorchFile(path).tensors


def append(file: BinaryIO, tensor: Tensor) -> Region:
    """Write an archive of one tensor at the end of `file`, its bytes left out; where they go. `file` is read for that.

    The tensor is as for `create`, and all that its storage holds. OSError, or RuntimeError, if writing fails.
    """
    start = file.seek(0, os.SEEK_END)
    with skip_data():
        torch.save(tensor, file)
    with zipfile.ZipFile(_Tail(file, start)) as archive:
        (entry,) = (entry for entry in archive.infolist() if entry.filename.endswith("/data/0"))
    header = start + entry.header_offset
    file.seek(header + _ENTRY.size - 4)
    name, extra = struct.unpack("<HH", file.read(4))
    return contiguous(header + _ENTRY.size + name + extra, tuple(tensor.shape), tensor.dtype)


class _Tail(io.RawIOBase):
    """What follows `start` in `file`, as a file of its own: not every reader finds an archive behind others."""

    def __init__(self, file: BinaryIO, start: int):
        self._file, self._start = file, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset + (self._start if whence == os.SEEK_SET else 0), whence) - self._start

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)
