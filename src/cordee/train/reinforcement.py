"""What objectives of reinforcement learning have in common: a policy learns from rewards of what it writes itself.

Owns the steps from prompts to a batch with rewards, and the clipped loss of a policy (Schulman et al. 2017). Advantages
are the objectives' own; writing and rewards are `rollout.py`'s and `rewards.py`'s."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from cordee import sealed
from cordee.checkpoint.storage import local_path
from cordee.config.option import to_flag
from cordee.data.build import plan_parts
from cordee.data.indexed import IndexedDataset
from cordee.data.messages import IGNORED
from cordee.data.tuning import prompt_length
from cordee.data.tuning_dataset import Form, PromptDataset, TuningDataset, ids_of, sibling
from cordee.errors import Findings, Problem, Problems
from cordee.files import unwritable
from cordee.log import counted
from cordee.train import rewards
from cordee.train.objectives import POLICY, DataSize, FurtherModel, Run
from cordee.train.objectives.next_token import GPTData
from cordee.train.objectives.sft import TuningData
from cordee.train.options import TrainConfig
from cordee.train.preference import Preference, opened
from cordee.train.rollout_options import RolloutOptions

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.data.gpt_dataset import Dataset
    from cordee.data.loader import Collate
    from cordee.data.tuning_collate import RolloutBatch
    from cordee.model.head import Head
    from cordee.parallel.execution import Frozen, LossParts, Reduce
    from cordee.parallel.layout import Layout
    from cordee.train.rollout import Rollout
    from cordee.train.run_plan import RunPlan

REWARD_MODEL = "reward model"
LOOKED_AT = 256  # samples of a dataset that tell what all are
_SIZE = "global_batch_size"
_FACTS = ("num_generations", "updates_per_rollout", _SIZE)


@dataclass(frozen=True)
class Repeated:
    """The prompts of `dataset` as samples of rollouts: each comes `group` times in a row, and each step of `size`
    samples `updates` times."""

    dataset: Dataset
    group: int
    size: int
    updates: int

    def __len__(self) -> int:
        return len(self.dataset)  # as many as are asked for, of which prompts are fewer

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        step, place = divmod(index, self.size)
        return self.dataset[(step // self.updates * self.size + place) // self.group]


@dataclass(frozen=True, kw_only=True)
class PromptData(TuningData):
    """The prompts of a run, and the answers that the data has to them, whole."""

    sequences: ClassVar[type[TuningDataset] | None] = PromptDataset

    def resumed(self, then: Mapping[str, Any], found: Findings) -> GPTData:
        for name in _FACTS:
            before, now = then["rollouts"][name], self.identity["rollouts"][name]
            if before != now and (name != _SIZE or self.config.updates_per_rollout > 1):
                why = f"the run had {before}, so its place in the data would mean other prompts"
                fix = f"give {before}, or start anew from the weights: --finetune"
                found.problems.append(Problem(to_flag(name), now, why, fix))
        return super().resumed(then, found)

    def open(self, *, verified: bool) -> dict[str, Dataset]:
        facts = self.identity["rollouts"]
        group, size = facts["num_generations"], facts["global_batch_size"]
        return {
            name: Repeated(dataset, group, size, facts["updates_per_rollout"] if name == "train" else 1)
            for name, dataset in super().open(verified=verified).items()
        }

    def collate(self) -> Collate:
        return self.rows(1)

    def rolled(self) -> Collate:
        """What makes a batch of rollouts."""
        return super().collate()


@dataclass
class Kept:
    """The rollouts of a block of steps, and, after the first one, what `prepare` has made of them."""

    block: int
    batches: list[RolloutBatch]
    prepared: list[RolloutBatch] | None = None


class Reinforcement(Preference):
    """`defaults`: of options that are not given.

    Its weight is the number of rollouts. The loss of a validation is the mean reward, less than nothing."""

    loss_name = "policy loss"
    plan: ClassVar[type[GPTData]] = PromptData
    form: ClassVar[Form] = "dialogues"
    cuts: ClassVar[bool] = False
    defaults: ClassVar[Mapping[str, Any]]
    in_loss: ClassVar[bool] = True  # whether the divergence from the reference is part of the loss
    learning: RolloutOptions = RolloutOptions()
    kl: float = 0.0  # weight of the divergence from the reference

    def with_options(self, config: TrainConfig) -> Self:
        objective = super().with_options(config)
        objective.learning, objective.kl = config, config.kl_coefficient or 0.0
        objective.refers = objective.kl > 0
        return objective

    def ready(self, config: TrainConfig) -> TrainConfig:
        given = {name: value for name, value in self.defaults.items() if getattr(config, name) is None}
        config = replace(config, **given)
        return super(Reinforcement, self.with_options(config)).ready(config)

    def identity_form(self) -> sealed.Form:
        data, facts = super().identity_form(), sealed.record(dict.fromkeys(_FACTS, sealed.count(1)))
        rollouts = sealed.record({"rollouts": facts})
        return lambda value: data(value) or rollouts(value)

    def data(self, run: Run, found: Findings) -> GPTData | None:
        found.problems += _problems(run)
        for name in run.config.reward_function:
            found.attempt(lambda name=name: rewards.load(name))
        if run.config.ref_model is not None and not self.refers:
            found.notes.append("ignored: --ref-model (--kl-coefficient is 0)")
        if rewards.directory(run.config) is None:
            found.notes.append("rollouts are not kept: give --rollout-dir, or --save on this machine")
        if (plan := super().data(run, found)) is None:
            return None
        for prefix in dict.fromkeys(plan_parts(run.config)["train"].blend.prefixes):
            masks = IndexedDataset(sibling(prefix, "attention_mask"))
            if any((masks.get(row) > 1).any() for row in range(min(len(masks), LOOKED_AT))):
                why, fix = "its rows are of several samples, and a prompt is of one", "preprocess without --neat-pack"
                found.problems.append(Problem("dataset", prefix, why, fix, "packed"))
        facts = {name: getattr(run.config, name) for name in _FACTS} | {_SIZE: run.batches.global_batch_size}
        return replace(plan, identity={**plan.identity, "rollouts": facts})

    def notes(self, config: TrainConfig) -> Iterator[str]:
        """Prompts that are cut."""
        room = config.seq_length - config.max_completion_length
        for prefix in dict.fromkeys(plan_parts(config)["train"].blend.prefixes):
            (ids,) = ids_of(prefix)
            labels = IndexedDataset(sibling(prefix, "labels"))
            long = np.flatnonzero(ids.sequence_lengths > room).tolist()
            if cut := sum(prompt_length(labels.get(sequence)) > room for sequence in long):
                samples = f"of the {counted(len(ids), 'sample')} of {prefix}"
                yield f"prompts cut to their last {room:,} tokens: {cut:,} {samples}"

    def size(self, config: TrainConfig) -> DataSize | None:
        if (found := super().size(config)) is None:
            return None
        assert config.num_generations is not None, "ready"
        times = config.num_generations * config.updates_per_rollout
        return replace(found, samples={name: count * times for name, count in found.samples.items()})

    def models(self, run: Run) -> dict[str, FurtherModel]:
        found, path = super().models(run), run.config.reward_model
        return found if path is None else found | {REWARD_MODEL: opened("--reward-model", path, run, scores=True)}

    def begin(
        self, make: Mapping[str, Callable[[], Frozen]], plan: RunPlan, datasets: Mapping[str, Dataset], layout: Layout
    ) -> Mapping[str, Frozen]:
        from cordee.train.rollout import Rollouts

        models = {name: each() for name, each in make.items()}
        own = [each.dataset for each in datasets.values() if isinstance(each, Repeated)]
        assert isinstance(plan.data, PromptData)
        self._rollouts, self._data = Rollouts(plan, models[POLICY], own, layout), plan.data
        self._kept: Kept | None = None
        return models

    def collect(self, batches: list[Any], models: Mapping[str, Frozen], iteration: int | None) -> list[Any]:
        """Rollouts of the prompts, those of the step before where several are taken on them."""
        from cordee.train import rollout

        self._block = None if iteration is None else (iteration - 1) // self.learning.updates_per_rollout
        if iteration and self._kept is not None and self._kept.block == self._block:
            return self._kept.batches
        self._kept = None if iteration else self._kept
        found, options = self._rollouts.written(batches, iteration), self.learning
        made = [self._batch([found[number] for number in batch.samples.tolist()]) for batch in batches]
        names = [*options.reward_function]
        if (model := models.get(REWARD_MODEL)) is not None:
            names.append(REWARD_MODEL)
            found = self._rollouts.judged(found, made, model)
        totals = rollout.totals(found, options.reward_weights)
        if iteration is not None:
            self._rollouts.keep(iteration, found, names)
        made = self._rewarded(made, found, totals)
        if iteration is not None:
            self._kept = Kept(self._block or 0, made)
        return made

    def _batch(self, rollouts: Sequence[Rollout]) -> RolloutBatch:
        """Their batch, without rewards."""
        import torch

        from cordee.data.tuning_collate import RolloutBatch, last_tokens

        samples = []
        for each in rollouts:
            ids, prompt = np.array([*each.prompt, *each.tokens]), len(each.prompt)
            labels = np.where(np.arange(len(ids)) < prompt, IGNORED, ids)
            if self.learning.mask_truncated_completions and self._block is not None and not each.ended:
                labels[:] = IGNORED
            samples.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels})
        batch = self._data.rolled()(samples)
        lengths = torch.tensor([float(len(each.tokens)) for each in rollouts])
        zeros, numbers = torch.zeros(batch.input_ids.shape), torch.tensor([each.sample for each in rollouts])
        return RolloutBatch(
            **vars(replace(batch, samples=numbers)),
            reference=zeros,
            last=last_tokens(batch.labels, batch.counted),
            advantages=zeros,
            rewards=lengths[:, None],
            share=1 / lengths,
            lengths=lengths,
            truncated=torch.tensor([float(not each.ended) for each in rollouts]),
        )

    def _rewarded(
        self, batches: list[RolloutBatch], found: Mapping[int, Rollout], totals: Mapping[int, float]
    ) -> list[Any]:
        """`batches` with the rewards, and what follows from them: of a validation, rewards stand for advantages."""
        import torch

        validates, made = self._block is None, []
        gained = totals if validates else self.credited(totals)
        masked = self.learning.mask_truncated_completions and not validates
        trained = sum(len(each.tokens) for each in found.values() if each.ended or not masked)
        by_token = self.learning.loss_level == "token" and not validates
        for batch in batches:
            assert batch.samples is not None
            numbers = batch.samples.tolist()
            own = torch.tensor([gained[number] for number in numbers], dtype=torch.float32)
            share = torch.full_like(batch.share, len(found) / max(trained, 1)) if by_token else batch.share
            scores = torch.tensor([[totals[number], *found[number].scores] for number in numbers], dtype=torch.float32)
            advantages = own[:, None] * (batch.labels != IGNORED)
            made.append(replace(batch, advantages=advantages, share=share, rewards=scores))
        return made

    @abstractmethod
    def credited(self, totals: Mapping[int, float]) -> Mapping[int, float]:
        """By how much each rollout is better than others, of its total reward."""

    def prepare(self, batches: list[Any], models: Mapping[str, Frozen]) -> list[Any]:
        if self._block is None:
            return batches
        assert self._kept is not None, "rollouts are collected before"
        if self._kept.prepared is None:
            self._kept.prepared = self.remembered(super().prepare(batches, models), models[POLICY])
        return self._kept.prepared

    def remembered(self, batches: list[Any], policy: Frozen) -> list[Any]:
        """`batches` with what the policy that wrote them says of them, where that is not what it says now."""
        if self.learning.updates_per_rollout == 1:
            return batches
        seen = zip(batches, policy.forward(batches, self.token_logps), strict=True)
        return [batch if old is None else replace(batch, old=old) for batch, old in seen]

    def token_logps(self, head: Head, hidden: Tensor, batch: Any) -> Tensor:
        """Those of a policy at the temperature of rollouts."""
        return super().token_logps(head, hidden / self.learning.rollout_temperature, batch)

    def loss(self, head: Head, hidden: Tensor, batch: RolloutBatch, reduce: Reduce) -> LossParts:
        import torch

        options, logps = self.learning, self.token_logps(head, hidden, batch)
        mask = batch.labels != IGNORED
        ratio = (logps - (logps.detach() if batch.old is None else batch.old)).exp()
        high = options.clip_range if options.clip_range_high is None else options.clip_range_high
        clipped = ratio.clamp(1 - options.clip_range, 1 + high)
        losses = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
        kept = {"clipped": (ratio * batch.advantages > clipped * batch.advantages).float()}
        if self.refers and self._block is not None:
            gap = batch.reference - logps
            kept["kl"] = gap.exp() - gap - 1  # of Schulman's estimators the third: never below 0, without bias
            losses = losses + self.kl * self.in_loss * kept["kl"]
        further, values = self.further(head, hidden, batch)
        losses, kept = losses + further, {name: value.detach() for name, value in {**kept, **values}.items()}
        rows = reduce(torch.stack([each.masked_fill(~mask, 0).sum(1) for each in (losses, *kept.values())]))
        metrics = {name: row.detach() * batch.share for name, row in zip(kept, rows[1:], strict=True)}
        metrics |= {"length": batch.lengths, "truncated": batch.truncated}
        short = [name.rpartition(":")[2] for name in options.reward_function]
        full = short if len({*short}) == len(short) else options.reward_function
        names = ("reward", *(f"reward/{name}" for name in full), f"reward/{REWARD_MODEL}")
        metrics |= dict(zip(names, batch.rewards.T, strict=False))
        return (rows[0] * batch.share).sum(), {name: value.sum() for name, value in metrics.items()}

    def further(self, head: Head, hidden: Tensor, batch: RolloutBatch) -> tuple[Tensor | float, dict[str, Tensor]]:
        """More of the loss of each token, and what is reported of it."""
        return 0.0, {}


def _problems(run: Run) -> Problems:
    config, group = run.config, run.config.num_generations or 1
    if not config.reward_function and config.reward_model is None:
        why, fix = "nothing says how good what the policy writes is", "give it, or --reward-model"
        yield Problem("--reward-function", None, why, fix, "missing", ("reward_model",))
    count = len(config.reward_function) + (config.reward_model is not None)
    if config.reward_weights is not None and len(config.reward_weights) != count:
        why = f"there are {counted(count, 'reward')}: those of the functions, then that of the model"
        yield Problem("--reward-weights", config.reward_weights, why, f"give {count} numbers", "length", limit=count)
    if group == 1 and config.stage == "grpo":
        why, fix = "a rollout is held against others to its prompt, and there are none", "give 2 or more"
        yield Problem("--num-generations", group, why, fix, "at least", ("stage",), 2)
    for size in sorted({size for size in run.batches.batch_sizes() if size % group}):
        why = f"a step of {counted(size, 'rollout')} has not {group} of every prompt"
        fix = f"give a multiple of {group}, or another --num-generations"
        yield Problem("--global-batch-size", size, why, fix, "divides", ("num_generations",), group)
    if (most := config.max_completion_length) >= config.seq_length:
        why, fix = f"it leaves no token of --seq-length {config.seq_length} for prompts", "give less"
        yield Problem("--max-completion-length", most, why, fix, "at most", ("seq_length",), config.seq_length - 1)
    if config.train_on == "all":
        why = "a prompt is what comes before the last run of trained tokens, which would be all"
        yield Problem("--train-on", "all", why, "leave it out", "excludes", ("stage",))
    if (folder := config.rollout_dir) is not None:
        if local_path(folder) is None:
            why, fix = "it is in a store, and files are made on this machine", "give a directory"
            yield Problem("--rollout-dir", folder, why, fix, "store")
        else:
            yield from unwritable("--rollout-dir", folder, Path(folder))
    if config.dataloader_type != "single":
        why = "rollouts of a prompt follow each other, which only the order of the dataset keeps together"
        yield Problem("--dataloader-type", config.dataloader_type, why, "leave it out", "excludes", ("stage",))
    if run.tokenizer is None:
        why = "rollouts are read as text, and no tokenizer is given"
        yield Problem("--tokenizer-name-or-path", None, why, "give that of the model", "missing")
    if config.rollout_temperature != 1 and run.spec is not None and run.spec.config.logit_softcap is not None:
        why, fix = "the logits of the model have a softcap, so they are not divided by it", "leave it out"
        yield Problem("--rollout-temperature", config.rollout_temperature, why, fix, "model")
