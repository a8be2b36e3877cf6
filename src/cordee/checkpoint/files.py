"""Reading the data files of a checkpoint without trusting them.

Owns the safe reading of torch's distributed checkpoint metadata, which is a pickle: only the few types it consists of
are let through, so a checkpoint from elsewhere cannot run code. Tensors are read by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

METADATA = ".metadata"
_ALLOWED = {
    ("torch.distributed.checkpoint.metadata", None),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", None),
    ("pathlib._local", None),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in _ALLOWED or (module, None) in _ALLOWED
        if module == "torch" and isinstance(value := getattr(torch, name, None), torch.dtype):
            return value
        if not known or "." in name:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in the metadata of a checkpoint")
        return super().find_class(module, name)


def read_metadata(directory: Path) -> Metadata:
    """What the data files of a checkpoint hold and where; ValueError if that cannot be read."""
    try:
        with (directory / METADATA).open("rb") as file:
            metadata = _Unpickler(file).load()
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError, TypeError) as error:
        raise ValueError(f"{directory / METADATA} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{directory / METADATA} is not the metadata of a checkpoint")
    return metadata


class SafeReader(FileSystemReader):
    """torch's reader of checkpoint directories, with `read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """Shape, type and chunks of every tensor by its name in the checkpoint."""
    return {
        name: kept for name, kept in metadata.state_dict_metadata.items() if isinstance(kept, TensorStorageMetadata)
    }


def missing_bytes(directory: Path, metadata: Metadata) -> str | None:
    """What the data files lack of what `metadata` says is in them; None if nothing."""
    needed: dict[str, int] = {}
    for place in metadata.storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, size in needed.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            return f"{name} has {found} bytes of {size}"
    for name, kept in tensors(metadata).items():
        if sum(math.prod(chunk.sizes) for chunk in kept.chunks) < math.prod(kept.size):
            return f"{name} is not covered by its chunks"
    return None


def read_tensor(directory: Path, metadata: Metadata, name: str, index: tuple[slice, ...] | None = None) -> Tensor:
    """The tensor `name`, or the part of it at `index` (slices with step 1), assembled from its chunks.

    Memory: the result and the largest chunk that it touches.
    """
    kept = tensors(metadata)[name]
    box = _box(tuple(kept.size), index)
    result = torch.empty([stop - start for start, stop in box], dtype=kept.properties.dtype)
    for chunk in kept.chunks:
        overlap = [
            (max(start, offset), min(stop, offset + size))
            for (start, stop), offset, size in zip(box, chunk.offsets, chunk.sizes, strict=True)
        ]
        if all(start < stop for start, stop in overlap):
            target = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, box, strict=True))
            part = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, chunk.offsets, strict=True))
            result[target] = _read_chunk(directory, metadata, name, chunk)[part]
    return result


def _box(shape: tuple[int, ...], index: tuple[slice, ...] | None) -> list[tuple[int, int]]:
    slices = (*(index or ()), *[slice(None)] * (len(shape) - len(index or ())))
    bounds = [part.indices(size) for part, size in zip(slices, shape, strict=True)]
    assert all(step == 1 for _, _, step in bounds), "a checkpoint is read by slices without steps"
    return [(start, max(start, stop)) for start, stop, _ in bounds]


def _read_chunk(directory: Path, metadata: Metadata, name: str, chunk: ChunkStorageMetadata) -> Tensor:
    place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
    with (directory / place.relative_path).open("rb") as file:
        file.seek(place.offset)
        return torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)
