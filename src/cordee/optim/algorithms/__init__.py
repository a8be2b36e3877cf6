"""The algorithms, one file each, found by scanning this package.

Owns which value of --optimizer asks for which. A file has `ALGORITHMS`: by such a value, a function `(options, groups,
fused) -> Optimizer`, where `groups` are torch's parameter groups and `fused` says whether the device has fused
optimizers. All functions of a file keep the same state: a run resumes with any of them. Torch is imported in the
functions, so that the names are known without it."""

import functools
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from cordee.optim.options import OptimizerOptions

if TYPE_CHECKING:
    from torch.optim import Optimizer

Groups = list[dict[str, Any]]
Build = Callable[[OptimizerOptions, Groups, bool], "Optimizer"]


@functools.cache
def registry() -> dict[str, Build]:
    """Every algorithm by the value of --optimizer that asks for it."""
    found: dict[str, Build] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        found |= import_module(module.name).ALGORITHMS
    return found


def state_of(optimizer: str) -> str:
    """Names the state that an optimizer keeps; that of a value that is none is its own."""
    return registry()[optimizer].__module__ if optimizer in registry() else optimizer
