"""Forward and backward of the micro-batches of a step, wherever the layers are.

Owns what the trainer asks for and gets, and the plain way to do it: one micro-batch after another, forward and
backward, on a rank that has the whole model. `pipeline/executor.py` is the other way. Knows no optimizer and no
objective by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cordee.config.schema import TrainConfig
from cordee.data.batch import Batch
from cordee.model.balance import Balance
from cordee.model.gpt import GPTModel
from cordee.model.head import Head
from cordee.model.noise import Noise
from cordee.parallel import compile, data

LossParts = tuple[Tensor, Tensor, dict[str, Tensor]]
Loss = Callable[[Head, Tensor, Batch], LossParts]  # (sum, weight, further sums) of the last hidden states


@dataclass(frozen=True, kw_only=True)
class Work:
    """The micro-batches of this rank in one step: its part of the tokens of each, and the `weights` of the whole ones.

    The gradient is that of the sum of losses times `scale / weight`, where `weight` is that of all ranks' micro-batches
    together.
    """

    batches: Sequence[Batch]
    weights: Sequence[int]
    weight: int
    scale: float


class Executor(Protocol):
    """Runs a model. What ranks return is to be summed over the axes along which each has a part of the loss."""

    def train(self, work: Work) -> dict[str, Tensor]:
        """Leave the gradients of `work` at the parameters, reduced over the data-parallel ranks.

        Returns sums over this rank's micro-batches, float32 scalars: of the loss under "", of metrics under their
        names, those of routers weighted by tokens. All ranks return the same names.
        """
        ...

    def evaluate(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        """Sums of loss and weight over `batches`, scalars, without gradients."""
        ...


class LocalExecutor:
    """Micro-batches one after another on a rank that has the whole model."""

    def __init__(self, model: GPTModel, options: TrainConfig, device: torch.device, loss: Loss):
        self._model = model
        self._seed = options.seed
        self._stage = options.zero_stage
        self._device = device
        self._loss = loss
        self._forward = compile.whole(model, options, self._forward_eager)

    def train(self, work: Work) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for index, batch in enumerate(work.batches):
            data.begin_micro_batch(self._model, self._stage, last=index == len(work.batches) - 1)
            balance = Balance(work.scale * work.weights[index] / work.weight)
            total, _, metrics = self._forward(batch.to(self._device), balance)
            (total * (work.scale / work.weight)).backward()
            balanced = {name: value * batch.weight() for name, value in balance.metrics().items()}
            add(sums, {"": total, **metrics, **balanced})
        return sums

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
        losses, weights, _ = zip(*(self._forward(batch.to(self._device), None) for batch in batches), strict=True)
        return torch.stack(losses).float().sum(), torch.stack(weights).sum()

    def _forward_eager(self, batch: Batch, balance: Balance | None) -> Any:
        return self._model(
            batch.input_ids,
            position_ids=batch.position_ids,
            segments=batch.segments,
            balance=balance,
            noise=noise_of(batch, self._seed),
            output=lambda head, hidden: self._loss(head, hidden, batch),
        )


def noise_of(batch: Batch, seed: int) -> Noise | None:
    """What dropout draws for `batch`: the same wherever its samples and tokens are."""
    return None if batch.samples is None else Noise(seed, batch.samples)


def add(sums: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add `values` up under their names, in float32."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.detach().float()
