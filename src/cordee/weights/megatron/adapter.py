"""Adapters that Megatron's training of LoRA saves: matrices A and B of each rank, in the files of a checkpoint.

Owns finding them in their own layout. Of a linear layer split by its outputs a rank holds all of A and its rows of B,
split by its inputs its columns of A and all of B: so each rank's product belongs to its own part of the weight."""

import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from cordee.errors import Problem, ProblemError, raise_all
from cordee.families.registry import ModelSpec
from cordee.tensors.views import Index, Op
from cordee.weights.adapter import Adapter, Change, Given, LowRank, is_factor
from cordee.weights.codec import is_of_weights
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.files import COPY_AGAIN, RankFile, by_rank, layout_of, open_ranks, shown
from cordee.weights.megatron.layout import Rank, folder_of
from cordee.weights.megatron.padding import padded_rows
from cordee.weights.megatron.placement import Key, Slot, place, tensors_of
from cordee.weights.torch_file import Keys

ALPHA = 32.0  # as the systems that write such files have it
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_TRAINED_WHOLE = re.compile(r".*\.(modules_to_save|original_module)\..*")


def read(given: Given, spec: ModelSpec, dialect: Dialect) -> "MegatronAdapter":
    """The adapter at `given.path`, for a base model `spec` with names of `dialect`. ProblemError with all that is
    wrong with it."""
    folder = folder_of(given.path)
    return MegatronAdapter(given, folder, by_rank(folder, open_ranks(folder)), spec, dialect)


class MegatronAdapter(Adapter):
    """LoRA in a checkpoint of Megatron. `files` are those of all its ranks."""

    def __init__(self, given: Given, folder: Path, files: dict[Rank, RankFile], spec: ModelSpec, dialect: Dialect):
        self._path = folder
        self._files = files
        layout = layout_of(folder, files, dialect, spec.config.num_layers)
        if (found := layout.num_layers) != spec.config.num_layers:
            why = f"its ranks hold adapters of {found} layers, but the model has {spec.config.num_layers}"
            fix = "take the adapter of this model"
            raise ProblemError.of(str(folder), None, why, fix, "layers", limit=spec.config.num_layers)
        self._placements = place(spec, layout, dialect, padded_rows(spec.config.vocab_size, layout.tensor))
        self._factors = _factors(files)
        raise_all([*self._check_names(), *given.check_modules(name for *_, name in self._factors)])
        raise_all(self._check_shapes())
        raise_all(self._check_rank(given.r))
        self._alpha = self._alpha_of(given)

    def changes(self, name: str) -> tuple[Op, Sequence[Change | None]] | None:
        placement = self._placements[name]
        changes = [self._change(copies[0]) for copies in placement.slots]
        return (placement.op, changes) if any(changes) else None

    def _change(self, slot: Slot) -> LowRank | None:
        keys = self._factors.get(slot.key)
        if keys is None:
            return None
        file = self._files[slot.rank].file

        def b(index: Index) -> Tensor:
            rows, rank = index
            return file.read(keys["B"], (slice(rows.start + slot.row, rows.stop + slot.row), rank))

        r = file.tensors[keys["A"]].shape[0]
        return LowRank(partial(file.read, keys["A"]), b, r, self._alpha / r)

    def _check_names(self) -> Iterator[Problem]:
        if not self._factors:
            yield Problem(str(self._path), None, "there is no adapter in it", "give what training LoRA has saved")
        known = tensors_of(self._placements).keys()
        if unknown := sorted({name for *_, name in self._factors.keys() - known}):
            why = f"the model has no such weights: {', '.join(unknown[:5])}"
            yield Problem(str(self._path), None, why, "take the adapter of this model")
        for (_, _, name), keys in self._factors.items():
            if len(keys) < 2:
                yield Problem(str(self._path), None, f"of {name} there is only {', '.join(keys)}", COPY_AGAIN)
        whole = {name for file in self._files.values() for _, name in file.keys if _TRAINED_WHOLE.fullmatch(name)}
        if whole:
            why = f"modules that were trained as a whole are not merged: {', '.join(sorted(whole)[:3])}"
            yield Problem(str(self._path), None, why, "train without --lora-modules-to-save")

    def _check_rank(self, given: int | None) -> Iterator[Problem]:
        found = {self._files[rank].file.tensors[keys["A"]].shape[0] for (rank, _, _), keys in self._factors.items()}
        if given is not None and found != {given}:
            why = f"the matrices have rank {', '.join(map(str, sorted(found)))}"
            yield Problem("--lora-r", given, why, "leave it out", "stated", limit=found)

    def _check_shapes(self) -> Iterator[Problem]:
        for shape, slot in (part for placement in self._placements.values() for part in placement.stored()):
            if (keys := self._factors.get(slot.key)) is not None:
                regions = [self._files[slot.rank].file.tensors[keys[letter]] for letter in "AB"]
                if wrong := [str(region.dtype) for region in regions if not is_of_weights(region.dtype)]:
                    why = f"A or B of {slot.name} is of type {wrong[0]}"
                    yield Problem(str(self._path), None, why, "take an adapter that is not quantised", "dtype")
                a, b = (region.shape for region in regions)
                fits = len(a) == len(b) == len(shape) == 2 and a[0] == b[1] > 0 and a[1] == shape[1]
                if not fits or b[0] < slot.row + shape[0]:
                    why = f"A of {list(a)} and B of {list(b)} do not make {list(shape)} of {slot.name}"
                    yield Problem(str(self._path), None, why, "take this model's adapter", "shape", limit=slot.name)

    def _alpha_of(self, given: Given) -> float:
        """As the settings in the checkpoint say, else as the user does, else what is usual."""
        args: Namespace | None = self._files[Rank()].args
        stored = getattr(args, "lora_alpha", None)
        if stored is not None and not is_factor(stored):
            raise ProblemError.of("args.lora_alpha", shown(stored), "it must be a positive number", COPY_AGAIN)
        if stored is not None and given.alpha not in (None, stored):
            why = f"the adapter was trained with {stored}"
            raise ProblemError.of("--lora-alpha", given.alpha, why, "leave it out", "stated", limit=stored)
        if stored is None and given.alpha is None:
            self.notes = (*self.notes, f"the adapter does not say its alpha: taken as {ALPHA:g} (--lora-alpha)")
        return float(stored or given.alpha or ALPHA)


def _factors(files: dict[Rank, RankFile]) -> dict[Key, dict[str, Keys]]:
    """The keys of A and B in the files, by the weight that they are of."""
    found: dict[Key, dict[str, Keys]] = {}
    for rank, file in files.items():
        for (chunk, name), keys in file.keys.items():
            if match := _FACTOR.fullmatch(name):
                found.setdefault((rank, chunk, f"{match[1]}.weight"), {})[match[2]] = keys
    return found
