"""Norms over the last dim, computed in float32 whatever the dtype of the input."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.device import KINDS
from cordee.model import specs
from cordee.model.bound import BoundNorm, require_known, require_plain
from cordee.model.config import NormConfig
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import Placement, View


@dataclass(eq=False, kw_only=True)
class NormPlacement(Placement):
    """`sum_over_parts` adds up over the processes that hold the other parts of the last dim, where there are some."""

    sum_over_parts: View | None = None


class Norm(SpecifiedModule[NormPlacement]):
    """x / rms(x) * weight, or (x - mean) / std * weight + bias."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, config: NormConfig, size: int, axis: str = "embed", **factory):
        super().__init__(NormPlacement())
        self.config = config
        self.size = size
        self.declare(specs.norm(config, size, axis), "weight", "bias", **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.unit_offset and self.weight is not None:
            # In float32: next to the one, a low precision would lose a small weight.
            bias = None if self.bias is None else self.local("bias").float()
            return self._normalise(x.float(), self.local("weight").float() + 1.0, bias).to(x.dtype)
        return self._normalise(x, self.local("weight"), self.local("bias"))

    def bind(self) -> BoundNorm:
        require_known(self.config, "kind eps")
        require_plain(self, Norm, "weight bias")
        assert self.weight is not None
        weight, eps = self.weight.detach(), self.config.eps
        if self.config.kind == "layer" or KINDS[weight.device.type].fused_rms_norm or weight.dtype != torch.float32:
            return self
        # Where torch's RMS norm is a series of operators, this is a shorter one: x / sqrt(x.x / n + eps) is the same as
        # x sqrt(n) / hypot(|x|, sqrt(n eps)).
        scaled, least = weight * math.sqrt(self.size), torch.tensor(math.sqrt(self.size * eps))
        return lambda x: (x * scaled).div_(torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), least))

    def _normalise(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        if (total := self.placement.sum_over_parts) is not None:
            return self._normalise_part(x, total, weight, bias)
        if self.config.kind == "layer":
            return F.layer_norm(x, (self.size,), weight, bias, self.config.eps)
        return F.rms_norm(x, (self.size,), weight, self.config.eps)

    def _normalise_part(self, x: Tensor, total: View, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """As `_normalise`, of the part of the last dim that is here; `total` adds sums over all parts up."""
        wide = x.float()
        if self.config.kind == "layer":
            wide = wide - total(wide.sum(-1, keepdim=True)) / self.size
        variance = total(wide.square().sum(-1, keepdim=True)) / self.size
        y = (wide * torch.rsqrt(variance + self.config.eps)).to(x.dtype)
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        return f"{self.config.kind}, {self.size}, eps={self.config.eps}"
