"""Projections and tables: parameters with logical axes that run as one GEMM or one look-up.

Owns the seams around these. Knows not what they are part of.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.model.bound import Binding, require_plain
from cordee.model.low_rank import Adapted, Drop
from cordee.model.parameter import ParameterSpec
from cordee.model.placement import Placement, View, unchanged
from cordee.ops.gemm import fixed_linear, fixed_linear_onto, linear


class Product(Protocol):
    """As `cordee.ops.gemm.linear`."""

    def __call__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *, before: Callable[[Tensor], Tensor] | None
    ) -> Tensor: ...


@dataclass(eq=False, kw_only=True)
class LinearPlacement(Placement):
    """`product` is the GEMM."""

    product: Product = linear


class Linear(Adapted[LinearPlacement]):
    """y = x W^T + b. W keeps its logical dims `[*out_shape, in_size]` and is flattened for the GEMM only."""

    bias: Tensor | None

    def __init__(
        self,
        out_shape: tuple[int, ...],
        out_axes: tuple[str, ...],
        in_size: int,
        in_axis: str,
        *,
        bias: bool,
        std: float,
        **factory,
    ):
        super().__init__(LinearPlacement())
        self.declare("weight", ParameterSpec((*out_shape, in_size), (*out_axes, in_axis), std=std), **factory)
        self.declare("bias", ParameterSpec(out_shape, out_axes, decay=False) if bias else None, **factory)

    def forward(
        self, x: Tensor, before: Callable[[Tensor], Tensor] | None = None, *, drop: Drop | None = None
    ) -> Tensor:
        """`[..., in_size]` to `[..., product of out_shape]`; with a cheap function `before`, of before(x).

        `drop` is the dropout of adapters, in training.
        """
        if self.adapters is not None and before is not None:
            x, before = before(x), None
        bias = self.local("bias")
        bias = None if bias is None else bias.flatten()
        y = self.placement.product(x, self.local("weight").flatten(0, -2), bias, before=before)
        return self.with_adapters(y, x, linear, drop)

    def bind(self, binding: Binding) -> Callable[[Tensor], Tensor]:
        """x `[batch, in_size]` to `[batch, product of out_shape]`."""
        return fixed_linear(*self._bound_weights(), binding.rows)

    def bind_onto(self, binding: Binding) -> Callable[[Tensor, Tensor], Tensor]:
        """x and a residual to the residual with what `bind` gives added to it."""
        return fixed_linear_onto(*self._bound_weights(), binding.rows)

    def _bound_weights(self) -> tuple[Tensor, Tensor | None]:
        require_plain(self, Linear, "weight bias")
        return self.weight.detach().flatten(0, -2), None if self.bias is None else self.bias.detach().flatten()

    def extra_repr(self) -> str:
        return ", ".join(f"{axis}={size}" for axis, size in self._axes())

    def _axes(self) -> list[tuple[str, int]]:
        spec = self.specs["weight"]
        return list(zip(spec.axes, spec.shape, strict=True))


Lookup = Callable[[Tensor, Tensor], Tensor]


@dataclass(eq=False, kw_only=True)
class EmbeddingPlacement(Placement):
    """`lookup` is given the rows that are here, and `exit` what it finds."""

    lookup: Lookup = F.embedding
    exit: View = unchanged


class Embedding(Adapted[EmbeddingPlacement]):
    """A table of rows `[num_rows, hidden_size]`, looked up by index."""

    def __init__(self, num_rows: int, hidden_size: int, axis: str, std: float, **factory):
        super().__init__(EmbeddingPlacement())
        self.declare("weight", ParameterSpec((num_rows, hidden_size), (axis, "embed"), std=std), **factory)

    def forward(self, index: Tensor) -> Tensor:
        """int64 `[batch, seq]` to `[batch, seq, embed]`."""
        y = self.placement.lookup(index, self.local("weight"))
        for low_rank in self.low_ranks():
            a, b = low_rank.factors()
            y = y + low_rank.config.scale * (self.placement.lookup(index, b) @ a)
        return self.placement.exit(y)

    def bind(self) -> Tensor:
        """The table itself."""
        require_plain(self, Embedding, "weight")
        return self.weight.detach()


def scaled_std(std: float, num_layers: int) -> float:
    """Initial spread of projections that add to the residual, so that its size does not grow with depth (GPT-2)."""
    return std / math.sqrt(2.0 * num_layers)


def factory_kwargs(device: torch.device | str | None, dtype: torch.dtype) -> dict[str, Any]:
    """How the parameters of a model are made, passed down to every module."""
    return {"device": None if device is None else torch.device(device), "dtype": dtype}
