"""Weights into a checkpoint of Megatron.

Owns the files: their folders, what stands in them beside the weights, and the order of writing. All files are laid out
before the first tensor comes, so that each tensor goes straight to its places and none is held back.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cordee.errors import Problem, ProblemError
from cordee.families.registry import ModelSpec
from cordee.tensors.views import Shape, View
from cordee.weights.codec import PlannedFile
from cordee.weights.megatron.arguments import arguments, dtype_arguments
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.layout import DEEPSPEED_TRACKER, FILE, RELEASE, TRACKER, Layout, Rank, Wanted
from cordee.weights.megatron.padding import padded_rows
from cordee.weights.megatron.placement import Placement, Slot, place
from cordee.weights.regions import Destination, Region
from cordee.weights.staged_sink import StagedSink
from cordee.weights.staging import Staging
from cordee.weights.torch_file import create
from cordee.weights.workers import Move

Form = Literal["megatron", "release", "deepspeed"]
VERSION = 3.0  # the form of checkpoints in which q, k and v of a group stand together
ITERATION = 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """A checkpoint to be written: its dialect, layout, the multiple for its vocabulary, and the form of its folders.

    form: Megatron's folders of an iteration, or of a `release`, or DeepSpeed's files in a `release` folder.
    settings: arguments to store beside those that the model and the layout imply; None stores none at all.
    """

    dialect: Dialect
    wanted: Wanted = field(default_factory=Wanted)
    vocab_multiple: int = 1
    form: Form = "megatron"
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """Where everything goes. `dtypes` are by canonical name."""

    target: Target
    spec: ModelSpec
    layout: Layout
    padded_vocab: int
    placements: dict[str, Placement]
    dtypes: dict[str, torch.dtype]

    def path(self, rank: Rank) -> str:
        """A rank's file, from the root of the checkpoint."""
        if self.target.form == "deepspeed":
            return f"{RELEASE}/mp_rank_{rank.tensor:02d}_model_states.pt"
        folder = RELEASE if self.target.form == "release" else f"iter_{ITERATION:07d}"
        return f"{folder}/{self.layout.folder(rank)}/{FILE}"

    def tensors(self) -> dict[Rank, dict[tuple[int, str], tuple[Shape, torch.dtype]]]:
        """Shape and type of every tensor of every file, by chunk and name."""
        held: dict[Rank, dict[tuple[int, str], tuple[Shape, torch.dtype]]] = {rank: {} for rank in self.layout.ranks()}
        for name, placement in self.placements.items():
            dtype = self.dtypes[name]
            for shape, copies in zip(placement.part_shapes, placement.slots, strict=True):
                for slot in copies:
                    in_file, key = held[slot.rank], (slot.virtual, slot.name)
                    rows = (slot.row + shape[0], *shape[1:])
                    before = in_file.get(key)
                    if before is not None and before[0][0] > rows[0]:
                        rows = before[0]
                    in_file[key] = (rows, dtype)
        return held

    def files(self) -> list[PlannedFile]:
        return [
            PlannedFile(self.path(rank), sum(torch.Size(s).numel() * t.itemsize for s, t in tensors.values()))
            for rank, tensors in sorted(self.tensors().items())
        ]


def plan(spec: ModelSpec, dtypes: Mapping[str, torch.dtype], target: Target) -> Plan:
    """Lay a checkpoint out. ProblemError with everything about `target` that the model does not allow."""
    if target.form == "deepspeed" and target.wanted.pipeline > 1:
        why = "DeepSpeed's files are of tensor ranks only"
        raise ProblemError([Problem("--target-pipeline-parallel-size", target.wanted.pipeline, why, "take 1")])
    layout = target.wanted.layout(spec.config)
    padded = padded_rows(spec.config.vocab_size, target.vocab_multiple * target.wanted.tensor)
    return Plan(target, spec, layout, padded, place(spec, layout, target.dialect, padded), dict(dtypes))


class MegatronSink(StagedSink):
    """A checkpoint in the making.

    companions: directory of tokenizer files to go along.
    workers: threads that write.
    """

    def __init__(self, staging: Staging, plan: Plan, companions: Path | None, workers: int = 1):
        self.plan = plan
        self._regions: dict[Slot, Region] = {}  # where each tensor goes
        super().__init__(staging, plan.placements, companions, workers)

    def begin(self) -> None:
        """Make all files, without values."""
        args = self._arguments()
        for rank, tensors in self.plan.tensors().items():
            path = self._staging.scratch / self.plan.path(rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            found = create(path, self._content(tensors, args))
            for virtual, name in tensors:
                keys = (self._key(virtual), *self.plan.target.dialect.keys(name))
                self._regions[Slot(rank, virtual, name)] = found[keys]

    def _key(self, virtual: int) -> str:
        if self.plan.target.form == "deepspeed":
            return "module"
        return f"model{virtual}" if self.plan.layout.virtual else "model"

    def _content(
        self, tensors: dict[tuple[int, str], tuple[Shape, torch.dtype]], args: Namespace | None
    ) -> dict[str, object]:
        """What a file holds; the memory of its tensors is never touched."""
        content: dict[str, Any] = {"checkpoint_version": VERSION}
        if args is not None:
            content |= {"args": args, "iteration": ITERATION}
        if self.plan.target.form == "deepspeed":
            content["dp_world_size"] = 0
        for (virtual, name), (shape, dtype) in tensors.items():
            *outer, last = self.plan.target.dialect.keys(name)
            place = content.setdefault(self._key(virtual), {})
            for key in outer:
                place = place.setdefault(key, {})
            place[last] = torch.empty(shape, dtype=dtype)
        return content

    def _arguments(self) -> Namespace | None:
        plan = self.plan
        if plan.target.settings is None:
            return None
        more = dtype_arguments(self._common_dtype()) | {
            "make_vocab_size_divisible_by": plan.target.vocab_multiple,
            **plan.target.settings,
        }
        return arguments(plan.spec.config, plan.layout, plan.padded_vocab, **more)

    def _common_dtype(self) -> torch.dtype:
        """The type of most weights: that of the embedding."""
        return self.plan.dtypes["embedding.weight"]

    def moves(self, name: str, view: View) -> Iterator[Move]:
        placement, dtype = self.plan.placements[name], self.plan.dtypes[name]
        assert tuple(view.shape) == placement.shape, f"{name}: {tuple(view.shape)} != {placement.shape}"
        for part, copies in zip(placement.parts(view), placement.slots, strict=True):
            yield Move(part, dtype, [self._place(slot) for slot in copies])

    def _place(self, slot: Slot) -> Destination:
        region = self._regions[Slot(slot.rank, slot.virtual, slot.name)]
        return Destination(self._staging.scratch / self.plan.path(slot.rank), region, slot.row)

    def finish(self) -> None:
        form = self.plan.target.form
        tracker = DEEPSPEED_TRACKER if form == "deepspeed" else TRACKER
        content = str(ITERATION) if form == "megatron" else f"{RELEASE}\n"
        (self._staging.scratch / tracker).write_text(content, encoding="utf-8")
        # Megatron does not look at this, nor at what is copied: they are for the way back.
        self._staging.write_config(self.plan.spec.hf_config, self.plan.dtypes.values())
