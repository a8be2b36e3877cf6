"""The next token: cross entropy of every trained token of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.data.batch import Batch
    from cordee.model.head import Head


class NextToken:
    stage = "pretrain"
    loss_name = "lm loss"

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total, weight = head.loss(hidden, batch.labels)
        return total, weight, {}


OBJECTIVE = NextToken()
