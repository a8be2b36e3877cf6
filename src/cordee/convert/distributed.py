"""State dicts in torch's distributed checkpoint format (DCP), by the names of Hugging Face or of Cordée.

Owns finding out which names they are. A `config.json` beside the data tells the model; other objects in the checkpoint,
such as the state of an optimizer, are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata

from cordee.checkpoint.files import METADATA, read_metadata, read_tensor, tensors
from cordee.errors import Problem, ProblemError
from cordee.families.registry import ModelSpec, spec_from_directory
from cordee.tensors.views import Index
from cordee.weights.codec import Source
from cordee.weights.files import Stored
from cordee.weights.hf import HFSource

PREFIXES = ("", "model.", "module.", "state_dict.", "state_dict.model.")  # under which programs save their model


class DistributedFile:
    """All tensors of a checkpoint whose names begin with `prefix`, by what follows it."""

    def __init__(self, path: Path, metadata: Metadata, prefix: str):
        self.path = path
        self._metadata = metadata
        self._prefix = prefix
        kept = {name.removeprefix(prefix): t for name, t in tensors(metadata).items() if name.startswith(prefix)}
        self.tensors = {name: Stored(tuple(t.size), t.properties.dtype) for name, t in kept.items()}

    def read(self, name: str, index: Index) -> Tensor:
        return read_tensor(self.path, self._metadata, self._prefix + name, index)


def read(path: str | Path) -> Source:
    """The weights of a distributed checkpoint. ProblemError with what is wrong with it."""
    path = Path(path)
    spec = spec_from_directory(path)
    try:
        metadata = read_metadata(path)
    except ValueError as error:
        raise ProblemError([Problem(str(path / METADATA), None, str(error), "copy the checkpoint again")]) from error
    foreign = {name for rule in spec.rules().values() for name in rule.foreign}
    if spec.config.tie_word_embeddings:
        foreign.discard("lm_head.weight")
    for prefix in PREFIXES:
        file = DistributedFile(path, metadata, prefix)
        if spec.shapes().keys() <= file.tensors.keys():
            return CanonicalSource(path, spec, file)
        if foreign <= file.tensors.keys():
            source = HFSource(path, spec, dict.fromkeys(foreign, file))
            return source
    names = ", ".join(sorted(tensors(metadata))[:3]) or "none at all"
    why = f"its tensors have neither the names of family {spec.family.name} nor Cordée's; there are {names}"
    raise ProblemError([Problem(str(path), None, why, "put the config.json that belongs to the weights beside them")])


class CanonicalSource(Source):
    """Weights by their canonical names."""

    def __init__(self, path: Path, spec: ModelSpec, file: DistributedFile):
        self.spec = spec
        self.companions = path
        self._file = file
        for name, shape in self._shapes.items():
            if (found := file.tensors[name].shape) != shape:
                why = f"its shape is {list(found)}, but by config.json it is {list(shape)}"
                fix = "put the config.json that belongs to the weights beside them"
                raise ProblemError([Problem(f"{path}: {name}", None, why, fix)])

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._file.tensors[name].dtype
        assert dtype is not None
        return dtype

    def tensor(self, name: str, index: Sequence[slice] | None = None) -> Tensor:
        return self._file.read(name, tuple(index or ()))
