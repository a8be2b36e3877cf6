"""The order in which techniques are put on a model.

Owns that order, which is meaning: parameters are sharded before blocks compute with their shards, attention is wrapped
with the heads that tensor parallelism leaves it, wrappers (recompute, swap) go around all of that, compilation sees
layers with their collectives and wrappers, and FSDP2 wraps the result. Each technique is a file of its own, which names
its options, law and cost; its `apply(model, layout, options)` is called here."""

from collections.abc import Sequence

import torch

from cordee.errors import raise_all
from cordee.model.gpt import GPTModel
from cordee.parallel import compile, context, data, expert, overlap, sharding, tensor, wrapper
from cordee.parallel.layout import Layout
from cordee.parallel.options import LayoutOptions
from cordee.parallel.wrapper import Wrapper
from cordee.weights.load import materialise


def apply(
    model: GPTModel, layout: Layout, options: LayoutOptions, device: torch.device, wrappers: Sequence[Wrapper] = ()
) -> GPTModel:
    """Put `model`, built on the meta device, on `device` as `options` ask; its values are still to be filled.

    `wrappers` run around each other in their order, the first inside. ProblemError if one does not fit the run."""
    raise_all(wrapper.check(wrappers, options))
    for technique in (sharding, tensor, overlap, expert, context, *wrappers, compile, data):
        technique.apply(model, layout, options)
    materialise(model, device=device)
    return model
