"""One stage of a pipeline.

Owns its forward and backward, and what it keeps of a micro-batch between them. Knows neither schedule nor ranks.

The loss is taken of a copy of the last hidden states, so that every stage ends in hidden states: the backward of the
head, always a whole one, runs before that of the layers, whose dgrad and wgrad may run apart."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cordee.data.batch import Batch
from cordee.model.balance import Balance
from cordee.model.gpt import GPTModel
from cordee.model.head import Head
from cordee.model.span import Span
from cordee.parallel.execution import LossParts
from cordee.parallel.pipeline import engine

RankLoss = Callable[[Head, Tensor, Batch], LossParts]
Run = Callable[[Tensor, Batch, Balance | None, Span], Tensor]  # the hidden states that a span makes


@dataclass
class _InFlight:
    """A micro-batch after its forward. `x` is None in the first stage, `leaf` and `loss` are only in the last."""

    x: Tensor | None
    output: Tensor
    leaf: Tensor | None = None
    loss: Tensor | None = None
    param_groups: engine.ParamGroups | None = None
    grad: Tensor | None = None  # of `output`, where the whole backward is left to `backward_weight`


class Stage:
    """Stage `index` of a pipeline: `span` of `model`, run by `run`, and `loss` where it has the head.

    `sharded` are its modules whose gradients are reduced, each by itself."""

    def __init__(self, index: int, span: Span, model: GPTModel, run: Run, loss: RankLoss):
        self.index = index
        self.span = span
        self._model = model
        self._run = run
        self._loss = loss
        self._in_flight: dict[int, _InFlight] = {}
        # Embedding, final norm and head are the model's own.
        modules = [model] if span.embedding or span.head else []
        modules += [module for layer in span.layers for module in model.layers[str(layer)].modules()]
        self.sharded = engine.fsdp_modules(modules)

    def forward(
        self, micro_batch: int, x: Tensor, batch: Batch, balance: Balance, scale: float
    ) -> tuple[Tensor, LossParts | None]:
        """Hidden states, detached, and the parts of the loss in the last stage. `x` are token ids in the first.

        The backward begins with the loss times `scale`."""
        if not self.span.embedding:
            x = x.detach().requires_grad_()
        output = self._run(x, batch, balance, self.span)
        kept = self._in_flight[micro_batch] = _InFlight(None if self.span.embedding else x, output)
        if not self.span.head:
            return output.detach(), None
        kept.leaf = output.detach().requires_grad_()
        parts = self._loss(self._model.head, kept.leaf, batch)
        kept.loss = parts[0] * scale
        return output.detach(), parts

    def evaluate(self, x: Tensor, batch: Batch) -> Tensor:
        """Hidden states, without a backward."""
        return self._run(x, batch, None, self.span)

    def backward(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        """The gradient of the stage's input, from that of its output; None in the first and the last stage."""
        kept = self._in_flight.pop(micro_batch)
        return self._whole(kept, self._grad(kept, grad))

    def backward_input(self, micro_batch: int, grad: Tensor | None) -> Tensor | None:
        """As `backward`; gradients of parameters are left to `backward_weight`."""
        kept = self._in_flight[micro_batch]
        grad = self._grad(kept, grad)
        if kept.x is None:  # no other stage waits for a gradient
            kept.grad = grad
            return None
        found, kept.param_groups = engine.backward_input(kept.output, grad, kept.x, self._parameters())
        return found

    def backward_weight(self, micro_batch: int) -> None:
        kept = self._in_flight.pop(micro_batch)
        if kept.param_groups is not None:
            engine.backward_weight(self._parameters(), kept.param_groups)
        else:
            assert kept.grad is not None
            self._whole(kept, kept.grad)

    def _whole(self, kept: _InFlight, grad: Tensor) -> Tensor | None:
        if kept.output.requires_grad:  # not so where nothing of the first stage is trained
            torch.autograd.backward(kept.output, grad)
        return None if kept.x is None else kept.x.grad

    def _grad(self, kept: _InFlight, received: Tensor | None) -> Tensor:
        """The gradient of the stage's output."""
        if kept.loss is None:
            assert received is not None
            return received
        kept.loss.backward()
        kept.loss = None
        assert kept.leaf is not None and kept.leaf.grad is not None
        return kept.leaf.grad

    def _parameters(self) -> list[nn.Parameter]:
        """The trained ones of layers and final norm, in the order of the forward."""
        own = [*self._model.final_norm.parameters()] if self.span.head else []
        own += [p for index in self.span.layers for p in self._model.layers[str(index)].parameters()]
        return [parameter for parameter in own if parameter.requires_grad]
