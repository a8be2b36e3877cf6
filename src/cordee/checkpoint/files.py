"""Reading the data files of a checkpoint without trusting them.

Owns the form of torch's distributed checkpoints: metadata, which is a pickle, and tensors, each an archive of
`torch.save` in a file of many. Both are parsed as data (`weights/pickled.py`, `weights/torch_file.py`): nothing that a
checkpoint names is imported or called, and nothing is read but files of its own directory."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import add, gt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, Metadata
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.futures import Future

from cordee.checkpoint.storage import Location, location_of
from cordee.errors import Problem, ProblemError
from cordee.tensors.views import Shape, normalise
from cordee.weights.pickled import Call, Name, load
from cordee.weights.regions import Region
from cordee.weights.torch_file import UNREADABLE, resolve, tensor_in

METADATA = ".metadata"
RANGE = 2**25  # bytes that one request to a store reads at most
_CELLS = 2**22  # of the grid that a tensor's chunks make
# Megatron's metadata, of core 0.15 alone: torch's with a further field.
_OF_MEGATRON = Name("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata")


def metadata_in(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> Metadata:
    """As `read_metadata`, of a folder of others. ProblemError if it cannot be read."""
    try:
        return read_metadata(location_of(path), wanted)
    except ValueError as error:
        problem = Problem(str(path / METADATA), None, str(error), "copy the checkpoint again", "unreadable")
        raise ProblemError([problem]) from error


def read_metadata(directory: Location, wanted: Callable[[str], bool] = lambda name: True) -> Metadata:
    """What the data files of a checkpoint hold and where; of the objects beside tensors only the names are kept.

    wanted: of which names; nothing is known then of the others.
    ValueError if it cannot be read, or the files do not have all that it says is in them."""
    try:
        content, _ = load((directory / METADATA).read_bytes(), resolve=resolve)
        metadata = _metadata(content, wanted)
        lack = missing_bytes(directory, metadata)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory / METADATA} cannot be read: {error}") from error
    if lack is not None:
        raise ValueError(lack)
    return metadata


def _metadata(content: object, wanted: Callable[[str], bool]) -> Metadata:
    fields = _fields(content, "Metadata")
    described = {_name(name): found for name, found in _pairs(fields["state_dict_metadata"])}
    stored = ((_index(at), place) for at, place in _pairs(fields["storage_data"]))
    kept = {name: _kept(name, found) for name, found in described.items() if wanted(name)}
    places = {at: _place(place) for at, place in stored if wanted(at.fqn)}
    metadata = Metadata(kept, storage_data=places, storage_meta=dcp.StorageMeta())
    for name, tensor in tensors(metadata).items():
        for chunk in tensor.chunks:
            place = places.get(dcp.MetadataIndex(name, chunk.offsets))
            if place is None or place.length < math.prod(chunk.sizes) * tensor.properties.dtype.itemsize:
                raise ValueError(f"the chunk of {name} at {list(chunk.offsets)} is nowhere, or in too few bytes")
    return metadata


def _name(name: object) -> str:
    if not isinstance(name, str):
        raise ValueError("a tensor has no name")
    return name


def _kept(name: str, described: object) -> dcp.TensorStorageMetadata | dcp.BytesStorageMetadata:
    if _kind(described) == "BytesStorageMetadata":
        return dcp.BytesStorageMetadata()
    fields = _fields(described, "TensorStorageMetadata")
    size, dtype = _sizes(fields["size"]), _state(fields["properties"], "TensorProperties")[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is of no type")
    chunks = []
    for chunk in fields["chunks"]:
        part = _fields(chunk, "ChunkStorageMetadata")
        offsets, sizes = _sizes(part["offsets"]), _sizes(part["sizes"])
        ends = map(add, offsets, sizes)
        if not len(offsets) == len(sizes) == len(size) or any(map(gt, ends, size)):
            raise ValueError(f"the chunk of {name} at {offsets} of {sizes} is not in {size}")
        chunks.append(dcp.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
    return dcp.TensorStorageMetadata(dcp.TensorProperties(dtype=dtype), torch.Size(size), chunks)


def _index(at: object) -> dcp.MetadataIndex:
    fields = _fields(at, "MetadataIndex")
    name, offset = fields["fqn"], fields.get("offset")
    return dcp.MetadataIndex(_name(name), None if offset is None else torch.Size(_sizes(offset)))


def _place(place: object) -> _StorageInfo:
    """ValueError for a place that is not in a file of the checkpoint's own directory."""
    fields = _fields(place, "_StorageInfo")
    file, offset, length = fields["relative_path"], *_sizes((fields["offset"], fields["length"]))
    if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file or "\0" in file:
        raise ValueError("the place of a tensor is no file of its directory")
    if fields.get("transform_descriptors"):
        raise ValueError(f"{file} is compressed or encoded otherwise, which is not read")
    return _StorageInfo(file, offset, length)


def _sizes(numbers: object) -> Shape:
    if not isinstance(numbers, tuple) or not set(map(type, numbers)) <= {int}:
        raise ValueError("the sizes of a tensor are no numbers")
    if not 0 <= min(numbers, default=0) <= max(numbers, default=0) < 2**63:
        raise ValueError("the sizes of a tensor are too large, or negative")
    return numbers


def _pairs(mapping: object) -> Iterable[tuple[Any, object]]:
    if not isinstance(mapping, dict):
        raise ValueError("it does not say what is where")
    return mapping.items()


def _kind(found: object) -> str:
    """The name of the class of torch that Python would make an object of, whichever release had it where."""
    if isinstance(found, Call) and isinstance(made_by := found.function, Name):
        if made_by == _OF_MEGATRON:
            return "Metadata"
        return made_by.name if made_by.module.startswith("torch.distributed.") else ""
    return ""


def _state(found: object, kind: str) -> Any:
    if not isinstance(found, Call) or _kind(found) != kind:
        raise ValueError(f"there is no {kind} where one belongs")
    return found.state


def _fields(found: object, kind: str) -> Mapping[str, Any]:
    state = _state(found, kind)
    if not isinstance(state, dict):
        raise ValueError(f"its {kind} has no fields")
    return state


def tensors(metadata: Metadata) -> dict[str, dcp.TensorStorageMetadata]:
    """Shape, type and chunks of every tensor by its name in the checkpoint."""
    return {name: t for name, t in metadata.state_dict_metadata.items() if isinstance(t, dcp.TensorStorageMetadata)}


def _described(metadata: Metadata, name: str) -> dcp.TensorStorageMetadata:
    kept = metadata.state_dict_metadata[name]
    assert isinstance(kept, dcp.TensorStorageMetadata), f"{name} is no tensor"
    return kept


def missing_bytes(directory: Location, metadata: Metadata) -> str | None:
    """What the data files lack of what `metadata` says is in them; None if nothing."""
    needed: dict[str, int] = {}
    for place in metadata.storage_data.values():
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), place.offset + place.length)
    for name, size in needed.items():
        if (found := (directory / name).size() or 0) < size:
            return f"{name} has {found} bytes of {size}"
    for name, kept in tensors(metadata).items():
        if not _tile(kept.size, kept.chunks):
            return f"{name} is not covered by its chunks"
    return None


def _tile(size: Sequence[int], chunks: Sequence[dcp.ChunkStorageMetadata]) -> bool:
    """Whether chunks cover a tensor of `size`, each element once. They have to lie in a grid, as those of meshes do."""
    cuts = []
    for dim, end in enumerate(size):
        bounds = {0, end, *(c.offsets[dim] for c in chunks), *(c.offsets[dim] + c.sizes[dim] for c in chunks)}
        cuts.append(np.array(sorted(bounds)))
    cells = [max(0, len(cut) - 1) for cut in cuts]
    if math.prod(cells) > _CELLS:
        return False
    covered = np.zeros(cells, np.int32)
    for chunk in chunks:
        ends = map(add, chunk.offsets, chunk.sizes)
        first, last = (map(int, map(np.searchsorted, cuts, at)) for at in (chunk.offsets, ends))
        covered[tuple(map(slice, first, last))] += 1
    return bool((covered == 1).all())


def read_tensor(
    directory: Location,
    metadata: Metadata,
    name: str,
    index: tuple[slice, ...] | None = None,
    chunks: Sequence[dcp.ChunkStorageMetadata] | None = None,
) -> Tensor:
    """The tensor `name`, or the part of it at `index` (slices with step 1), assembled from its chunks.

    chunks: those of its own that the part is in; None: which these are is found.
    ProblemError if what a chunk's place holds is another tensor, or none. Memory: the result."""
    kept = _described(metadata, name)
    box = [(cut.start, cut.stop) for cut in normalise(index, tuple(kept.size))]
    result = torch.empty([stop - start for start, stop in box], dtype=kept.properties.dtype)
    for chunk in kept.chunks if chunks is None else chunks:
        sides = zip(box, chunk.offsets, chunk.sizes, strict=True)
        overlap = [(max(start, offset), min(stop, offset + size)) for (start, stop), offset, size in sides]
        if all(start < stop for start, stop in overlap):
            target = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(overlap, box, strict=True))
            part = tuple(slice(a - o, b - o) for (a, b), o in zip(overlap, chunk.offsets, strict=True))
            result[target] = _read_chunk(directory, metadata, name, chunk, part)
    return result


def _read_chunk(
    directory: Location, metadata: Metadata, name: str, chunk: dcp.ChunkStorageMetadata, index: tuple[slice, ...]
) -> Tensor:
    """A slice of a chunk, which may share memory with the file."""
    place = metadata.storage_data[dcp.MetadataIndex(name, chunk.offsets)]
    expected = _described(metadata, name).properties
    path = directory / place.relative_path
    try:
        region = tensor_in(path, place.offset, place.length)
        if (region.shape, region.dtype) != (tuple(chunk.sizes), expected.dtype):
            raise ValueError(f"there is one of {list(region.shape)} and {region.dtype}")
        if (local := path.local) is not None:  # mapped, which takes a tenth of the time of ranges
            return region.read(local, index)
        return _read_ranges(path, region, index)
    except UNREADABLE as error:
        why = f"{list(chunk.sizes)} of {name} cannot be read at byte {place.offset}: {error}"
        raise ProblemError.of("checkpoint", str(path), why, "take another checkpoint", "corrupt") from error


def _read_ranges(path: Location, region: Region, index: tuple[slice, ...]) -> Tensor:
    """A slice of a tensor in an object, by requests of at most `RANGE` bytes. Memory: the slice, and that."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, region.shape, strict=True)]
    result = torch.empty([max(0, stop - start) for start, stop in bounds], dtype=region.dtype)
    first = sum(start * stride for (start, _), stride in zip(bounds, region.strides, strict=True))
    _fill(result, path, region.offset + first * region.dtype.itemsize, region.strides)
    return result


def _fill(target: Tensor, path: Location, offset: int, strides: Shape) -> None:
    """Fill `target` with the elements that follow one another by `strides` from byte `offset` of an object on.

    What lies between them is read with them, where all of it fits in one request: that is less than another request."""
    size = target.dtype.itemsize
    span = size * (1 + sum((count - 1) * stride for count, stride in zip(target.shape, strides, strict=True)))
    if not target.numel():
        return
    if span > RANGE and target.numel() > 1:
        dim = next(dim for dim, count in enumerate(target.shape) if count > 1)
        half = target.shape[dim] // 2
        _fill(target.narrow(dim, 0, half), path, offset, strides)
        rest = target.narrow(dim, half, target.shape[dim] - half)
        return _fill(rest, path, offset + half * strides[dim] * size, strides)
    data = bytearray(path.storage.read(path.url, offset, span))
    if len(data) != span:
        raise OSError(f"{path} has become shorter")
    target.copy_(torch.frombuffer(data, dtype=torch.uint8).view(target.dtype).as_strided(target.shape, strides))


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint directory, for metadata that `read_metadata` has read, and tensors alone."""

    def __init__(self, directory: Location, metadata: Metadata):
        super().__init__(str(directory))
        self._directory = directory
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            name, number = item.storage_index.fqn, item.storage_index.index
            chunk = _described(self._metadata, name).chunks[number or 0]
            part = tuple(map(slice, item.storage_offsets, map(add, item.storage_offsets, item.lengths)))
            target = planner.resolve_tensor(item).detach()
            target.copy_(_read_chunk(self._directory, self._metadata, name, chunk, part))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
