"""What is trained: one file an objective, found by scanning this package.

Owns what an objective is, and knows none. It is the only difference between pretraining, instruction tuning and
preference training: its data and how samples become a batch, what a batch weighs, further models, and the loss. It sees
micro-batches and no ranks; the trainer divides its loss by the weight of the whole step."""

from __future__ import annotations

import functools
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

from cordee.config.option import option

if TYPE_CHECKING:  # nothing else: the options of a run, which its help reads, have those of objectives among them
    from torch import Tensor

    from cordee.data.batch import Batch
    from cordee.data.gpt_dataset import Dataset
    from cordee.data.loader import Collate
    from cordee.errors import Findings
    from cordee.families.registry import ModelSpec
    from cordee.model.head import Head
    from cordee.parallel.execution import Frozen, LossParts, Reduce
    from cordee.parallel.layout import Layout
    from cordee.sealed import Form
    from cordee.tokenizer import Tokenizer
    from cordee.train.batch_schedule import BatchSchedule
    from cordee.train.options import TrainConfig
    from cordee.train.run_plan import RunPlan
    from cordee.weights.codec import Source

B = TypeVar("B", bound="Batch")
POLICY = "policy"
LIKELIHOOD = "lm loss"  # Megatron's name of a mean negative log-likelihood of tokens


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Objective."""

    stage: str = option(
        "pretrain",
        "training objective: pretrain (next token of texts), sft (answers of dialogues), dpo, orpo or simpo (pairs of "
        "a chosen and a rejected answer), kto (answers that are desirable or not), rm (a reward model, of pairs), grpo "
        "or ppo (rewards of what the model writes)",
        shorthands={"--is-instruction-dataset": "sft"},
    )


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run when its data and its further models are planned.

    `spec` and `tokenizer` are None where there is none or something is wrong with it. `fingerprint` is what
    `Objective.fingerprint` returned on this machine, None for a plan that is not trained."""

    config: TrainConfig
    batches: BatchSchedule
    iterations: int
    spec: ModelSpec | None
    tokenizer: Tokenizer | None
    fingerprint: Any = None

    @property
    def vocab_size(self) -> int | None:
        return self.spec.config.vocab_size if self.spec else None


@dataclass(frozen=True, kw_only=True)
class DataSize:
    """What there is to train on: of each dataset, by its name, the tokens, the samples that have all of them once, and
    its share of the samples of a run; and the samples of an epoch of all."""

    tokens: Mapping[str, int]
    samples: Mapping[str, float]
    shares: Mapping[str, float]
    epoch: float

    def epochs(self, name: str, samples: int) -> float:
        """How often a run of `samples` passes over a dataset."""
        return samples * self.shares[name] / self.samples[name]


class DataPlan(Protocol):
    """The data of a run that nothing is known to be wrong with."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides which sample comes when, as JSON holds it: two runs with equal identities see the same ones."""
        ...

    def resumed(self, then: Mapping[str, Any], found: Findings) -> DataPlan:
        """This plan as it continues a run whose identity was `then`; what keeps it from that is added to `found`."""
        ...

    def open(self, *, verified: bool) -> Mapping[str, Dataset]:
        """Those of "train", "validation" and "test" that the run has samples of, and "validation-NAME" for what is
        validated on its own besides. `verified`: another process of this machine has just opened them. ProblemError if
        they cannot be read."""
        ...

    def collate(self) -> Collate:
        """What makes a batch of samples."""
        ...


@dataclass(frozen=True, kw_only=True)
class FurtherModel:
    """A model beside the one that is trained, which stays as it is. Its weights come from `source`; without one they
    are initialised, by the seed of the run."""

    spec: ModelSpec
    source: Source | None = None


class Objective(ABC, Generic[B]):
    """`stage` is its value of --stage, `loss_name` what log lines call its loss.

    Options that are its own are a dataclass declared beside it, of which the configuration of a run is one too.

    reduces: its loss is not a sum over tokens: it asks for sums over whole sequences, by `reduce`."""

    stage: ClassVar[str]
    loss_name: ClassVar[str]
    reduces: bool = False

    def with_options(self, config: TrainConfig) -> Self:
        """This objective with the options of a run."""
        return self

    def ready(self, config: TrainConfig) -> TrainConfig:
        """`config` with its data in the form that training reads, made now if it is not there: before processes join,
        for it may take long. ProblemError if it cannot be made."""
        return config

    def model(self, spec: ModelSpec, notes: list[str]) -> ModelSpec:
        """The model to train, by its heads, of what is loaded or described. ProblemError if it cannot be made."""
        return spec.without_values("--load", notes)

    def fingerprint(self, config: TrainConfig) -> Any:
        """What tells changed bytes of the data, read by one process of a machine; ProblemError if they cannot be read.
        Anything that can be pickled."""
        return None

    @abstractmethod
    def identity_form(self) -> Form:
        """What the identity of its data is like in a checkpoint."""

    @abstractmethod
    def data(self, run: Run, found: Findings) -> DataPlan | None:
        """The data of `run`, with what is wrong with it and worth a note added to `found`; needs no torch."""

    def size(self, config: TrainConfig) -> DataSize | None:
        """What there is to train on, None if that is not known before; ProblemError if it cannot be read."""
        return None

    def models(self, run: Run) -> Mapping[str, FurtherModel]:
        """Further models, such as the reference of a preference objective, by name; ProblemError if there is none."""
        return {}

    def begin(
        self, make: Mapping[str, Callable[[], Frozen]], plan: RunPlan, datasets: Mapping[str, Dataset], layout: Layout
    ) -> Mapping[str, Frozen]:
        """The models that `prepare` is given, made before the first step: its further ones and, as `POLICY`, the
        trained one as it is at the time. `datasets` are those that are open."""
        return {name: each() for name, each in make.items()}

    def evaluated(self, config: TrainConfig) -> str | None:
        """What of the run's data `cordee evaluate` takes as --task-data-path, held out if there is such; None without
        any."""
        return None

    def collect(self, batches: list[B], models: Mapping[str, Frozen], iteration: int | None) -> list[B]:
        """The micro-batches that are trained on in the step `iteration`, None: validated on, made of `batches`, whole
        sequences of as many samples: such as what the model that is trained now writes to prompts. All ranks call it
        alike; ProblemError, on all ranks, if it cannot."""
        return batches

    def prepare(self, batches: list[B], models: Mapping[str, Frozen]) -> list[B]:
        """`batches`, this rank's parts of the micro-batches of a step, with what `models` say of them in their fields.
        Called before they are trained on or evaluated."""
        return batches

    @abstractmethod
    def weight(self, batch: B) -> float:
        """How much a micro-batch counts. Of a part of its tokens: that part, unless the objective `reduces`."""

    @abstractmethod
    def loss(self, head: Head, hidden: Tensor, batch: B, reduce: Reduce) -> LossParts:
        """The loss of a micro-batch, summed over what counts, scalar; further such sums by name, which are logged
        divided by the weight.

        `hidden` `[batch, seq, embed]` are the model's last hidden states, after the final norm. Where ranks share the
        tokens of a sequence, each is given its part, and what they return is added up. An objective that `reduces` gets
        by `reduce(x)`, which is differentiable, the sum of all their x of the same shape (in one process x itself), and
        returns the loss of whole sequences: all of them the same, which counts once."""


@functools.cache
def registry() -> dict[str, Objective[Any]]:
    """Every objective by its stage."""
    modules = (import_module(module.name) for module in pkgutil.iter_modules(__path__, f"{__name__}."))
    return {module.OBJECTIVE.stage: module.OBJECTIVE for module in modules}


def named(stage: str) -> Objective[Any]:
    """The objective of a value of --stage; for a value that none has, that of the default, so that what else is wrong
    with a run is found too."""
    return registry().get(stage) or registry()[ObjectiveOptions.stage]
