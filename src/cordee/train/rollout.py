"""What the policy of a run writes to its prompts, and the rewards for it.

Owns the model that writes, filled with the weights of the moment, which rank writes what, and the file of each step's
rollouts. Knows no loss. Rewards by functions are `rewards.py`'s; models of rewards are run by who has them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cordee.data.batch import Batch
from cordee.data.messages import IGNORED
from cordee.data.tuning import prompt_length
from cordee.errors import ProblemError
from cordee.files import write_durably
from cordee.generate.engine import stream
from cordee.generate.loading import stop_ids
from cordee.generate.options import DecodingOptions
from cordee.generate.text import continuation
from cordee.log import progress_bar
from cordee.model.gpt import GPTModel
from cordee.parallel import collectives, context, data, inference
from cordee.parallel.degrees import Degrees
from cordee.parallel.execution import Frozen
from cordee.parallel.inference import InferenceStage
from cordee.parallel.layout import Layout
from cordee.parallel.live import LiveSource, refill
from cordee.tokenizer import Tokenizer
from cordee.train import rewards
from cordee.train.options import TrainConfig
from cordee.train.preference import row_scores
from cordee.train.reinforcement import LOOKED_AT
from cordee.train.run_plan import RunPlan
from cordee.weights.load import materialise


@dataclass(frozen=True)
class Rollout:
    """A completion of a prompt, as token ids, and the answer that the data has; its number over the run, and by each
    function its reward. `ended`: by itself."""

    sample: int
    prompt: list[int]
    tokens: list[int]
    answer: list[int]
    ended: bool
    scores: list[float]


class Rollouts:
    """Writes completions with the weights that `policy` has at the time. All ranks call its methods alike.

    `datasets`: a token that ends all their answers ends a completion, as those of the model and the tokenizer do."""

    def __init__(self, plan: RunPlan, policy: Frozen, datasets: Sequence[Any], layout: Layout):
        assert plan.tokenizer is not None, "checked before"
        self._config: TrainConfig = plan.config
        self._tokenizer, self._layout, self._policy = plan.tokenizer, layout, policy
        self._functions = {name: rewards.load(name) for name in plan.config.reward_function}
        ends = stop_ids(plan.spec, plan.initial.assets, plan.tokenizer)
        self._ends = ends | {end for dataset in datasets if (end := _end_of(dataset, plan.tokenizer)) is not None}
        self._model, self._stage = self._writer(plan)
        self._source = None
        if self._model is not policy.model:
            self._source = LiveSource(policy.model, plan.spec, layout, next(self._model.parameters()).dtype)

    def _writer(self, plan: RunPlan) -> tuple[GPTModel, InferenceStage | None]:
        """The model itself where it is whole in this process; else another, over the tensor and pipeline ranks."""
        degrees, config = self._layout.degrees, plan.spec.config
        if self._layout.mesh is None:
            return self._policy.model, None
        on = next(each.device for each in self._policy.model.parameters() if not each.is_meta)
        dtype = data.compute_dtype(plan.config)
        if degrees.tp * degrees.pp == 1:
            model = GPTModel(config, device="meta", dtype=dtype)
            materialise(model, device=on)
            return model, None
        shape = Degrees(pp=degrees.pp, replicate=degrees.token_ranks, tp=degrees.tp)
        timeout = timedelta(minutes=plan.config.distributed_timeout_minutes)
        return inference.build(config, Layout(shape, on.type, timeout), dtype, on)

    def written(self, batches: Sequence[Batch], iteration: int | None) -> dict[int, Rollout]:
        """Completions of all samples of a step, on whatever rank, by their numbers."""
        layout = self._layout
        if self._source is not None:
            refill(self._model, self._source)
        room = self._config.seq_length - self._config.max_completion_length
        asked = [each for batch in batches for each in _prompts(batch, room)]
        mine = asked[layout.axis_rank("cp") :: layout.degrees.cp]
        scored = collectives.together(lambda: self._scored(self._complete(mine, iteration)), layout.control)
        return {each.sample: each for part in collectives.gather(scored, layout) for each in part}

    def _complete(self, asked: Sequence[Rollout], iteration: int | None) -> list[Rollout]:
        config = self._config
        options = DecodingOptions(
            max_new_tokens=config.max_completion_length,
            do_sample=True,
            temperature=config.rollout_temperature,
            top_k=config.rollout_top_k,
            top_p=config.rollout_top_p,
            batch_size=config.rollout_batch_size,
            seed=config.seed,
        )
        prompts, names, done = [each.prompt for each in asked], [each.sample for each in asked], 0
        kind = {"stop_ids": self._ends, "vocab_size": self._tokenizer.vocab_size, "stage": self._stage, "names": names}
        text = f"rollouts of step {iteration}" if iteration else "rollouts of the validation"
        with progress_bar(text, len(asked), shown=self._layout.rank == 0) as progress:
            for token in stream(self._model, prompts, options, **kind):
                asked[token.sample].tokens.append(token.id)
                done += token.last
                progress(done)
        return [replace(each, ended=each.tokens[-1] in self._ends) for each in asked]

    def _scored(self, made: Sequence[Rollout]) -> list[Rollout]:
        """With rewards; nothing on all but one of the ranks that have made the same."""
        if self._layout.axis_rank("tp") or self._layout.axis_rank("pp"):
            return []
        texts = {
            "prompts": [self._tokenizer.decode(each.prompt, skip_special_tokens=True) for each in made],
            "completions": [self.text(each, each.tokens) for each in made],
            "answers": [self.text(each, each.answer) for each in made],
        }
        found = [rewards.called(name, function, texts) for name, function in self._functions.items() if made]
        return [replace(each, scores=list(scores)) for each, *scores in zip(made, *found, strict=True)]

    def judged(self, found: Mapping[int, Rollout], batches: Sequence[Any], model: Frozen) -> dict[int, Rollout]:
        """`found` with the scores by a reward model of `batches`, in which this rank's are."""
        parts = [context.shard(batch, self._layout, self._config) for batch in batches]
        own: dict[int, float] = {}
        for batch, rows in zip(batches, model.forward(parts, row_scores), strict=True):
            if rows is not None and self._layout.axis_rank("tp") == 0:
                own |= zip(batch.samples.tolist(), rows.tolist(), strict=True)
        scores = dict.fromkeys(found, 0.0)
        for part in collectives.gather(own, self._layout):  # of context-parallel ranks one has the score, others 0
            scores |= {number: scores[number] + score for number, score in part.items()}
        return {number: replace(each, scores=[*each.scores, scores[number]]) for number, each in found.items()}

    def text(self, rollout: Rollout, tokens: Sequence[int]) -> str:
        """What `tokens` read as behind a prompt."""
        return continuation(self._tokenizer, rollout.prompt, tokens, self._ends)

    def keep(self, iteration: int, found: Mapping[int, Rollout], names: Sequence[str]) -> None:
        """Write the file of a step, on rank 0. ProblemError on all ranks if it cannot be written."""
        if (folder := rewards.directory(self._config)) is not None:
            first, path = self._layout.rank == 0, folder / f"step-{iteration:08d}.jsonl"
            lines = [self._record(found[number], names) for number in sorted(found)] if first else []
            collectives.together(lambda: _write(path, lines) if first else None, self._layout.control)

    def _record(self, rollout: Rollout, names: Sequence[str]) -> dict[str, Any]:
        return {
            "sample": rollout.sample,
            "prompt": self._tokenizer.decode(rollout.prompt, skip_special_tokens=False),
            "completion": self.text(rollout, rollout.tokens),
            "answer": self.text(rollout, rollout.answer),
            "tokens": rollout.tokens,
            "finish": "stop" if rollout.ended else "length",
            "rewards": dict(zip(names, rollout.scores, strict=True)),
        }


def _write(path: Path, records: Sequence[dict[str, Any]]) -> None:
    lines = [f"{json.dumps(record, ensure_ascii=False)}\n" for record in records]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, "".join(lines))
    except OSError as error:
        fix = "make room, or give another --rollout-dir"
        raise ProblemError.of("--rollout-dir", str(path), f"it cannot be written: {error}", fix) from error


def _prompts(batch: Batch, room: int) -> list[Rollout]:
    """Of each row what comes before its last run of labels, of which the last `room` tokens, and the answer that these
    are, whose first label stands one place before it."""
    assert batch.samples is not None
    found = []
    for number, ids, labels in zip(batch.samples.tolist(), batch.input_ids.numpy(), batch.labels.numpy(), strict=True):
        first = prompt_length(labels)
        answer = labels[first:][labels[first:] != IGNORED].tolist()
        found.append(Rollout(number, ids[: first + 1].tolist()[-room:], [], answer, False, []))
    return found


def _end_of(dataset: Any, tokenizer: Tokenizer) -> int | None:
    """The special token that all answers of a dataset end with, as far as the first ones of each file tell."""
    ends = set()
    for part in getattr(dataset, "datasets", [dataset]):
        for number in range(min(part.count, LOOKED_AT)):
            labels = part.fields["labels"].get(part.first + number)
            ends |= {*labels[labels != IGNORED][-1:].tolist()}
    special = len(ends) == 1 and not tokenizer.decode(ends, skip_special_tokens=True)
    return ends.pop() if special else None


def totals(found: Mapping[int, Rollout], weights: Sequence[float] | None) -> dict[int, float]:
    """The reward of each rollout: the weighted sum of all that it has."""
    used = weights or (1.0,) * len(next(iter(found.values())).scores)
    return {number: float(np.dot(used, each.scores)) for number, each in found.items()}


def advantages(rewards: Mapping[int, float], group: int, scale: str) -> dict[int, float]:
    """Of each rollout how far its reward is above the mean of those to its prompt, which are `group` in a row, over
    the standard deviation of these, or of all, or not over any (GRPO, Shao et al. 2024; Liu et al. 2025)."""
    numbers = sorted(rewards)
    rows = torch.tensor([rewards[number] for number in numbers], dtype=torch.float64).view(-1, group)
    gained = rows - rows.mean(1, keepdim=True)
    if scale != "none":
        spread = rows.std() if scale == "batch" else rows.std(1, keepdim=True)
        gained = gained / (spread.nan_to_num() + 1e-4)
    return dict(zip(numbers, gained.flatten().tolist(), strict=True))
