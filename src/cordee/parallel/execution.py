"""Forward and backward of the micro-batches of a step, wherever the layers are.

Owns the protocol of executors, and the plain one: one micro-batch after another, forward and backward, on a rank that
has the whole model. `pipeline/executor.py` is the other. Knows no optimizer and no objective by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cordee.data.batch import Batch
from cordee.model.balance import Balance
from cordee.model.gpt import GPTModel
from cordee.model.head import Head
from cordee.ops.dropout import DropoutRNG
from cordee.parallel import compile, data, differentiable
from cordee.parallel.layout import Layout
from cordee.parallel.options import LayoutOptions

LossParts = tuple[Tensor, dict[str, Tensor]]  # the sum of losses, and further sums by name
Output = Callable[[Head, Tensor, Batch], Any]  # what is made of the last hidden states of a micro-batch
Reduce = Callable[[Tensor], Tensor]


class Loss(Protocol):
    """What an executor knows of an objective, documented in `cordee.train.objectives.Objective`."""

    @property
    def reduces(self) -> bool: ...

    def weight(self, batch: Any) -> float: ...

    def loss(self, head: Head, hidden: Tensor, batch: Any, reduce: Reduce) -> LossParts: ...


class Criterion:
    """An objective on one rank, which may have a shard of the tokens of each sequence.

    Ranks return parts of a sum over the axes along which they hold different tokens."""

    def __init__(self, objective: Loss, layout: Layout):
        self._objective = objective
        self._group = layout.group("cp")
        self._repeats = layout.degrees.cp if objective.reduces else 1  # ranks that compute the same

    def weight(self, part: Batch) -> float:
        """This rank's part of the weight of a micro-batch of which it holds `part`."""
        weight = self._objective.weight(part)
        return weight if self._repeats == 1 else weight / self._repeats

    def loss(self, head: Head, hidden: Tensor, part: Batch) -> LossParts:
        """This rank's part of the loss and metrics."""
        total, metrics = self._objective.loss(head, hidden, part, self._reduce)
        if self._repeats == 1:
            return total, metrics
        return total / self._repeats, {name: value / self._repeats for name, value in metrics.items()}

    def _reduce(self, x: Tensor) -> Tensor:
        assert self._objective.reduces, "an objective that reduces says so"
        return x if self._group is None else differentiable.all_reduce_fwd_all_reduce_bwd(x, self._group)


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """The micro-batches of this rank in one step: its shard of the tokens of each, and the `weights` of whole ones.

    The gradient is that of the sum of losses times `scale / weight`, where `weight` is that of all ranks' micro-batches
    together."""

    batches: Sequence[Batch]
    weights: Sequence[float]
    weight: float
    scale: float


class Executor(Protocol):
    """Runs a model. What ranks return is to be summed over the axes along which each has a part of the loss."""

    def train(self, step: StepBatches) -> dict[str, Tensor]:
        """Leave the gradients of `step` at the parameters, reduced over the data-parallel ranks.

        Returns sums over this rank's micro-batches, float32 scalars: of the loss under "", of metrics under their
        names, those of routers weighted by tokens. All ranks return the same names."""
        ...

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        """The sum of the loss over `batches`, a float32 scalar, without gradients."""
        ...

    def forward(self, batches: Sequence[Batch], output: Output) -> list[Any]:
        """`output` of each of `batches`, without gradients; None on ranks without the head."""
        ...


class LocalExecutor:
    """Micro-batches one after another on a rank that has the whole model."""

    def __init__(self, model: GPTModel, options: LayoutOptions, device: torch.device, criterion: Criterion):
        self._model = model
        self._seed = options.seed
        self._stage = options.zero_stage
        self._device = device
        self._criterion = criterion
        self._forward = compile.whole(model, options, self._forward_eager)

    def train(self, step: StepBatches) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(step.batches):
            data.begin_micro_batch(self._model, self._stage, last=index == len(step.batches) - 1)
            here = batch.to(self._device)
            balance = Balance(step.scale * step.weights[index] / step.weight, here.counted)
            total, metrics = self._forward(here, balance, self._criterion.loss)
            (total * (step.scale / step.weight)).backward()
            weight = self._criterion.weight(batch)
            add(sums, {"": total, **metrics, **{name: value * weight for name, value in balance.metrics().items()}})
        return sums

    def evaluate(self, batches: Sequence[Batch]) -> Tensor:
        return torch.stack([total for total, _ in self.forward(batches, self._criterion.loss)]).float().sum()

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], output: Output) -> list[Any]:
        return [self._forward(batch.to(self._device), None, output) for batch in batches]

    def _forward_eager(self, batch: Batch, balance: Balance | None, output: Output) -> Any:
        return self._model(
            batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            balance=balance,
            dropout_rng=dropout_rng_of(batch, self._seed),
            output=lambda head, hidden: output(head, hidden, batch),
        )


class Frozen:
    """A model as it is, without dropout, as `executor` runs it over the ranks of `layout`."""

    def __init__(self, model: GPTModel, executor: Executor, layout: Layout):
        self.model = model
        self._executor = executor
        self.layout = layout

    def forward(self, batches: Sequence[Batch], output: Output) -> list[Any]:
        """As `Executor.forward`; gathered parameters are freed."""
        training = self.model.training
        self.model.eval()
        try:
            return self._executor.forward(batches, output)
        finally:
            data.release(self.model)
            self.model.train(training)


def own_parameters(model: GPTModel) -> list[nn.Parameter]:
    """The trained parameters that count on this rank: a copy of another rank's embedding does not."""
    copy = model.embedding.weight if model.copies_embedding else None
    return [parameter for parameter in model.parameters() if parameter.requires_grad and parameter is not copy]


def dropout_rng_of(batch: Batch, seed: int) -> DropoutRNG | None:
    """Dropout randomness for `batch`: the same wherever its samples and tokens are."""
    sequences = batch.sequences
    return None if sequences is None else DropoutRNG(seed, sequences)


def add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add `values` to `sums` by name, in float32."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.detach().float()
