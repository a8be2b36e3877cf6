"""torch.compile over the layers of a model or over a whole forward.

Owns what is compiled. Names of parameters stay as they are: modules are compiled in place. Shapes are static, since
every micro-batch of a run has the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from cordee.config.schema import PerformanceOptions
from cordee.log import logger
from cordee.model.gpt import GPTModel
from cordee.model.placement import Placement
from cordee.parallel.layout import Layout


def apply(model: GPTModel, layout: Layout, options: PerformanceOptions) -> None:
    """Compile each layer by itself; those that differ in parameters only share one compilation."""
    if options.compile == "blocks":
        for layer in model.own_layers():
            if _can_be(layer):
                layer.compile(dynamic=False)


def whole(model: GPTModel, options: PerformanceOptions, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, which runs `model` from the inputs to the loss, compiled."""
    return torch.compile(forward, dynamic=False) if options.compile == "model" and _can_be(model) else forward


def _can_be(module: nn.Module) -> bool:
    """Whether all that was done to it says of itself that it can be traced."""
    for part in module.modules():
        placement = getattr(part, "placement", None)
        for change in placement.applied if isinstance(placement, Placement) else ():
            if not change.compiles:
                logger.info("not compiled: %s has changed `%s` of a %s", change.by, change.hook, type(part).__name__)
                return False
    return True
