"""A checkpoint as a source of weights.

Owns nothing but the meeting of the checkpoint's files with `weights.codec.Source`: so `cordee convert`, `generate`
and `evaluate` read it like any other format, in one process, a tensor or a part of one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cordee.checkpoint import directory
from cordee.checkpoint.files import read_metadata, read_tensor, tensors
from cordee.data.tokenizer import holds_tokenizer
from cordee.errors import Problem, ProblemError, raise_all
from cordee.families.registry import ModelSpec
from cordee.weights.codec import Source


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint, or a directory of them."""
    return (path / directory.MANIFEST).is_file() or directory.is_root(path)


def read(path: str | Path, iteration: int | None = None) -> CheckpointSource:
    """The weights of the checkpoint in `path`, or, of a directory of checkpoints, that of `iteration`, else the newest
    whole one. ProblemError if there is none or it is damaged.
    """
    path = Path(path)
    notes: list[str] = []
    if not (path / directory.MANIFEST).is_file():
        if iteration is None:
            iteration, passed_over = directory.latest(path)
            notes = [f"passed over a damaged checkpoint: {damaged}" for damaged in passed_over]
        if iteration is None:
            why = "; ".join(["it holds no whole checkpoint", *notes])
            raise ProblemError([Problem("checkpoint", path, why, "give a directory that --save has written")])
        path = path / directory.name_of(iteration)
    if (why := directory.damage(path)) is not None:
        raise ProblemError([Problem("checkpoint", path, why, "take another checkpoint")])
    return CheckpointSource(path, tuple(notes))


def _companions(root: Path, config: dict[str, Any]) -> Path | None:
    """Where the tokenizer is: beside the checkpoints, else where the run took it from, if that is still there."""
    if holds_tokenizer(root):
        return root
    places = (config.get(option) for option in ("tokenizer_name_or_path", "load"))
    return next((Path(place) for place in places if place and Path(place).is_dir()), None)


class CheckpointSource(Source):
    """The float32 master weights of a checkpoint."""

    def __init__(self, path: Path, notes: tuple[str, ...] = ()):
        self.path = path
        self.notes = notes
        self.manifest = directory.read_manifest(path)
        self.spec = ModelSpec.from_dict(self.manifest["model"])
        self.companions = _companions(path.parent, self.manifest["config"])
        try:
            self._metadata = read_metadata(path)
        except ValueError as error:
            raise ProblemError([Problem("checkpoint", path, str(error), "take another checkpoint")]) from error
        self._kept = tensors(self._metadata)
        raise_all(self._misfits())

    def dtype(self, name: str) -> torch.dtype:
        return self._kept[f"model.{name}"].properties.dtype

    def tensor(self, name: str, index: Sequence[slice] | None = None) -> Tensor:
        return read_tensor(self.path, self._metadata, f"model.{name}", None if index is None else tuple(index))

    def _misfits(self) -> list[Problem]:
        problems = []
        for name, shape in self._shapes.items():
            kept = self._kept.get(f"model.{name}")
            found = "absent" if kept is None else str(list(kept.size))
            if found != str(list(shape)):
                why = f"{name} is {found}, and the model it says it holds has {list(shape)}"
                problems.append(Problem("checkpoint", self.path, why, "take another checkpoint"))
        return problems
