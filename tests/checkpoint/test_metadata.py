"""Metadata of strangers: what torch itself pickles, with places and chunks that cannot be."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cordee.checkpoint import files
from cordee.checkpoint.storage import location_of
from cordee.errors import ProblemError
from tests.problems import facts

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
FILE = "__0_0.distcp"


def chunk(offsets: list[int], sizes: list[int]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def write(folder: Path, tensor: torch.Tensor, chunks: list[ChunkStorageMetadata], **place: object) -> Path:
    """A checkpoint of `tensor` in these chunks, each of which is said to be at `place`, as far as that is given."""
    places = {}
    with (folder / FILE).open("wb") as file:
        for part in chunks:
            data, start = io.BytesIO(), file.tell()
            index = tuple(slice(o, o + s) for o, s in zip(part.offsets, part.sizes, strict=True))
            torch.save(tensor[index].clone(), data)
            file.write(data.getvalue())
            at = replace(_StorageInfo(FILE, start, len(data.getvalue())), **place)
            places[MetadataIndex("w", part.offsets)] = at
    kept = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), tensor.size(), chunks)
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({"w": kept}, storage_data=places)))
    return folder


W = torch.arange(24.0).view(4, 6)
ALL = [chunk([0, 0], [4, 6])]


@pytest.mark.parametrize(
    "chunks",
    [
        ALL,
        [chunk([0, 0], [1, 6]), chunk([1, 0], [3, 6])],
        [chunk([r, c], [2, 3]) for r in (0, 2) for c in (0, 3)],
        [chunk([0, 0], [4, 2]), chunk([0, 2], [4, 4]), chunk([0, 6], [4, 0])],
    ],
)
def test_chunks_are_one_tensor(tmp_path, chunks):
    metadata = files.read_metadata(location_of(write(tmp_path, W, chunks)))
    assert torch.equal(files.read_tensor(location_of(tmp_path), metadata, "w"), W)
    part = (slice(1, 3), slice(2, 5))
    assert torch.equal(files.read_tensor(location_of(tmp_path), metadata, "w", part), W[part])
    found = {"w": torch.zeros(4, 6)}
    dcp.load(found, storage_reader=files.SafeReader(location_of(tmp_path), metadata), no_dist=True)
    assert torch.equal(found["w"], W)


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [chunk([0, 0], [4, 3])],
        [chunk([0, 0], [2, 6]), chunk([1, 0], [3, 6])],
        [chunk([0, 0], [4, 3]), chunk([0, 1], [4, 3])],  # as many elements as there are, but not each
        [chunk([i, i], [1, 1]) for i in range(4)],
    ],
    ids=["none", "half", "overlapping", "one twice", "diagonal"],
)
def test_chunks_that_leave_holes(tmp_path, chunks):
    """What no chunk covers would be whatever is in memory."""
    folder = location_of(write(tmp_path, W, chunks))
    with pytest.raises(ValueError):
        files.read_metadata(folder)


@pytest.mark.parametrize(
    "place",
    [
        {"relative_path": "../outside"},
        {"relative_path": "/etc/passwd"},
        {"relative_path": "a/b"},
        {"relative_path": ".."},
        {"relative_path": ""},
        {"relative_path": "x\0"},
        {"relative_path": Path(FILE)},
        {"offset": -1},
        {"offset": 2**63},
        {"offset": 10**6},
        {"offset": 1.0},
        {"length": 8},
        {"length": 10**6},
        {"transform_descriptors": ["zstd"]},
    ],
    ids=str,
)
def test_places_that_are_none(tmp_path, place):
    (tmp_path.parent / "outside").write_bytes(bytes(4096))
    with pytest.raises(ValueError):
        files.read_metadata(location_of(write(tmp_path, W, ALL, **place)))


def changed(folder: Path, change) -> Path:
    path = write(folder, W, ALL) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata)
    path.write_bytes(pickle.dumps(metadata))
    return folder


def larger(metadata: Metadata) -> None:
    """A tensor of 4 TB in a file of some hundred bytes."""
    size = torch.Size([2**20, 2**20])
    metadata.state_dict_metadata["w"] = TensorStorageMetadata(
        TensorProperties(), size, [ChunkStorageMetadata(torch.Size([0, 0]), size)]
    )


@pytest.mark.parametrize(
    "change",
    [
        larger,
        lambda metadata: metadata.storage_data.clear(),
        lambda metadata: setattr(metadata, "storage_data", None),
        lambda metadata: setattr(metadata, "state_dict_metadata", [1]),
        lambda metadata: metadata.state_dict_metadata.update(w=3),
        lambda metadata: metadata.state_dict_metadata.update({7: metadata.state_dict_metadata["w"]}),
        lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", (4, -6)),
        lambda metadata: setattr(metadata.state_dict_metadata["w"], "size", 3),
        lambda metadata: setattr(metadata.state_dict_metadata["w"], "chunks", 3),
        lambda metadata: setattr(metadata.state_dict_metadata["w"], "properties", None),
        lambda metadata: setattr(metadata.state_dict_metadata["w"].properties, "dtype", "float32"),
        lambda metadata: setattr(metadata.state_dict_metadata["w"].chunks[0], "sizes", (4,)),
        lambda metadata: setattr(metadata.state_dict_metadata["w"].chunks[0], "offsets", (1, 0)),
        lambda metadata: metadata.storage_data.update({"w": 1}),
    ],
)
def test_metadata_of_another_form(tmp_path, change):
    with pytest.raises(ValueError):
        files.read_metadata(location_of(changed(tmp_path, change)))


def test_another_tensor_than_it_says(tmp_path):
    changed(tmp_path, lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.int32))
    folder = location_of(tmp_path)
    metadata = files.read_metadata(folder)
    with pytest.raises(ProblemError) as caught:
        files.read_tensor(folder, metadata, "w")
    assert facts(caught) == [("checkpoint", str(folder / FILE), "corrupt")]
    with pytest.raises(dcp.CheckpointException) as failed:
        found = {"w": torch.zeros(4, 6, dtype=torch.int32)}
        dcp.load(found, storage_reader=files.SafeReader(folder, metadata), no_dist=True)
    assert [type(error) for error, _ in failed.value.failures.values()] == [ProblemError]
