"""The training loop.

Owns the order of things in a step and in a run: fetch, forward and backward, clip, optimizer, report, validate, save,
stop. What any of them does is another file's. Runs the same on one process and on many."""

import gc
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from cordee.checkpoint.store import CheckpointStore
from cordee.data.batch import Batch
from cordee.data.loader import Loader
from cordee.errors import Findings, ProblemError
from cordee.log import logger, progress_bar
from cordee.model.gpt import GPTModel
from cordee.optim.build import set_rates
from cordee.optim.clip import clip_factor, gradients, scale_
from cordee.optim.precision import LossScaler
from cordee.parallel import collectives, context, data
from cordee.parallel.execution import Executor, Frozen, StepBatches, own_parameters
from cordee.parallel.layout import Layout
from cordee.train import not_finite
from cordee.train.exits import COMPLETE, Exit, ExitRule
from cordee.train.metrics import StepResult
from cordee.train.objectives import Objective
from cordee.train.options import TrainConfig
from cordee.train.reports import Reports
from cordee.train.resume import describe
from cordee.train.run_plan import RunPlan, TrainState


@dataclass(frozen=True)
class Step:
    """The micro-batches of this rank, and of those of all ranks together the weight and the tokens."""

    batches: list[Batch]
    weight: float
    tokens: int


@dataclass(frozen=True)
class Losses:
    """Means over all that a step trained; `local` is the sum of this rank's losses, left on the device."""

    mean: float
    metrics: dict[str, float]
    local: Tensor


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a trainer works with, ready made. `models` are further ones of the objective, `loaders` those of "train",
    "validation" and "test" that exist."""

    model: GPTModel
    executor: Executor
    objective: Objective[Any]
    models: Mapping[str, Frozen]
    optimizer: Optimizer
    scaler: LossScaler
    loaders: dict[str, Loader]
    layout: Layout
    device: torch.device
    store: CheckpointStore | None
    reports: Reports
    exits: ExitRule


class Trainer:
    """One run on one rank, from `state` to its end.

    Whatever decides anything is first summed over all ranks, so all ranks always do the same. Random numbers are a
    function of (seed, sample, place in the model), and all else of `state`: a resumed run repeats what the
    uninterrupted one does."""

    def __init__(self, plan: RunPlan, parts: Parts, state: TrainState):
        self.plan = plan
        self.config: TrainConfig = plan.config
        self.parts = parts
        self.state = state
        self._overdue = state.validation_due and self._validation_decides
        self._saved_at = -1 if self._overdue else state.iteration  # then nothing is new until the first step
        self._validated_at: dict[str, int] = {}
        self.stop_requested: Exit | None = None
        self._own = own_parameters(parts.model)

    def train(self) -> Exit:
        """Steps until the run is complete or has to stop. The last state is saved either way."""
        if self.config.eval_on_start and self.state.iteration == 0:
            self.validate("validation")
        try:
            ending = self._take_steps()
        finally:
            self.parts.reports.finish(self.state)
        self.save()
        return ending

    def _take_steps(self) -> Exit:
        if self._overdue:
            self._compare()
        ending = self._nothing_left()
        while ending is None:
            with collectives.contact(f"in step {self.state.iteration + 1}"):
                consumed = self.state.consumed_samples
                step = self._fetch("train", consumed, self._batch_size, self.plan.batches.micro_batches(consumed))
                result = None if step is None else self._step(self._collected(step, self.state.iteration + 1))
            if result is None:
                ending = self.stop_requested
                break
            self.parts.reports.step(result, self.state)
            if self.config.manual_gc and self._is_time(self.config.manual_gc_interval):
                gc.collect()
            saves = self._is_time(self.config.save_interval)
            validates = self._is_time(self.config.eval_interval) or self._complete
            self.state.validation_due = validates and "validation" in self.parts.loaders
            if saves and not self._validation_decides:
                self.save()  # first: a kill in a long validation shall not cost it
            if self.state.validation_due:
                self._compare()
            if saves:
                self.save()
            ending = self._nothing_left() or self.parts.exits.after(self.state.iteration)
        assert ending is not None
        return ending

    def _compare(self) -> None:
        """Validate, and compare with the best validation so far."""
        loss = self.validate("validation")
        is_best = loss is not None and self.state.validated(loss, self.config.early_stopping_threshold)
        if is_best and self.config.save_best:
            self.save()

    def validate(self, split: str) -> float | None:
        """Mean loss over the first --eval-iters global batches of `split`, the same ones every time; None if it has no
        data, was done after this very step, or a stop was requested meanwhile. Loaders "`split`-..." are reported too.
        """
        iteration = self.state.iteration
        if split not in self.parts.loaders or self._validated_at.get(split) == iteration:
            return None
        self._validated_at[split] = iteration
        start = time.perf_counter()
        losses: dict[str, float] = {}
        names = [name for name in self.parts.loaders if name == split or name.startswith(f"{split}-")]
        self.parts.model.eval()
        try:
            with collectives.contact(f"in the {split} after step {iteration}"):
                for name in names:
                    if (loss := self._mean_loss(name)) is None:
                        break
                    losses[name] = loss
                losses = collectives.from_first(losses, self.parts.layout)  # so that all ranks decide alike
        finally:
            data.release(self.parts.model)
            self.parts.model.train()
        if len(losses) < len(names):
            logger.info("the %s after iteration %d was aborted: stop requested", split, iteration)
            return None
        self.parts.reports.validation(self.state, losses, time.perf_counter() - start)
        if self.config.manual_gc:
            gc.collect()
        return losses[split]

    def save(self) -> None:
        """Save this step, once; the files are written in the background unless the options say otherwise."""
        store, iteration = self.parts.store, self.state.iteration
        if store is None or self._saved_at == iteration:
            return
        start = time.perf_counter()
        optimizer = self.parts.optimizer if self.config.save_optim else None
        manifest = describe(self.plan, self.state, self.parts.scaler)
        best = self.state.best_iteration if self.config.save_best else None
        store.save(iteration, self.parts.model, optimizer, manifest, background=self.config.async_save, best=best)
        self._saved_at = iteration
        self.parts.reports.pause(time.perf_counter() - start)

    def _nothing_left(self) -> Exit | None:
        return COMPLETE if self._complete else self.parts.exits.early(self.state.stale_validations)

    @property
    def _validation_decides(self) -> bool:
        """Whether a run that resumes from a step has to know of the validation after it."""
        return self.config.save_best or self.config.early_stopping_patience is not None

    @property
    def _complete(self) -> bool:
        return self.state.iteration >= self.plan.iterations

    @property
    def _batch_size(self) -> int:
        """Samples of the coming step."""
        return self.plan.batches.batch_size(self.state.consumed_samples)

    def _is_time(self, interval: int | None) -> bool:
        return bool(interval) and self.state.iteration % interval == 0

    def _fetch(self, split: str, consumed: int, size: int, micro_batch_size: int | Sequence[int]) -> Step | None:
        """Read micro-batches, and agree with all ranks on how to continue; None if a stop is requested.

        ProblemError on all ranks if one of them cannot read its samples or write its part of a checkpoint."""
        layout, store, found = self.parts.layout, self.parts.store, Findings()
        loader = self.parts.loaders[split]
        batches = found.attempt(lambda: loader.next_step(consumed, size, micro_batch_size)) or []
        counted = batches if layout.speaks_for_samples else []
        weight = sum(map(self.parts.objective.weight, counted))
        tokens = sum(batch.num_tokens for batch in counted)
        unsaved = int(store is not None and store.failed)
        votes = self.parts.exits.votes()
        numbers = [weight, tokens, len(found.problems), unsaved, *votes]
        weight, tokens, unread, unsaved, *votes = collectives.sum_numbers(numbers, layout)
        if unread:
            collectives.raise_together(found.problems, layout.control)
        if unsaved and store is not None:
            store.wait()  # the save has failed on all ranks alike, and says so here
        self.stop_requested = self.parts.exits.decide([int(vote) for vote in votes])
        return Step(batches, weight, int(tokens)) if self.stop_requested is None else None

    def _collected(self, step: Step, iteration: int | None) -> Step:
        """`step` as the objective makes it of its samples. If it cannot, what was trained before is saved first."""
        try:
            batches = self.parts.objective.collect(step.batches, self.parts.models, iteration)
        except ProblemError as error:
            if all(problem.kind != "not finite" for problem in error.problems):
                self.save()
            raise
        if batches is step.batches:
            return step
        counted = batches if self.parts.layout.speaks_for_samples else []
        (tokens,) = collectives.sum_numbers([sum(batch.num_tokens for batch in counted)], self.parts.layout)
        return Step(batches, step.weight, int(tokens))

    def _step(self, step: Step) -> StepResult:
        """Forward, backward and optimizer; `state` moves on."""
        parts, state = self.parts, self.state
        scale = parts.scaler.scale
        losses = self._backward(step, scale)
        own = gradients(self._own)
        norm = collectives.global_norm(own, parts.layout, parts.device) / scale
        overflow = not (math.isfinite(norm) and math.isfinite(losses.mean))
        if overflow:
            self._require_curable(losses, norm)
        logged = (state.iteration + 1) % self.config.log_interval == 0
        zeros = None
        if logged and self.config.log_num_zeros_in_grad:
            zeros = collectives.count_zeros(own, parts.layout, parts.device)
        learning_rate = self.plan.schedule.learning_rate(state.schedule_position)
        if not overflow:
            scale_(gradients(parts.model.parameters()), clip_factor(norm, self.config.clip_grad) / scale)
            set_rates(parts.optimizer, learning_rate, self.plan.schedule.weight_decay(state.schedule_position))
            parts.optimizer.step()
        parts.optimizer.zero_grad()
        parts.scaler.update(overflow)
        samples = self._batch_size
        state.advance(samples, step.tokens, skipped=overflow)
        params_norm = None
        if logged and self.config.log_params_norm:
            params_norm = collectives.global_norm(self._own, parts.layout, parts.device)
        return StepResult(
            loss=losses.mean,
            metrics=losses.metrics,
            grad_norm=norm,
            learning_rate=learning_rate,
            loss_scale=scale,
            samples=samples,
            tokens=step.tokens,
            skipped=overflow,
            zeros_in_grad=zeros,
            params_norm=params_norm,
        )

    def _backward(self, step: Step, scale: float) -> Losses:
        """Gradients of the mean loss over all ranks, times `scale`, summed over all micro-batches."""
        layout = self.parts.layout
        weight = step.weight or 1  # of nothing that counts all sums are 0
        own, weights = self._own_parts(step.batches), [self.parts.objective.weight(batch) for batch in step.batches]
        sums = self.parts.executor.train(StepBatches(batches=own, weights=weights, weight=weight, scale=scale))
        local = torch.stack(list(sums.values()))
        overall = collectives.sum_over(local.clone(), layout).tolist()
        means = {name: value / weight for name, value in zip(sums, overall, strict=True)}
        return Losses(means.pop(""), means, local[list(sums).index("")])

    def _own_parts(self, batches: Sequence[Batch]) -> list[Batch]:
        """What this rank has of the tokens of each micro-batch, with what further models say of them."""
        parts = [context.shard(batch, self.parts.layout, self.config) for batch in batches]
        return self.parts.objective.prepare(parts, self.parts.models)

    def _mean_loss(self, split: str) -> float | None:
        size = self.plan.batches.global_batch_size
        loss, weight = 0.0, 0.0
        with progress_bar(split, self.config.eval_iters, shown=self.parts.layout.rank == 0) as progress:
            for index in range(self.config.eval_iters):
                if (step := self._fetch(split, index * size, size, self.config.micro_batch_size)) is None:
                    return None
                total = self.parts.executor.evaluate(self._own_parts(self._collected(step, None).batches))
                loss += collectives.sum_over(total, self.parts.layout).item()
                weight += step.weight
                progress(index + 1)
        return loss / (weight or 1)

    def _require_curable(self, losses: Losses, norm: float) -> None:
        """Stop the run unless this is an overflow in fp16, which a smaller loss scale cures."""
        scaler, store = self.parts.scaler, self.parts.store
        if self.config.fp16 and (not scaler.dynamic or scaler.scale > scaler.minimum):
            return
        first = self.state.consumed_samples
        problem = not_finite.find(
            self.parts.model,
            losses.local,
            self.parts.layout,
            step=self.state.iteration + 1,
            values=f"loss {losses.mean}, gradient norm {norm}",
            samples=range(first, first + self._batch_size),
        )
        if store is not None:
            problem = replace(problem, why=f"{problem.why}; {store.last_good()}")
        raise ProblemError([problem], everywhere=True)
