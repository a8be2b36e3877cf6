"""Weights out of a checkpoint of Megatron.

Owns finding its files, and everything that can be wrong with them: missing ranks, ranks that disagree, names and shapes
that are not the model's. Degrees of parallelism, dialect and, where it can be, the model are read from the files."""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from cordee.errors import Problem, ProblemError, raise_all
from cordee.families.registry import ModelSpec, spec_from_directory
from cordee.model.config import MoEConfig
from cordee.tensors.views import Index, Leaf, Shape, View, whole
from cordee.weights.codec import Source, is_of_weights
from cordee.weights.megatron import core, legacy, pipe
from cordee.weights.megatron.arguments import GIVE_MODEL, spec_of_arguments, unclear
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.files import COPY_AGAIN, ONE_CHECKPOINT, Held, RankFile, layout_of, shown
from cordee.weights.megatron.layout import MegatronLayout, Rank, folder_of, indivisible
from cordee.weights.megatron.placement import Placement, Slot, place, tensors_of

SMALL = 2**20  # bytes up to which copies of a tensor on several ranks are compared
_IGNORED = re.compile(r".*(_extra_state|inv_freq|local_tokens_per_expert)")  # no weights


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read a checkpoint.

    spec: the model it holds; None: by the `config.json` beside it, else by the settings it carries.
    vocab_size: tokens, where the settings give only the number of padded rows.
    strict: refuse tensors that are not the model's.
    iteration: which of a checkpoint; None: the one that its tracker file names."""

    spec: ModelSpec | None = None
    vocab_size: int | None = None
    strict: bool = True
    iteration: int | None = None


def read(path: str | Path, reading: Reading = Reading()) -> "MegatronSource":
    """The weights of a checkpoint of Megatron-Core, of Megatron's legacy format, of AscendSpeed, or of a pipeline of
    DeepSpeed.

    path: a checkpoint, or the folder of an iteration. ProblemError with everything that is wrong."""
    path = Path(path)
    folder = folder_of(path, reading.iteration)
    return of_ranks(path, folder, pipe.open_folder(folder), reading)


def of_ranks(root: Path, folder: Path, files: dict[Rank, RankFile], reading: Reading) -> "MegatronSource":
    """The weights in the files of all ranks of a folder, itself of the checkpoint `root`. As `read`."""
    dialect = _recognise(folder, files)
    return MegatronSource(root, folder, files, dialect, layout_of(folder, files, dialect), reading)


class MegatronSource(Source):
    """Weights in a checkpoint of Megatron. `files` are those of all its ranks."""

    def __init__(
        self,
        root: Path,
        folder: Path,
        files: dict[Rank, RankFile],
        dialect: Dialect,
        layout: MegatronLayout,
        reading: Reading,
    ):
        self.path = folder
        self.files = files
        self.dialect = dialect
        self.layout = layout
        self._strict = reading.strict
        padded = self._padded_vocab()
        config_at = next((place for place in (root, folder.parent) if (place / "config.json").is_file()), None)
        self.assets = config_at
        self.spec = self._spec(reading, config_at, padded)
        raise_all(self._check_model(padded))
        self.dialect = self._as_split(dialect)
        self.placements: dict[str, Placement] = place(self.spec, layout, self.dialect, padded)
        raise_all(self._check_tensors())
        self.notes = (*self.notes, *self._left_out())

    def dtype(self, name: str) -> torch.dtype:
        slots = (copies[0] for copies in self.placements[name].slots)
        return reduce(torch.promote_types, (self._region(slot).dtype for slot in slots))

    def view(self, name: str) -> View:
        """ProblemError if ranks hold different values of what they should hold alike, as far as it is small."""
        placement, dtype = self.placements[name], self.dtype(name)
        parts = []
        for shape, copies in zip(placement.part_shapes, placement.slots, strict=True):
            self._compare_copies(shape, copies)
            parts.append(Leaf(shape, lambda index, slot=copies[0]: self._read(slot, index).to(dtype)))
        (view,) = placement.op.apply(parts)
        return view

    def _read(self, slot: Slot, index: Index) -> Tensor:
        if index and slot.row:
            index = (slice(index[0].start + slot.row, index[0].stop + slot.row), *index[1:])
        file = self.files[slot.rank]
        return file.file.read(file.keys[slot.virtual, slot.name], index)

    def _region(self, slot: Slot) -> Held:
        return self.files[slot.rank].region(slot.virtual, slot.name)

    def _compare_copies(self, shape: Shape, copies: tuple[Slot, ...]) -> None:
        first, *others = copies
        region = self._region(first)
        if math.prod(region.shape) * region.dtype.itemsize > SMALL:
            return
        expected = self._read(first, whole(shape))
        for slot in others:
            if not torch.equal(expected, self._read(slot, whole(shape))):
                why = f"{slot.name} of stage {slot.rank.pipeline} differs between {first.rank} and {slot.rank}"
                raise ProblemError.of(str(self.path), None, why, ONE_CHECKPOINT, "disagree", limit=slot.name)

    def _padded_vocab(self) -> int:
        (name,) = self.dialect.model_names("embedding.weight") or ("",)
        first = self.files[Rank()]
        shape = first.region(0, name).shape if (0, name) in first.keys else ()
        if not shape:
            why = f"its first rank has no embedding of several rows ({name})"
            raise ProblemError.of(str(self.path), None, why, COPY_AGAIN, "missing", limit=name)
        return shape[0] * self.layout.tensor

    def _spec(self, reading: Reading, config_at: Path | None, padded: int) -> ModelSpec:
        if reading.spec is not None:
            return reading.spec
        if config_at is not None:
            return spec_from_directory(config_at)
        args, layers = self.files[Rank()].args, self.layout.num_layers
        stored = getattr(args, "num_layers", None)
        if type(stored) is int and stored != layers:  # checked first: no memory may hold so many layers
            why = f"by its settings it has {shown(stored)} layers, but its ranks hold {layers}"
            raise ProblemError([unclear(str(self.path), None, why)])
        return spec_of_arguments(args, reading.vocab_size or padded, str(self.path))

    def _check_model(self, padded: int) -> Iterator[Problem]:
        """Whether the model can be in files of this layout."""
        config, layers = self.spec.config, self.layout.num_layers
        if layers != config.num_layers:
            why = f"its ranks hold {layers} layers, the model has {config.num_layers}"
            yield unclear(str(self.path), None, why, limit="num_layers")
        if padded < config.vocab_size:
            why = f"its embedding has {padded} rows, but the model has {config.vocab_size} tokens"
            yield unclear(str(self.path), None, why, limit="vocab_size")
        for problem in indivisible(config, self.layout.tensor, self.layout.expert):
            yield unclear(str(self.path), None, f"its ranks are not those of the model: {problem.why}")

    def _as_split(self, dialect: Dialect) -> Dialect:
        """`dialect`, with shared experts whole on every tensor rank if they are so in these files."""
        for number, layer in enumerate(self.spec.config.layers):
            if isinstance(layer.mlp, MoEConfig) and layer.mlp.shared is not None:
                chunk, n = self.layout.place_of_layer(number)
                (name,) = dialect.names_in_layer("mlp.shared.down.weight", layer, n) or ("",)
                file = self.files[Rank(0, chunk.pipeline)]
                if (chunk.virtual, name) in file.keys:
                    unsplit = file.region(chunk.virtual, name).shape[1:] == (layer.mlp.shared.ffn_hidden_size,)
                    return replace(dialect, shared_split=not unsplit)
        return dialect

    def _check_tensors(self) -> Iterator[Problem]:
        """Names, shapes and types of the tensors in the files."""
        needed = {key: shape for key, (shape, _) in tensors_of(self.placements).items()}
        found = {(rank, *key): file.region(*key) for rank, file in self.files.items() for key in file.keys}
        unknown = {name for *_, name in found.keys() - needed.keys() if not _IGNORED.fullmatch(name)}
        if missing := {name for *_, name in needed.keys() - found.keys()}:
            yield unclear(str(self.path), None, f"tensors are missing: {_listed(missing)}", limit=missing)
        if unknown and self._strict:
            why = f"tensors that the model does not have: {_listed(unknown)}"
            yield unclear(str(self.path), None, why, f"{GIVE_MODEL}, or --no-checking to leave them out", limit=unknown)
        elif unknown:
            self.notes = (*self.notes, f"tensors that the model does not have left out: {_listed(unknown)}")
        present = [(key[-1], shape, found[key]) for key, shape in needed.items() if key in found]
        for name, (shape, wrong) in {n: (s, r.shape) for n, s, r in present if r.shape != s}.items():
            yield unclear(str(self.path), None, f"{name} is {list(wrong)} instead of {list(shape)}", limit=name)
        if wrong := {f"{name} of {region.dtype}" for name, _, region in present if not is_of_weights(region.dtype)}:
            why = f"weights that are quantised, which is not supported, or are none: {_listed(wrong)}"
            yield Problem(str(self.path), None, why, "take the unquantised checkpoint", "dtype")

    def _left_out(self) -> Iterator[str]:
        first = self.files[Rank()].file
        if first.not_read:
            yield f"objects beside the weights not read: {', '.join(first.not_read)}"
        if isinstance(first.content, dict) and first.content.get("optimizer") is not None:
            yield "the state of the optimizer is not converted"


def _recognise(folder: Path, files: dict[Rank, RankFile]) -> Dialect:
    names = {name for file in files.values() for _, name in file.keys}
    for codec in (core, legacy):
        if (dialect := codec.recognise(names)) is not None:
            return dialect
    why = f"its tensors have names of no known form, such as {', '.join(sorted(names)[:3]) or 'none at all'}"
    raise ProblemError.of(str(folder), None, why, "give a checkpoint of a GPT model")


def _listed(names: Iterable[str], most: int = 20) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
