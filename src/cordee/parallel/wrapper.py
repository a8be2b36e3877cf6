"""Running layers, blocks and attention cores in another way: what recompute and swap have in common.

Owns where such a wrapper goes and which runs it fits. Knows none of them, and not what they do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from cordee.config.schema import ParallelOptions
from cordee.model.gpt import GPTModel
from cordee.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """Technique `name` runs what is `inside`, of the layers that `layers` picks by their index, by `around(call)`.

    A call is given a forward and its inputs, as torch.utils.checkpoint is; around a core it is the core.
    `compiles`: torch.compile may trace it. `splits_backward`: gradients of inputs and of parameters may be computed
    apart, as some schedules of pipelines do.
    """

    name: str
    around: Callable[[Any], Any]
    inside: Literal["layer", "attention", "mlp", "core"] = "layer"
    layers: Callable[[int], bool] = lambda index: True
    compiles: bool = False
    splits_backward: bool = False

    def apply(self, model: GPTModel, layout: Layout, options: ParallelOptions) -> None:
        hook = "core" if self.inside == "core" else "call"
        for layer in filter(lambda layer: self.layers(layer.index), model.own_layers()):
            modules = {"layer": layer, "mlp": layer.mlp}
            placement = modules.get(self.inside, layer.attention).placement
            placement.wrap(hook, self.name, self.around, compiles=self.compiles)
