"""Low-rank adapters of projections (LoRA, Hu et al. 2021).

Owns the factors A and B of a slice of a projection's output and what they add. A projection is any module whose
`weight` keeps its logical dims `[(expert,) *out_shape, in_size]`; layouts shard A with its input and B with its output.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Generic, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from cordee.model.config import LowRankConfig, ModelConfig, slice_of
from cordee.model.parameter import P, SpecifiedModule, local_shard, parameter_specs
from cordee.model.placement import Placement, View, unchanged
from cordee.model.specs import ParameterSpec, Specs, low_rank, marked
from cordee.ops.quantise import Quantised

Multiply = Callable[[Tensor, Tensor], Tensor]  # x `[..., in]` and W `[(expert,) out, in]` to `[..., out]`


class Drop(Protocol):
    """As `Context.drop` of `cordee.model.inputs`."""

    def __call__(self, x: Tensor, rate: float, /, *site: str | int, first: int = 0) -> Tensor: ...


@dataclass(eq=False, kw_only=True)
class LowRankPlacement(Placement):
    """`sum_over_parts` adds what processes have found of the parts of a row."""

    sum_over_parts: View = unchanged


class LowRank(SpecifiedModule[LowRankPlacement]):
    """scale * B A dropout(x) with A `[(expert,) rank, in_size]` and B `[(expert,) *shape of the slice, rank]`; of DoRA
    also the lengths M of rows, `[*shape of the slice]`."""

    a: Tensor
    b: Tensor
    m: Tensor | None

    def __init__(self, config: LowRankConfig, weight: ParameterSpec, path: str, name: str, **factory):
        super().__init__(LowRankPlacement())
        self.config = config
        self.site = f"{path}.{name}"
        self.stacked = weight.axes[0] == "expert"
        self.region = [slice(None)] * (len(weight.axes) - 1 - self.stacked)
        if (cut := slice_of(path, name)) is not None:
            self.region[cut.dim] = slice(cut.start, cut.stop)
        self.declare(low_rank(config, weight, path, name), "a", "b", "m", **factory)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A `[(expert,) rank, in]` and B `[(expert,) out, rank]`, as this process computes with them."""
        return self.local("a"), self.local("b").flatten(1 if self.stacked else 0, -2)

    def dropped(self, x: Tensor, drop: Drop | None) -> Tensor:
        if drop is None or not self.config.dropout:
            return x
        _, (*_, first) = local_shard(self.a)
        return drop(x, self.config.dropout, self.site, first=first)

    def add_to(self, whole: Tensor, part: Tensor) -> None:
        """Add scale * part `[..., out of the slice]` to the slice of `whole` `[..., *out_shape]`."""
        region = whole[(..., *self.region)]
        region.add_(part.view_as(region), alpha=self.config.scale)

    def extra_repr(self) -> str:
        return f"rank={self.config.rank}, scale={self.config.scale}"


class _Sum(Function):
    """y `[..., out]` plus what an adapter finds `[..., out of the slice]`, in the memory of y: autograd's own sum with
    a slice would copy all of the gradient for each."""

    @staticmethod
    def forward(ctx, y: Tensor, part: Tensor, adapter: LowRank, out: tuple[int, ...]) -> Tensor:
        ctx.adapter, ctx.out = adapter, out
        ctx.mark_dirty(y)
        adapter.add_to(y.unflatten(-1, out), part)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        own = grad.unflatten(-1, ctx.out)[(..., *ctx.adapter.region)]
        return grad, ctx.adapter.config.scale * own.flatten(grad.dim() - 1), None, None


class Projection(SpecifiedModule[P], Generic[P]):
    """A weight, perhaps with a bias, whose slices may have low-rank adapters."""

    weight: Tensor
    bias: Tensor | None
    quantised: Quantised | None = None  # what there is of `weight`, which then has no values

    def __init__(self, placement: P, specs: Specs, **factory):
        super().__init__(placement)
        self.declare(specs, "weight", "bias", **factory)
        self.stacked = int("weight" in specs and specs["weight"].axes[0] == "expert")
        self.adapters: nn.ModuleDict | None = None  # LowRank by slice; a projection without has no module for it

    def adapt(self, config: LowRankConfig, path: str, name: str, **factory) -> None:
        """Add an adapter to slice `name` of this projection, whose canonical name is `path`."""
        if self.adapters is None:
            self.adapters = nn.ModuleDict()
        self.adapters[name] = LowRank(config, self.specs["weight"], path, name, **factory)

    def low_ranks(self) -> list[LowRank]:
        return [] if self.adapters is None else [each for each in self.adapters.values() if isinstance(each, LowRank)]

    def kept(self) -> Tensor:
        """The weight as this process keeps it, its values too if it is quantised."""
        if self.quantised is None:
            return self.weight
        own, like = self.quantised.dequantised(), self.weight
        if isinstance(like, DTensor):
            own = DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
        return own

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight that this process computes with."""
        return self.placement.view("weight")(self.kept()).to(dtype)

    def with_adapters(self, y: Tensor, x: Tensor, multiply: Multiply, drop: Drop | None = None) -> Tensor:
        """y `[..., out]`, the product with x `[..., in]`, plus the adapters of x; `multiply` is by a matrix."""
        if self.adapters is None:
            return y
        out = self.local("weight").shape[self.stacked : -1]
        for adapter in self.low_ranks():
            a, b = adapter.factors()
            y = _Sum.apply(y, multiply(multiply(adapter.dropped(x, drop), a), b), adapter, out)
        if not any(adapter.config.dora for adapter in self.low_ranks()):
            return y
        bias = self.local("bias")
        bias = 0.0 if bias is None else bias.flatten()
        return (y - bias) * self._stretch(self._sum(self.dequantised(y.dtype))).flatten() + bias

    def extra_repr(self) -> str:
        spec = self.specs.get("weight")
        sizes = zip(spec.axes, spec.shape, strict=True) if spec else ()  # a reward model's head has none
        return ", ".join(f"{axis}={size}" for axis, size in sizes)

    def merged(self, weight: Tensor) -> Tensor:
        """`weight` `[*out_shape, in]` with the adapters in it, for what is no plain product; one without dropout."""
        if self.adapters is None:
            return weight
        total = self._sum(weight)
        return total * self._stretch(total)[..., None] if any(a.config.dora for a in self.low_ranks()) else total

    def _sum(self, weight: Tensor) -> Tensor:
        """`weight` with the products of the adapters added to it."""
        delta = torch.zeros_like(weight)
        for adapter in self.low_ranks():
            a, b = adapter.factors()
            adapter.add_to(delta.movedim(-1, 0), a.t() @ b.t())
        return weight + delta

    def _stretch(self, total: Tensor) -> Tensor:
        """What DoRA multiplies the rows of such a sum by, `[*out_shape]`; their own lengths have no gradient."""
        squares, stretch = total.detach().float().square().sum(-1), total.new_ones(total.shape[:-1])
        for adapter in self.low_ranks():
            if (m := adapter.local("m")) is not None:
                norm = adapter.placement.sum_over_parts(squares).sqrt()[tuple(adapter.region)].to(m.dtype)
                stretch[tuple(adapter.region)] = torch.where(norm > 0, m / norm.clamp(min=1e-30), 1)  # as m is rounded
        return stretch


def quantised(model: nn.Module) -> dict[str, Projection]:
    """The projections with quantised weights, by the names of these."""
    return {f"{path}.weight": m for path, m in model.named_modules() if isinstance(m, Projection) and m.quantised}


def add_low_rank(model: nn.Module, config: ModelConfig, foreign: Collection[str], **factory) -> None:
    """Put the low-rank adapters of `config` on the projections that `model` has, those named in `foreign` left out, and
    mark how the others are trained."""
    modules = dict(model.named_modules())
    for path, name, chosen in config.adapted():
        if path not in foreign and isinstance(module := modules.get(path), Projection):
            module.adapt(chosen, path, name, **factory)
    for path, module in modules.items():
        if isinstance(module, SpecifiedModule):
            module.specs = marked(module.specs, config, path)
    for name, spec in parameter_specs(model).items():
        model.get_parameter(name).requires_grad_(spec.trained)
