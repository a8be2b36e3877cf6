"""Projections and tables: parameters with logical axes that run as one GEMM or one look-up.

Owns the seams around these. Knows not what they are part of."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.model.bound import Binding, require_plain
from cordee.model.low_rank import Drop, Projection
from cordee.model.placement import Placement, View, unchanged
from cordee.model.specs import Specs
from cordee.ops.gemm import fixed_linear, fixed_linear_onto, linear


@dataclass(eq=False, kw_only=True)
class LinearPlacement(Placement):
    """`product` is the GEMM, as `cordee.ops.gemm.linear`, of experts as `cordee.ops.grouped.grouped_matmul`."""

    product: Callable[..., Tensor] = linear


class Linear(Projection[LinearPlacement]):
    """y = x W^T + b. W keeps its logical dims `[*out_shape, in_size]` and is flattened for the GEMM only."""

    def __init__(self, specs: Specs, **factory):
        super().__init__(LinearPlacement(), specs, **factory)

    def forward(self, x: Tensor, before: View | None = None, *, drop: Drop | None = None) -> Tensor:
        """`[..., in_size]` to `[..., product of out_shape]`; with a cheap function `before`, of before(x).

        `drop` is the dropout of adapters, in training."""
        if before is not None and not (self.adapters is None and self.quantised is None):
            x, before = before(x), None
        bias = self.local("bias")
        bias = None if bias is None else bias.flatten()
        y = self.placement.product(x, self.local("weight").flatten(0, -2), bias, before=before)
        return self.with_adapters(y, x, linear, drop)

    def bind(self, binding: Binding) -> View:
        """x `[batch, in_size]` to `[batch, product of out_shape]`."""
        return fixed_linear(*self._bound_weights(), binding.rows)

    def bind_onto(self, binding: Binding) -> Callable[[Tensor, Tensor], Tensor]:
        """x and a residual to the residual with what `bind` gives added to it."""
        return fixed_linear_onto(*self._bound_weights(), binding.rows)

    def _bound_weights(self) -> tuple[Tensor, Tensor | None]:
        require_plain(self, Linear, "weight bias")
        return self.weight.detach().flatten(0, -2), None if self.bias is None else self.bias.detach().flatten()


Lookup = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False, kw_only=True)
class EmbeddingPlacement(Placement):
    """`lookup` is given the rows that are here, and `exit` what it finds."""

    lookup: Lookup = F.embedding
    exit: View = unchanged


class Embedding(Projection[EmbeddingPlacement]):
    """A table of rows `[num_rows, hidden_size]`, looked up by index."""

    def __init__(self, specs: Specs, **factory):
        super().__init__(EmbeddingPlacement(), specs, **factory)

    def forward(self, index: Tensor) -> Tensor:
        """int64 `[batch, seq]` to `[batch, seq, embed]`."""
        y = self.placement.lookup(index, self.local("weight"))
        for adapter in self.low_ranks():
            a, b = adapter.factors()
            y = y + adapter.config.scale * (self.placement.lookup(index, b) @ a)
        return self.placement.exit(y)

    def bind(self) -> Tensor:
        """The table itself."""
        require_plain(self, Embedding, "weight")
        return self.weight.detach()


def factory_kwargs(device: torch.device | str | None, dtype: torch.dtype) -> dict[str, Any]:
    """How the parameters of a model are made, passed down to every module."""
    return {"device": None if device is None else torch.device(device), "dtype": dtype}
