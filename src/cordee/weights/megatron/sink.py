"""Weights into a checkpoint of Megatron.

Owns the files: their folders, what stands in them beside the weights, and the order of writing. All files are laid out
before the first tensor comes, so that each tensor is written to its final place at once and none is held back."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from cordee.errors import ProblemError
from cordee.families.registry import ModelSpec
from cordee.tensors.views import Shape, View
from cordee.weights.codec import PlannedFile
from cordee.weights.megatron.arguments import arguments, dtype_arguments
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.layout import DEEPSPEED_TRACKER, FILE, RELEASE, TRACKER, MegatronLayout, Rank, Wanted
from cordee.weights.megatron.padding import padded_rows
from cordee.weights.megatron.placement import Key, Placement, Slot, place, tensors_of
from cordee.weights.regions import Destination, Region
from cordee.weights.staged_sink import Move, Output, StagedSink
from cordee.weights.torch_file import create

Form = Literal["megatron", "release", "deepspeed"]
VERSION = 3.0  # the form of checkpoints in which q, k and v of a group stand together
ITERATION = 1


@dataclass(frozen=True, kw_only=True)
class Target:
    """A checkpoint to be written: its dialect, layout, the multiple for its vocabulary, and the form of its folders.

    form: Megatron's folders of an iteration, or of a `release`, or DeepSpeed's files in a `release` folder.
    settings: arguments to store beside those that the model and the layout imply; None stores none at all."""

    dialect: Dialect
    wanted: Wanted = field(default_factory=Wanted)
    vocab_multiple: int = 1
    form: Form = "megatron"
    settings: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class MegatronPlan:
    """Where everything goes. `dtypes` are by canonical name."""

    target: Target
    spec: ModelSpec
    layout: MegatronLayout
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
        for (rank, virtual, name), (shape, parameter) in tensors_of(self.placements).items():
            held[rank][virtual, name] = shape, self.dtypes[parameter]
        return held

    def files(self) -> list[PlannedFile]:
        return [
            PlannedFile(self.path(rank), sum(torch.Size(s).numel() * t.itemsize for s, t in tensors.values()))
            for rank, tensors in sorted(self.tensors().items())
        ]


def plan(spec: ModelSpec, dtypes: Mapping[str, torch.dtype], target: Target) -> MegatronPlan:
    """Lay a checkpoint out. ProblemError with everything about `target` that the model does not allow."""
    if target.form == "deepspeed" and target.wanted.pipeline > 1:
        option, why = "--target-pipeline-parallel-size", "DeepSpeed's files are of tensor ranks only"
        raise ProblemError.of(option, target.wanted.pipeline, why, "take 1", "at most", limit=1)
    layout = target.wanted.layout(spec.config)
    padded = padded_rows(spec.config.vocab_size, target.vocab_multiple * target.wanted.tensor)
    return MegatronPlan(target, spec, layout, padded, place(spec, layout, target.dialect, padded), dict(dtypes))


class MegatronSink(StagedSink):
    """A checkpoint in the making."""

    def __init__(self, output: Output, plan: MegatronPlan):
        self.plan = plan
        self._regions: dict[Key, Region] = {}
        super().__init__(output, plan.spec, plan.dtypes)

    def begin(self, folder: Path) -> None:
        """Make all files, without values."""
        args = self._arguments()
        for rank, tensors in self.plan.tensors().items():
            path = folder / self.plan.path(rank)
            path.parent.mkdir(parents=True, exist_ok=True)
            found = create(path, self._content(tensors, args))
            for virtual, name in tensors:
                self._regions[rank, virtual, name] = found[self._key(virtual), *self.plan.target.dialect.keys(name)]

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
        more = dtype_arguments(plan.dtypes["embedding.weight"]) | {  # as most weights have it
            "make_vocab_size_divisible_by": plan.target.vocab_multiple,
            **plan.target.settings,
        }
        return arguments(plan.spec.config, plan.layout, plan.padded_vocab, **more)

    def moves(self, name: str, view: View, dtype: torch.dtype) -> Iterator[Move]:
        placement = self.plan.placements[name]
        for part, copies in zip(placement.parts(view), placement.slots, strict=True):
            yield Move(part, dtype, [self._place(slot) for slot in copies])

    def _place(self, slot: Slot) -> Destination:
        return Destination(self._staging.scratch / self.plan.path(slot.rank), self._regions[slot.key], slot.row)

    def finish(self) -> None:
        form = self.plan.target.form
        tracker = DEEPSPEED_TRACKER if form == "deepspeed" else TRACKER
        content = str(ITERATION) if form == "megatron" else f"{RELEASE}\n"
        (self._staging.scratch / tracker).write_text(content, encoding="utf-8")
        # Megatron does not look at this, nor at what is copied: they are for the way back.
        super().finish()
