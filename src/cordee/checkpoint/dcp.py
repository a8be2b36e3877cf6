"""State dicts in torch's distributed checkpoint format (DCP): in by the names of Hugging Face or of Cordée, and
out, by those of Hugging Face.

Owns finding out which names they are, and the files as torch's own reader takes them: tensors as `torch.save` writes
them, one after the other, and metadata that says where each is. A `config.json` beside the data defines the model;
other objects in a checkpoint, such as the state of an optimizer, are ignored. Archives are made without the bytes of
their tensors, which are then written in place."""

import math
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from cordee.checkpoint.files import METADATA, metadata_in, read_tensor, tensors
from cordee.checkpoint.storage import location_of
from cordee.errors import ProblemError, raise_all
from cordee.families.registry import ModelSpec, spec_from_directory
from cordee.tensors.rules import Rule
from cordee.tensors.views import Index, Shape
from cordee.weights.codec import PlannedFile, Source
from cordee.weights.files import Stored, unfit
from cordee.weights.hf import HFSource
from cordee.weights.regions import Destination
from cordee.weights.ruled import RuledSink, RuledSource
from cordee.weights.staged_sink import Output
from cordee.weights.torch_file import append

BELONGING = "put the config.json that belongs to the weights beside them"
PREFIXES = ("", "model.", "module.", "state_dict.", "state_dict.model.")  # under which programs save their model


class DistributedFile:
    """All tensors of a checkpoint whose names begin with `prefix`, by what follows it."""

    def __init__(self, path: Path, metadata: Metadata, prefix: str):
        self.path = path
        self._folder = location_of(path)
        self._metadata = metadata
        self._prefix = prefix
        kept = {name.removeprefix(prefix): t for name, t in tensors(metadata).items() if name.startswith(prefix)}
        self.tensors = {name: Stored(tuple(t.size), t.properties.dtype) for name, t in kept.items()}

    def read(self, name: str, index: Index) -> Tensor:
        return read_tensor(self._folder, self._metadata, self._prefix + name, index)


def read(path: str | Path) -> Source:
    """The weights of a distributed checkpoint. ProblemError with what is wrong with it."""
    path = Path(path)
    spec = spec_from_directory(path)
    metadata = metadata_in(path)
    foreign = {name for rule in spec.rules().values() for name in rule.foreign}
    if spec.config.tie_word_embeddings:
        foreign.discard("lm_head.weight")
    for prefix in PREFIXES:
        file = DistributedFile(path, metadata, prefix)
        if spec.shapes().keys() <= file.tensors.keys():
            return CanonicalSource(path, spec, file)
        if foreign <= file.tensors.keys():
            return HFSource(path, spec, dict.fromkeys(foreign, file))
    names = ", ".join(sorted(tensors(metadata))[:3]) or "none at all"
    why = f"its tensors have neither the names of family {spec.family.name} nor Cordée's; there are {names}"
    raise ProblemError.of(str(path), None, why, BELONGING, "unknown", limit=spec.family.name)


class CanonicalSource(RuledSource):
    """Weights by their canonical names."""

    def __init__(self, path: Path, spec: ModelSpec, file: DistributedFile):
        self.spec = spec
        self.assets = path
        self.files = dict.fromkeys(self._shapes, file)
        self._rules = {name: Rule(name, (name,)) for name in self._shapes}
        raise_all(p for name, shape in self._shapes.items() for p in unfit(file, name, shape, BELONGING))


DATA = "__0_0.distcp"  # as torch names the first file of the first rank


def planned_files(spec: ModelSpec, dtypes: Mapping[str, torch.dtype]) -> list[PlannedFile]:
    """The one file of data; each tensor takes some hundred bytes beside its own in it."""
    return [PlannedFile(DATA, sum(math.prod(shape) * dtypes[name].itemsize for name, shape in spec.shapes().items()))]


class DistributedSink(RuledSink):
    """A distributed checkpoint in the making."""

    def __init__(self, output: Output, spec: ModelSpec, dtypes: Mapping[str, torch.dtype]):
        self._tensors: dict[str, dcp.TensorStorageMetadata] = {}
        self._places: dict[dcp.MetadataIndex, _StorageInfo] = {}
        super().__init__(output, spec, spec.rules(), dtypes)

    def begin(self, folder: Path) -> None:
        self._folder = folder
        self._file = self._files.enter_context((folder / DATA).open("w+b"))

    def place(self, foreign: str, shape: Shape, dtype: torch.dtype) -> Destination:
        start, nowhere = self._file.seek(0, os.SEEK_END), torch.Size([0] * len(shape))
        region = append(self._file, torch.empty(shape, dtype=dtype))
        self._file.flush()  # before other threads write into it
        self._tensors[foreign] = dcp.TensorStorageMetadata(
            properties=dcp.TensorProperties(dtype=dtype),
            size=torch.Size(shape),
            chunks=[dcp.ChunkStorageMetadata(offsets=nowhere, sizes=torch.Size(shape))],
        )
        place = _StorageInfo(relative_path=DATA, offset=start, length=self._file.seek(0, os.SEEK_END) - start)
        self._places[dcp.MetadataIndex(foreign, nowhere)] = place
        return Destination(self._folder / DATA, region)

    def finish(self) -> None:
        paths = {name: (name,) for name in self._tensors}  # where in nested dicts: nowhere
        metadata = Metadata(dict(self._tensors), planner_data=paths, storage_data=self._places)
        (self._folder / METADATA).write_bytes(pickle.dumps(metadata))
        super().finish()
