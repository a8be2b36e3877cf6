"""A checkpoint as a source of weights.

Owns the `weights.codec.Source` of a checkpoint, by which `cordee convert`, `generate` and `evaluate` read it like any
other format, in one process, a tensor or a part of one at a time."""

import threading
from pathlib import Path

import torch
from torch import Tensor

from cordee import sealed
from cordee.checkpoint import assets, directory
from cordee.checkpoint.files import METADATA, read_metadata, read_tensor, tensors
from cordee.checkpoint.storage import Location, location_of
from cordee.errors import Problem, ProblemError, Problems, raise_all
from cordee.families.count import shapes_of
from cordee.families.registry import STORED_SPEC, ModelSpec
from cordee.tensors.views import Index, Leaf, View
from cordee.weights.codec import Source

# What is read of a manifest here.
_FORM = sealed.record({"model": STORED_SPEC}, {"base": directory.BASE})


def read(path: str | Path | Location, iteration: int | None = None) -> "CheckpointSource":
    """The weights of the checkpoint in `path`, or, of a directory of checkpoints, that of `iteration`, else the newest
    whole one. ProblemError if there is none or it is damaged."""
    path = location_of(path)
    notes: list[str] = []  # what was skipped
    if not (path / directory.MANIFEST).is_file():
        if iteration is None:
            iteration, notes = directory.latest(path)
        if iteration is None:
            why = "; ".join(["there is no good checkpoint", *notes])
            raise ProblemError.of("checkpoint", str(path), why, "give a directory that --save has written", "missing")
        path = directory.folder_of(path, iteration)
    if (why := directory.damage(path)) is not None:
        raise _corrupt(path, why)
    return CheckpointSource(path, tuple(notes))


class CheckpointSource(Source):
    """The float32 master weights of a checkpoint, or, over a `base`, of what was trained there alone. Files are checked
    against their checksums when first read from."""

    def __init__(self, path: Location, notes: tuple[str, ...] = ()):
        self.path = path
        self.notes = notes
        self._checked = {METADATA}
        self._checking = threading.Lock()
        try:
            self.manifest = directory.read_manifest(path, _FORM)
            if (why := directory.changed(path, self.manifest, {METADATA})) is not None:
                raise ValueError(why)
            self._metadata = read_metadata(path)
        except ValueError as error:
            raise _corrupt(path, str(error)) from error
        self.spec = ModelSpec.from_dict(self.manifest["model"])
        self.assets = assets.beside(path)
        self.base: dict[str, str] | None = self.manifest.get("base")
        if self.base is not None:
            self._shapes = shapes_of(self.spec.config, "tuned", "adapter", "head")
        self._kept = tensors(self._metadata)
        self._files: dict[str, set[str]] = {}
        for index, place in self._metadata.storage_data.items():
            self._files.setdefault(index.fqn, set()).add(place.relative_path)
        raise_all(self._misfits())

    def dtype(self, name: str) -> torch.dtype:
        return self._kept[f"model.{name}"].properties.dtype

    def view(self, name: str) -> View:
        return Leaf(self.shape(name), lambda index: self._read(f"model.{name}", index))

    def _read(self, name: str, index: Index) -> Tensor:
        self._require_unchanged(self._files[name])
        return read_tensor(self.path, self._metadata, name, index)

    def _require_unchanged(self, names: set[str]) -> None:
        """ProblemError if a file that is read from now has other bytes than were saved; each is checked once."""
        if names <= self._checked:
            return
        with self._checking:  # other threads wait for the file that they need
            new = names - self._checked
            if new and (why := directory.changed(self.path, self.manifest, new)) is not None:
                raise _corrupt(self.path, why)
            self._checked |= new

    def _misfits(self) -> Problems:
        for name, shape in self._shapes.items():
            kept = self._kept.get(f"model.{name}")
            if kept is None or list(kept.size) != list(shape):
                found = "missing" if kept is None else f"of shape {list(kept.size)}"
                why = f"{name} is {found}, the model of the checkpoint has {list(shape)}"
                yield Problem("checkpoint", str(self.path), why, "take another checkpoint", "shape", limit=name)


def _corrupt(path: Location, why: str) -> ProblemError:
    return ProblemError.of("checkpoint", str(path), why, "take another checkpoint, or copy this one again", "corrupt")
