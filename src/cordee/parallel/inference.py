"""A model for inference over several processes: tensor-parallel ranks, stages of a pipeline, and replicas.

Owns building this process's shard, and one forward through all processes of a replica. Each gets the logits, so that
all choose the same tokens, or another output of the last hidden states. Knows nothing of sampling, nor of what each
replica is given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cordee.errors import ProblemError, Problems, at_most
from cordee.model.cache import Cache
from cordee.model.config import ModelConfig
from cordee.model.gpt import GPTModel, Output
from cordee.model.head import Head
from cordee.model.span import Span
from cordee.parallel import collectives, laws, sharding, tensor
from cordee.parallel.degrees import Degrees
from cordee.parallel.layout import Layout
from cordee.parallel.options import InferenceLayoutOptions, ParallelOptions
from cordee.parallel.pipeline.split import by_cost
from cordee.weights.load import materialise


def degrees(options: InferenceLayoutOptions, copies: int = 1) -> Degrees:
    """What `options` ask for, in so many `copies`; the processes of one are tensor-parallel ranks and stages."""
    return Degrees(pp=options.pipeline_model_parallel_size, replicate=copies, tp=options.tensor_model_parallel_size)


def check(model: ModelConfig, degrees: Degrees) -> Problems:
    """What keeps the processes from sharding `model`."""
    yield from laws.sharded(model, degrees.tp)
    layers = model.num_layers
    yield from at_most("--pipeline-model-parallel-size", degrees.pp, layers, f"the model's {layers} layers", "load")


def build(
    model: ModelConfig, layout: Layout, dtype: torch.dtype, device: torch.device
) -> "tuple[GPTModel, InferenceStage]":
    """This process's shard of `model`, its values still to be filled, and which stage that is.

    ProblemError if the processes do not fit the model."""
    if problems := list(check(model, layout.degrees)):
        raise ProblemError(problems, everywhere=True)
    own = by_cost(model, layout.degrees.pp)[layout.axis_rank("pp")]
    built = GPTModel(model, spans=[own], device="meta", dtype=dtype)
    options = ParallelOptions(tensor_model_parallel_size=layout.degrees.tp)
    sharding.apply(built, layout, options)
    tensor.apply(built, layout, options)
    materialise(built, device=device)
    return built, InferenceStage(layout, own)


def last_logits(head: Head, hidden: Tensor) -> Tensor:
    """Logits `[batch, vocab]` of the last token of `hidden` `[batch, seq, embed]`; no others are computed."""
    return head.logits(hidden[:, -1:])[:, 0]


@dataclass(frozen=True)
class InferenceStage:
    """The span of the layers that this process has, among the stages of `layout`."""

    layout: Layout
    span: Span

    @property
    def tensor_ranks(self) -> int:
        return self.layout.degrees.tp

    def run(
        self, model: GPTModel, ids: Tensor, attention_mask: Tensor | None = None, *, cache: Cache | None = None
    ) -> Tensor:
        """As `model(..., output=last_logits)` of a whole model; all processes of a copy call it alike."""
        like = torch.empty(len(ids), model.config.vocab_size, dtype=next(model.parameters()).dtype, device="meta")
        return self.output(model, ids, last_logits, like, attention_mask, cache=cache)

    def output(
        self,
        model: GPTModel,
        ids: Tensor,
        output: Output,
        like: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: Cache | None = None,
    ) -> Tensor:
        """As `model(ids, ..., output=output)` of a whole model, which is `like` this in shape and type."""
        if (group := self.layout.group("pp")) is None:
            return model(ids, attention_mask, cache=cache, output=output)
        x, rank, last = ids, self.layout.axis_rank("pp"), self.layout.degrees.pp - 1
        if rank > 0:
            dtype = next(model.parameters()).dtype
            x = torch.empty(*ids.shape, model.config.hidden_size, dtype=dtype, device=ids.device)
            collectives.receive(x, rank - 1, group).wait()
        y = model(x, attention_mask, cache=cache, output=output)
        if rank < last:
            collectives.send(y.contiguous(), rank + 1, group).wait()
            y = torch.empty_like(like, device=y.device)
        return collectives.broadcast(y, last, group)
