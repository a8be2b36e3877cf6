"""Checkpoints that Megatron-Core saves whole (`--ckpt-format torch_dist`), read as the file of a single rank.

Owns how tensors and their names in such a folder differ from those of a rank that has all of the model: layers of one
form are stacked in a tensor, and so are experts. Data and metadata are those of torch's distributed checkpoints; what
is beside the weights is in `common.pt`, or, since core 0.19, one of the objects among the data. The state of optimizers
is not looked at."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from cordee.checkpoint.files import metadata_in, read_tensor, tensors
from cordee.checkpoint.storage import location_of
from cordee.errors import ProblemError
from cordee.tensors.views import Index, Shape
from cordee.weights import files
from cordee.weights.megatron.files import COPY_AGAIN, RankFile, open_file, shown
from cordee.weights.megatron.layout import DISTRIBUTED, Rank, backend
from cordee.weights.megatron.source import MegatronSource, Reading, of_ranks
from cordee.weights.torch_file import Keys, content_in

BACKEND = "torch_dist"
COMMON_FILE = "common.pt"
COMMON = "common_state/shard_0_1"  # the object that is a list of what else would be in that file
PARTS = 2**22  # tensors that may be stacked in others
_OF_OPTIMIZERS = re.compile(r"(chained_\d+\.)?optimizer\.")
_LAYERS = re.compile(r"(decoder\.layers\.)(?!\d+\.)(.+)")
_EXPERTS = re.compile(r"(.*\.mlp\.experts\.)experts\.(.+)")
_NORM = re.compile(r"(.*\.)mlp\.linear_fc1\.layer_norm_(weight|bias)")


def read(root: Path, folder: Path, reading: Reading) -> MegatronSource:
    """The weights in a folder, itself of the checkpoint `root`. ProblemError with what is wrong with them."""
    if (found := backend(folder)) != BACKEND:
        why, fix = f"its tensors are stored by {shown(found)}", f"save it with --ckpt-format {BACKEND} in Megatron"
        raise ProblemError.of(str(folder / DISTRIBUTED), None, why, fix, "unknown", limit=BACKEND)
    metadata = metadata_in(folder, lambda name: not _OF_OPTIMIZERS.match(name))
    content, not_read = _common(folder, metadata)
    try:
        file = _Whole(folder, metadata, content, not_read)
    except ValueError as error:
        raise ProblemError.of(str(folder), None, str(error), COPY_AGAIN, "unreadable") from error
    return of_ranks(root, folder, {Rank(): RankFile(file, {(0, name): (name,) for (name,) in file.tensors})}, reading)


def _common(folder: Path, metadata: Metadata) -> tuple[Any, list[str]]:
    """What is beside the weights, by name, and the names of what was not read of it."""
    place = metadata.storage_data.get(MetadataIndex(COMMON))
    if place is None or (folder / COMMON_FILE).exists():
        file = files.opened(folder / COMMON_FILE, open_file, COPY_AGAIN)
        return file.content, file.not_read
    return files.opened(folder / place.relative_path, lambda path: _object(path, place), COPY_AGAIN)


def _object(path: Path, place: _StorageInfo) -> tuple[Any, list[str]]:
    """The one object in the list that is saved there. Raises one of `UNREADABLE`."""
    content, not_read = content_in(path, place.offset, place.length)
    if not isinstance(content, list) or len(content) != 1 or not isinstance(content[0], dict):
        raise ValueError("it holds nothing by name")
    return content[0], not_read


@dataclass(frozen=True)
class _Part:
    """A tensor of a rank, or of those stacked in it the one at the numbers `at`; `chunks`: in which it is."""

    stored: str
    at: tuple[int, ...]
    shape: Shape
    dtype: torch.dtype
    chunks: Sequence[ChunkStorageMetadata]


class _Whole:
    """Tensors by the names that a rank has for them. ValueError if one is there twice, or too many are stacked."""

    def __init__(self, folder: Path, metadata: Metadata, content: Any, not_read: list[str]):
        self.content = content
        self.not_read = not_read
        self.tensors: dict[Keys, _Part] = {}
        self._folder = location_of(folder)
        self._metadata = metadata
        for name, part in _parts(tensors(metadata)):
            if (name,) in self.tensors:
                raise ValueError(f"it holds {name} twice")
            self.tensors[name,] = part

    def read(self, keys: Keys, index: Index) -> Tensor:
        part = self.tensors[keys]
        first = tuple(slice(number, number + 1) for number in part.at)
        found = read_tensor(self._folder, self._metadata, part.stored, (*first, *index), part.chunks)
        return found[(0,) * len(part.at)]


def _parts(kept: Mapping[str, TensorStorageMetadata]) -> Iterator[tuple[str, _Part]]:
    around = {name: _around(name, kept) for name in kept}
    depths = {name: len(texts) - 1 for name, texts in around.items()}
    for name, depth in depths.items():
        if len(kept[name].size) < depth:
            raise ValueError(f"{name} should be stacked, but has the shape {list(kept[name].size)}")
    if sum(math.prod(chunk.sizes[: depths[name]]) for name in kept for chunk in kept[name].chunks) > PARTS:
        raise ValueError(f"more than {PARTS} tensors are stacked in its own")
    for name, tensor in kept.items():
        depth, chunks = depths[name], {}
        for chunk in tensor.chunks:
            ranges = (range(at, at + size) for at, size in zip(chunk.offsets[:depth], chunk.sizes, strict=False))
            for at in product(*ranges):
                chunks.setdefault(at, []).append(chunk)
        for at, within in chunks.items():
            whole = "".join(chain(*zip_longest(around[name], map(str, at), fillvalue="")))
            yield whole, _Part(name, at, tuple(tensor.size[depth:]), tensor.properties.dtype, within)


def _around(stored: str, names: Mapping[str, object]) -> list[str]:
    """What stands around the numbers of layer and expert in the names of what is stacked in a tensor.

    Megatron's own layers save a norm by Transformer Engine's name, as part of the linear layer that follows it, also
    where experts follow it, of which that engine's layers say otherwise."""
    if (match := _NORM.fullmatch(stored)) and f"{match[1]}mlp.router.weight" in names:
        stored = f"{match[1]}pre_mlp_layernorm.{match[2]}"
    match = _LAYERS.fullmatch(stored)
    before, rest = ([match[1]], f".{match[2]}") if match else ([], stored)
    if match := _EXPERTS.fullmatch(rest):
        before, rest = [*before, f"{match[1]}local_experts."], f".{match[2]}"
    return [*before, rest]
