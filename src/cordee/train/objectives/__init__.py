"""What is trained: one file an objective, found by scanning this package.

An objective is the only difference between pretraining, instruction tuning and preference training. It sees one
micro-batch and no ranks; the trainer divides its loss by the weight of the whole step.
"""

from __future__ import annotations

import functools
import pkgutil
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.data.batch import Batch
    from cordee.model.head import Head

    LossParts = tuple[Tensor, Tensor, dict[str, Tensor]]


class Objective(Protocol):
    """`stage` is its value of --stage, `loss_name` what log lines call its loss."""

    stage: str
    loss_name: str

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> LossParts:
        """(sum, weight, metrics) of a micro-batch: the loss summed over what counts, scalar; how much counts, equal to
        `batch.weight()`; further sums by name, which are logged divided by the weight.

        `hidden` `[batch, seq, embed]` are the model's last hidden states, after the final norm.
        """
        ...


@functools.cache
def registry() -> dict[str, Objective]:
    """Every objective by its stage."""
    modules = (import_module(module.name) for module in pkgutil.iter_modules(__path__, f"{__name__}."))
    return {module.OBJECTIVE.stage: module.OBJECTIVE for module in modules}
