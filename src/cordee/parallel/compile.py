"""torch.compile over the layers of a model or over a whole forward.

Option: `--compile` (options.py). Law: `pipeline/check.py`. No cost in memory. Owns what is compiled. Names of
parameters stay: modules are compiled in place. Shapes are static, since every micro-batch of a run has the same."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from cordee.log import logger
from cordee.model.gpt import GPTModel
from cordee.model.placement import Change, changes
from cordee.parallel.layout import Layout
from cordee.parallel.options import CompileOptions


def apply(model: GPTModel, layout: Layout, options: CompileOptions) -> None:
    """Compile each layer by itself; layers that differ in parameters only share one compilation."""
    if options.compile == "blocks":
        unknown = {layer: _unknown(layer) for layer in model.own_layers()}
        _report(change for found in unknown.values() for change in found)
        for layer in (layer for layer, found in unknown.items() if not found):
            layer.compile(dynamic=False)


def whole(model: GPTModel, options: CompileOptions, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which runs `model` from inputs to loss, compiled if the options ask for it."""
    if options.compile != "model":
        return forward
    _report(unknown := _unknown(model))
    return forward if unknown else torch.compile(forward, dynamic=False)


def _unknown(module: nn.Module) -> list[Change]:
    """What was done to `module` that may not be traceable: then nothing is compiled."""
    return [change for change in changes(module) if not change.compiles]


def _report(unknown: Iterable[Change]) -> None:
    for change in dict.fromkeys(unknown):
        logger.info("not compiled, since %s", change)
