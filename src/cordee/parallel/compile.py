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


def layers(options: PerformanceOptions, modules: list[nn.Module]) -> None:
    """Compile each of `modules` by itself; those that differ in parameters only share one compilation."""
    if options.compile == "blocks":
        for module in modules:
            module.compile(dynamic=False)


def whole(options: PerformanceOptions, forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward`, compiled from the inputs to the loss."""
    return torch.compile(forward, dynamic=False) if options.compile == "model" else forward
