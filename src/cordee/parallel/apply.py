"""The order in which techniques are put on a model.

Owns that order, which is meaning: parameters are shared out before blocks learn what to do with their part, attention
is wrapped with the heads that tensor parallelism leaves it, compilation sees layers with their collectives, and FSDP2
wraps what is left. Each technique is a file of its own and does not know the others.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from cordee.config.schema import TrainConfig
from cordee.errors import Problem
from cordee.model.config import ModelConfig
from cordee.model.gpt import GPTModel
from cordee.parallel import compile, context, data, expert, overlap, sharding, tensor
from cordee.parallel.degrees import Degrees
from cordee.parallel.layout import Layout
from cordee.weights.load import materialise


def check(model: ModelConfig, degrees: Degrees, options: TrainConfig) -> Iterator[Problem]:
    """What keeps `degrees` from fitting `model`."""
    tokens = options.seq_length // degrees.cp
    yield from tensor.check(model, degrees.tp, tokens, sequence=options.sequence_parallel)
    yield from overlap.check(model, options)
    yield from context.check(model, options, options.seq_length)
    yield from expert.check(model, degrees)


def _num_parts(options: TrainConfig) -> int:
    return options.tp_comm_overlap_parts if options.tp_comm_overlap else 1


def apply(model: GPTModel, layout: Layout, options: TrainConfig, device: torch.device) -> GPTModel:
    """Put `model`, built on the meta device, on `device` as `options` say; its values are still to be filled."""
    layers = list(model.layers.values())
    sharding.share_out(model, layout)
    tensor.apply(model, layout, sequence=options.sequence_parallel)
    overlap.apply(model, layout, _num_parts(options), sequence=options.sequence_parallel)
    expert.apply(model, layout, options)
    context.apply(model, layout, options)
    compile.layers(options, layers)
    if data.needs_sharding(options, layout.world_size):
        data.apply(model, layers, layout, options.zero_stage, options)
        data.schedule(model, layers, options, device)
    materialise(model, device=device)
    return model
