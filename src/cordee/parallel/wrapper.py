"""Wrappers of layers, blocks and attention cores: what recompute and swap have in common.

Owns where a wrapper goes (`apply`) and its law (`check`). Knows none of them: options and cost are theirs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cordee.errors import Problem
from cordee.model.gpt import GPTModel
from cordee.parallel.layout import Layout
from cordee.parallel.options import LayoutOptions
from cordee.parallel.pipeline.check import SPLIT_BACKWARD
from cordee.parallel.pipeline.split import schedule_of


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """Technique `name` runs what is `inside`, of the layers that `layers` picks by their index, by `around(call)`.

    A call is given a forward and its inputs, as torch.utils.checkpoint is; a core is its own call. `compiles`:
    torch.compile may trace it. `splits_backward`: input-gradient and weight-gradient backward may run apart."""

    name: str
    around: Callable[[Any], Any]
    inside: Literal["layer", "attention", "mlp", "core"] = "layer"
    layers: Callable[[int], bool] = lambda index: True
    compiles: bool = False
    splits_backward: bool = False

    def apply(self, model: GPTModel, layout: Layout, options: LayoutOptions) -> None:
        hook = "core" if self.inside == "core" else "call"
        for layer in model.own_layers():
            if self.layers(layer.index):
                module = {"layer": layer, "mlp": layer.mlp}.get(self.inside, layer.attention)
                module.placement.wrap(hook, self.name, self.around, compiles=self.compiles)


def check(wrappers: Sequence[Wrapper], options: LayoutOptions) -> Iterator[Problem]:
    """What keeps `wrappers` from running under `options`."""
    schedule = schedule_of(options)
    if options.pipeline_model_parallel_size == 1 or schedule not in SPLIT_BACKWARD:
        return
    for name in dict.fromkeys(wrapper.name for wrapper in wrappers if not wrapper.splits_backward):
        why = f"its input-gradient and weight-gradient backward run apart, and {name} would run in each of them"
        yield Problem("--pipeline-schedule", schedule, why, f"give another, or no {name}", "excludes", limit=name)
