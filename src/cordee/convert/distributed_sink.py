"""Weights into torch's distributed checkpoint format (DCP), by the names of Hugging Face.

Owns the files as torch's own reader takes them: tensors as `torch.save` writes them, one after the other, and metadata
that says where each is. The archives are made without the tensors' bytes, which then go straight to their places.
"""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from cordee.checkpoint.files import METADATA
from cordee.families.registry import ModelSpec
from cordee.tensors.views import Shape, View
from cordee.weights.codec import PlannedFile, type_of
from cordee.weights.regions import Destination
from cordee.weights.staged_sink import StagedSink
from cordee.weights.staging import Staging
from cordee.weights.torch_file import append
from cordee.weights.workers import Move

DATA = "__0_0.distcp"  # as torch names the first file of the first rank


def planned_files(spec: ModelSpec, dtypes: Mapping[str, torch.dtype]) -> list[PlannedFile]:
    """The one file of data; each tensor takes some hundred bytes beside its own in it."""
    shapes = spec.shapes()
    return [PlannedFile(DATA, sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()))]


class DistributedSink(StagedSink):
    """A distributed checkpoint in the making.

    dtype: type of all weights; None keeps each as it is put.
    workers: threads that write.
    """

    def __init__(
        self, staging: Staging, spec: ModelSpec, dtype: torch.dtype | None, companions: Path | None, workers: int = 1
    ):
        self._spec = spec
        self._dtype = dtype
        self._rules = spec.rules()
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        super().__init__(staging, self._rules, companions, workers)

    def begin(self) -> None:
        self._file = self._files.enter_context((self._staging.scratch / DATA).open("w+b"))

    def moves(self, name: str, view: View) -> Iterator[Move]:
        dtype = self._dtype or type_of(view)
        for foreign, part in self._rules[name].foreign_views(view).items():
            yield Move(part, dtype, [self._place(foreign, tuple(part.shape), dtype)])

    def _place(self, name: str, shape: Shape, dtype: torch.dtype) -> Destination:
        start, nowhere = self._file.seek(0, os.SEEK_END), torch.Size([0] * len(shape))
        try:
            region = append(self._file, torch.empty(shape, dtype=dtype))
            self._file.flush()  # before other threads write into it
        except (OSError, RuntimeError) as error:  # torch's writer of archives raises the latter
            raise self._staging.problem(error) from error
        self._tensors[name] = TensorStorageMetadata(
            properties=TensorProperties(dtype=dtype),
            size=torch.Size(shape),
            chunks=[ChunkStorageMetadata(offsets=nowhere, sizes=torch.Size(shape))],
        )
        place = _StorageInfo(relative_path=DATA, offset=start, length=self._file.seek(0, os.SEEK_END) - start)
        self._places[MetadataIndex(name, nowhere)] = place
        return Destination(self._staging.scratch / DATA, region)

    def finish(self) -> None:
        paths = {name: (name,) for name in self._tensors}  # where in nested dicts: nowhere
        metadata = Metadata(dict(self._tensors), planner_data=paths, storage_data=self._places)
        (self._staging.scratch / METADATA).write_bytes(pickle.dumps(metadata))
        self._staging.write_config(self._spec.hf_config, {kept.properties.dtype for kept in self._tensors.values()})
