"""What a run is, once it is planned: where it begins, what is trained, on what, over which ranks; and where it is.

Owns these records. How they are worked out is `plan.py`'s, `initial_weights.py`'s and the objective's."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee.checkpoint.storage import Location
from cordee.errors import Findings, raise_all, unique
from cordee.families.registry import ModelSpec
from cordee.optim.schedule import Schedule
from cordee.parallel.degrees import Degrees
from cordee.parallel.pipeline.split import StagePartition
from cordee.tokenizer import Tokenizer
from cordee.train.batch_schedule import BatchSchedule
from cordee.train.objectives import DataPlan, FurtherModel, Objective
from cordee.train.options import TrainConfig

if TYPE_CHECKING:
    from cordee.weights.codec import Source


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint to load and its manifest. `resume`: the run resumes from it, instead of taking the weights only."""

    path: Location
    manifest: dict[str, Any]
    resume: bool


@dataclass(frozen=True)
class InitialWeights:
    """Where weights come from: a checkpoint, a model in another format, or neither, and then they are drawn. Adapters
    are over the base in `weights`, and come from a checkpoint of theirs, or PEFT's directory `peft`, or are drawn.

    source: those of `weights`, when they are opened; None if they cannot be read.
    base: what a checkpoint keeps of the base of adapters: its path and fingerprint.
    spec: the model in `weights`, as far as it is known.
    assets: directory where the tokenizer may be that belongs to them."""

    checkpoint: Checkpoint | None = None
    weights: Location | None = None
    source: "Source | None" = None
    spec: ModelSpec | None = None
    assets: Path | None = None
    peft: Path | None = None
    base: dict[str, str] | None = None


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A run that nothing is known to be wrong with.

    `iterations` is the length of the whole run in steps, `data` its objective's, `models` are the objective's further
    ones, `partition` says which layers each pipeline stage holds, `notes` what a person should know before it starts.
    """

    config: TrainConfig
    initial: InitialWeights
    spec: ModelSpec
    tokenizer: Tokenizer | None
    degrees: Degrees
    partition: StagePartition | None
    batches: BatchSchedule
    iterations: int
    schedule: Schedule
    objective: Objective[Any]
    data: DataPlan
    models: Mapping[str, FurtherModel]
    notes: tuple[str, ...]

    @property
    def resumed(self) -> Checkpoint | None:
        """The checkpoint that the run resumes from."""
        checkpoint = self.initial.checkpoint
        return checkpoint if checkpoint is not None and checkpoint.resume else None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A run as far as it is known, with all that is `found` wrong with it: None stands for what that leaves unknown.
    The rest is as in the plan that it becomes where nothing is wrong."""

    config: TrainConfig
    initial: InitialWeights | None
    spec: ModelSpec | None
    tokenizer: Tokenizer | None
    degrees: Degrees
    partition: StagePartition | None
    batches: BatchSchedule
    iterations: int | None
    schedule: Schedule
    objective: Objective[Any]
    data: DataPlan | None
    models: Mapping[str, FurtherModel] | None
    found: Findings

    def complete(self) -> RunPlan:
        """ProblemError with all that is wrong."""
        raise_all(unique(self.found.problems))
        assert self.initial is not None and self.spec is not None and self.data is not None and self.models is not None
        known: dict[str, Any] = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "found"}
        known["iterations"] = self.iterations or 0
        return RunPlan(**known, notes=tuple(self.found.notes))


@dataclass(kw_only=True)
class TrainState:
    """Where a run is: totals since it began, of which all else that changes (rates, batch sizes, random numbers, the
    position in the data) is a function; the best validation; and the W&B run that rank 0 reports to, by its id.

    `consumed_samples` is the position in the data. Steps skipped for an overflow consume samples as well, but do not
    move the schedule. `best_loss` and `best_iteration` are of the best validation so far, None before one;
    `stale_validations` counts those since the last improvement; `validation_due`: this iteration lacks its own."""

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    skipped_samples: int = 0
    best_loss: float | None = None
    best_iteration: int | None = None
    stale_validations: int = 0
    validation_due: bool = False
    wandb_run: str | None = None

    @property
    def schedule_position(self) -> int:
        """Samples of the steps that changed the parameters."""
        return self.consumed_samples - self.skipped_samples

    def advance(self, samples: int, tokens: int, *, skipped: bool) -> None:
        """Count a step."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        if skipped:
            self.skipped_iterations += 1
            self.skipped_samples += samples

    def validated(self, loss: float, threshold: float) -> bool:
        """Count a validation of this iteration; whether it is the best so far. It is an improvement if it is better by
        more than `threshold`; a loss that is not finite is neither."""
        gain = -math.inf if not math.isfinite(loss) else math.inf if self.best_loss is None else self.best_loss - loss
        self.validation_due = False
        self.stale_validations = 0 if gain > threshold else self.stale_validations + 1
        if gain > 0:
            self.best_loss, self.best_iteration = loss, self.iteration
        return gain > 0
