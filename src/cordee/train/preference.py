"""What objectives of preferences have in common: two sequences a sample, and a reference model.

Owns the log-probabilities of answers, what is reported of them, and where the reference model comes from. The losses
are the objectives' own."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self, TypeAlias

from cordee.checkpoint import formats
from cordee.data.messages import IGNORED
from cordee.data.tuning_dataset import Form
from cordee.errors import Findings, ProblemError, raise_all
from cordee.families.registry import spec_named
from cordee.train.initial_weights import choose
from cordee.train.objectives import POLICY, FurtherModel, Run
from cordee.train.objectives.next_token import GPTData
from cordee.train.objectives.sft import SFT
from cordee.train.options import TrainConfig
from cordee.train.preference_options import PreferenceOptions

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.data.batch import Batch
    from cordee.data.tuning_collate import PreferenceBatch
    from cordee.model.head import Head
    from cordee.parallel.execution import Frozen, LossParts, Reduce

REFERENCE = "reference"
_DROPOUTS = ("attention_dropout", "hidden_dropout")


class Answers(NamedTuple):
    """Answers, float32 `[answers]`: their log-probabilities, the same less those by the reference model, and how many
    tokens they have."""

    logps: Tensor
    gained: Tensor
    lengths: Tensor


Losses: TypeAlias = "tuple[Tensor, dict[str, Tensor]]"


class Preference(SFT):
    loss_name = "preference loss"
    reduces = True
    form: ClassVar[Form] = "pairs"
    refers: bool = False  # whether it has a reference model
    options: PreferenceOptions = PreferenceOptions()

    def with_options(self, config: TrainConfig) -> Self:
        objective = copy.copy(self)
        objective.options = config
        return objective

    def ready(self, config: TrainConfig) -> TrainConfig:
        """With --ref-model as it is when the run begins: a run that resumes loads other weights, and keeps it."""
        ready = super().ready(config)
        ready = replace(ready, **{name: 0.0 for name in _DROPOUTS if getattr(ready, name) is None})  # as the reference
        if not self.refers or ready.ref_model is not None:
            return ready
        return replace(ready, ref_model=Findings().attempt(lambda: _initial_weights(ready)))

    def models(self, run: Run) -> dict[str, FurtherModel]:
        if not self.refers:
            return {}
        if (path := run.config.ref_model or _initial_weights(run.config)) is None:
            return {REFERENCE: FurtherModel(spec=run.spec)} if run.spec else {}
        return {REFERENCE: opened("--ref-model", path, run)}

    def data(self, run: Run, found: Findings) -> GPTData | None:
        """With what tells the weights of the reference from others that may be at its path when the run resumes."""
        from cordee.weights.adapter import fingerprint

        plan, models = super().data(run, found), found.attempt(lambda: self.models(run)) or {}
        if plan is None or REFERENCE not in models or (source := models[REFERENCE].source) is None:
            return plan
        told = found.attempt(lambda: fingerprint(source))
        return replace(plan, identity=plan.identity | {REFERENCE: told}) if told else None

    def begin(self, make: Mapping[str, Callable[[], Frozen]], *start: Any) -> Mapping[str, Frozen]:
        if not (self.refers and self.options.precompute_reference):
            return super().begin(make, *start)
        from cordee.train import reference

        reference.attach(make[REFERENCE], *start)
        return {POLICY: make[POLICY]()}

    def prepare(self, batches: list[Any], models: Mapping[str, Frozen]) -> list[Any]:
        if (reference := models.get(REFERENCE)) is None:
            return batches
        pairs = zip(batches, reference.forward(batches, self.token_logps), strict=True)
        return [batch if logps is None else replace(batch, reference=logps) for batch, logps in pairs]

    def weight(self, batch: Any) -> int:
        """Number of samples, such as pairs."""
        return len(batch.samples)

    def token_logps(self, head: Head, hidden: Tensor, batch: Batch) -> Tensor:
        """The log-probability of every label, float32 `[batch, seq]`, 0 where there is none."""
        return head.token_logprobs(hidden, batch.labels)

    def answers(self, head: Head, hidden: Tensor, batch: PreferenceBatch, reduce: Reduce) -> Answers:
        """Those of all rows of a batch."""
        import torch

        logps = self.token_logps(head, hidden, batch)
        gained, labelled = logps - batch.reference, batch.labels != IGNORED
        rows = reduce(torch.stack([logps.sum(1), gained.sum(1), labelled.sum(1)]))
        return Answers(rows[0], rows[1], rows[2].clamp(min=1))  # a row may be cut down to its prompt


class PairPreference(Preference):
    """A loss of pairs."""

    def loss(self, head: Head, hidden: Tensor, batch: PreferenceBatch, reduce: Reduce) -> LossParts:
        from cordee.data.tuning_collate import paired

        both = self.answers(head, hidden, batch, reduce)
        chosen, rejected = (Answers(*side) for side in zip(*map(paired, both), strict=True))
        losses, metrics = self.losses(chosen, rejected)
        return of_pairs(losses, metrics | {"logps/chosen": chosen.logps, "logps/rejected": rejected.logps})

    @abstractmethod
    def losses(self, chosen: Answers, rejected: Answers) -> Losses:
        """The loss of each pair `[pairs]`, and so of what is reported: "rewards/chosen", "rewards/rejected", others."""


def of_pairs(losses: Tensor, metrics: dict[str, Tensor]) -> LossParts:
    """The parts of the loss of pairs, of theirs and what is reported of each, `[pairs]`, the two rewards among it."""
    better, worse = metrics["rewards/chosen"], metrics["rewards/rejected"]
    metrics = metrics | {"rewards/margins": better - worse, "rewards/accuracies": (better > worse).float()}
    return losses.sum(), {name: values.detach().sum() for name, values in metrics.items()}


def row_scores(head: Head, hidden: Tensor, batch: Any) -> Tensor:
    """The score of every row, float32 `[batch]`: the value of its last token, as transformers' classifiers have it.

    Of a part of the tokens it is 0 where that token is in another: what context-parallel ranks return adds up."""
    return head.scores(hidden).masked_fill(~batch.last, 0.0).sum(1)


def opened(flag: str, path: str, run: Run, *, scores: bool = False) -> FurtherModel:
    """The model at `path`, which an option names; if it `scores`, a reward model. ProblemError if it is none, cannot be
    read, or has other tokens."""
    from cordee.weights.megatron.source import Reading

    found, config = Findings(), run.config
    reading = Reading(spec=spec_named(config.model) if config.model else None)
    source = found.attempt(lambda: formats.read(path, reading))
    raise_all(replace(problem, option=flag, value=path) for problem in found.problems)
    assert source is not None, "its problems are raised"
    if scores and not source.spec.config.score:
        why, fix = "it has no value head", "give a reward model, such as --stage rm trains"
        raise ProblemError.of(flag, path, why, fix, "reward model")
    heads = {"score": True, "lm_head": False}
    spec = source.spec.with_heads(**heads) if scores else source.spec.without_values(flag, [])
    rows = spec.config.vocab_size
    if run.vocab_size is not None and rows != run.vocab_size:
        why = f"it has {rows} tokens, the model that is trained has {run.vocab_size}"
        raise ProblemError.of(flag, path, why, "give a model of the same tokenizer", "model")
    same = run.spec is not None and spec.shapes() == run.spec.with_heads(score=False, lm_head=True).shapes()
    if same:  # options that change the model change both
        spec = spec.with_options(replace(config, vocab_size=None, make_vocab_size_divisible_by=None))
    return FurtherModel(spec=spec, source=source)


def _initial_weights(config: TrainConfig) -> str | None:
    """The weights that a run began with, None: drawn by its seed. ProblemError if they are in two places."""
    initial = choose(config, None, [])
    if (checkpoint := initial.checkpoint) is not None:
        return checkpoint.manifest["config"].get("ref_model") if checkpoint.resume else str(checkpoint.path.resolve())
    if initial.peft is not None:
        why = "the initial weights are a model with adapters beside it, and the reference is one model"
        fix = "merge the two by `cordee convert --lora-load`, and give the result"
        raise ProblemError.of("--ref-model", None, why, fix, "missing", ("lora_load",))
    if initial.weights is not None and config.ckpt_step is not None:
        why = "the reference is read again where the run resumes, and then from the newest iteration"
        fix = "convert this one, and give the result as --load, or as --ref-model"
        raise ProblemError.of("--ckpt-step", config.ckpt_step, why, fix, "excludes", ("stage",))
    return None if initial.weights is None else str(initial.weights.resolve())
