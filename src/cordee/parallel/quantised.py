"""A base in few bits, while adapters or a prefix beside it are trained (QLoRA, Dettmers et al. 2023).

Option and law: `tune/options.py`. Cost: `cost.py`. Owns products with weights without memory: each use, in the backward
too, dequantises the codes (`ops/quantise.py`) of this rank's shard, which every data-parallel rank has whole."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cordee.model.gpt import GPTModel
from cordee.model.low_rank import Multiply, Projection
from cordee.ops.quantise import Quantised
from cordee.parallel.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class QuantisedBase(Wrapper):
    """In place of products, not around calls: the GEMMs of layers that are not trained as a whole."""

    name: str = "a quantised base"
    around: Any = None
    splits_backward: bool = True
    kind: str

    def apply(self, model: GPTModel, *_: Any) -> None:
        for path in model.config.gemms() & dict(model.named_modules()).keys():
            module: Any = model.get_submodule(path)
            if module.specs["weight"].origin == "base":
                module.quantised = Quantised(self.kind)
                module.placement.wrap("product", self.name, partial(partial, _product, module))


def _product(module: Projection, multiply: Multiply, x: Tensor, _: Tensor, bias: Any = None, **how: Any) -> Tensor:
    y = _Product.apply(x, module, partial(multiply, **how))
    return y if bias is None else y + bias


class _Product(Function):
    """multiply(x, W) with the weight of a module, which the backward makes again."""

    @staticmethod
    def forward(ctx, x: Tensor, module: Projection, multiply: Multiply) -> Tensor:
        ctx.module, ctx.multiply = module, multiply
        return multiply(x, module.dequantised(x.dtype).flatten(module.stacked, -2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return ctx.multiply(grad, ctx.module.dequantised(grad.dtype).flatten(ctx.module.stacked, -2).mT), None, None
