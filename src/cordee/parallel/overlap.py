"""Tensor parallelism whose collectives overlap its GEMMs (what Ascend calls MC2 and CoC).

Options: `--tp-comm-overlap`, `--tp-comm-overlap-parts` (options.py). Law: `laws.overlap`. Cost: one more part of
the activations in flight. Owns GEMMs in parts: while the collective of one part is in flight, the next part is
computed. They replace `tensor.py`'s borders and the plain GEMM where one GEMM enters a block or leaves it, and equal
both."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from cordee.model.attention import Attention
from cordee.model.gpt import GPTModel
from cordee.model.linear import Linear
from cordee.model.mlp import MLP
from cordee.model.placement import unchanged
from cordee.ops.gemm import linear, matmul, transposed_matmul
from cordee.parallel import tensor
from cordee.parallel.layout import Layout
from cordee.parallel.options import ParallelOptions

NAME = "communication overlap"
Before = Callable[[Tensor], Tensor]
GEMM = Callable[[Tensor], Tensor]


def apply(model: GPTModel, layout: Layout, options: ParallelOptions) -> None:
    """Move the collectives of attention and MLPs of a `model` that `tensor.apply` has prepared into their GEMMs.

    A GEMM is cut along the tokens, into fewer parts where these are too few. MoE and latent attention use what enters a
    block more than once: there only what leaves it is overlapped."""
    group, num_parts = layout.group("tp"), options.tp_comm_overlap_parts
    if group is None or not options.tp_comm_overlap or num_parts == 1:
        return
    exchange = _Exchange(group, num_parts, options.sequence_parallel)
    for layer in model.own_layers():
        for block in (layer.attention, layer.mlp):
            enters, leaves = _products(block)
            for border, product, function in (("enter", enters, exchange.enter), ("exit", leaves, exchange.leave)):
                if product is not None:
                    product.placement.replace("product", NAME, function, final=True, compiles=True)
                    block.placement.replace(border, NAME, unchanged, instead_of=tensor.NAME, final=True, compiles=True)


def _products(block: object) -> tuple[Linear | None, Linear | None]:
    """The one GEMM of what enters a block, and the one whose result leaves it."""
    if isinstance(block, Attention):
        return block.qkv, block.out
    if isinstance(block, MLP):
        return (block.gate_up if block.config.gated else block.up), block.down
    return None, getattr(block, "out", None)


@dataclass(frozen=True)
class _Exchange:
    """How tokens are cut into parts and communicated. `sequence`: outside of blocks ranks have different tokens.

    Then part i of a sequence `[batch, seq, ...]` is the i-th part of each rank's shard outside."""

    group: ProcessGroup
    num_parts: int
    sequence: bool

    def enter(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, before: Before | None = None) -> Tensor:
        """The GEMM of what enters a block."""
        assert before is None, "no function is between a border and the GEMM behind it"
        return _ColumnParallelLinear.apply(x, weight, bias, self)

    def leave(self, x: Tensor, weight: Tensor, bias: Tensor | None, *, before: Before | None = None) -> Tensor:
        """The GEMM whose sum over ranks leaves a block."""
        return _RowParallelLinear.apply(x if before is None else before(x), weight, bias, self)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def cut(self, whole: Tensor) -> list[Tensor]:
        """The parts of `[batch, seq, ...]`, each `[batch, seq of a part, ...]`."""
        if not self.sequence:
            return list(whole.tensor_split(min(self.num_parts, whole.shape[1]), 1))
        by_rank = whole.unflatten(1, (self.ranks, -1))
        return [part.flatten(1, 2) for part in by_rank.tensor_split(min(self.num_parts, by_rank.shape[2]), 2)]

    def joined(self, parts: list[Tensor]) -> Tensor:
        """The inverse of `cut`."""
        if self.sequence:
            return torch.cat([part.unflatten(1, (self.ranks, -1)) for part in parts], 2).flatten(1, 2)
        return torch.cat(parts, 1)

    def gathered(self, own: Tensor) -> Iterator[Tensor]:
        """The parts of the whole, of each rank's `own`; the next is in flight while one is used."""
        pending = None
        for part in [*own.tensor_split(min(self.num_parts, own.shape[1]), 1), None]:
            coming = None if part is None else _start_gather(part, self.group)
            if pending is not None:
                buffer, work = pending
                work.wait()
                yield buffer.movedim(0, 1).flatten(1, 2)  # [ranks, batch, seq, ...] to [batch, ranks * seq, ...]
            pending = coming

    def gathered_and(self, own: Tensor, gemm: GEMM) -> tuple[Tensor, Tensor]:
        """The whole of each rank's `own`, and what `gemm` makes of it, while the next part is in flight."""
        if not self.sequence:
            return own, gemm(own)
        parts, products = [], []
        for part in self.gathered(own):
            parts.append(part)
            products.append(gemm(part))
        return self.joined(parts), self.joined(products)

    def start_sum(self, whole: Tensor, gemm: GEMM) -> Callable[[], Tensor]:
        """Start to sum over ranks what `gemm` makes of `whole`, part by part; a call waits for the sum, as outside."""
        started = [_start_sum(gemm(part), self) for part in self.cut(whole)]

        def wait() -> Tensor:
            for _, work in started:
                work.wait()
            return torch.cat([buffer for buffer, _ in started], 1)

        return wait


def _start_gather(part: Tensor, group: ProcessGroup) -> tuple[Tensor, dist.Work]:
    buffer = part.new_empty(dist.get_world_size(group), *part.shape)
    work = dist.all_gather_single(buffer.flatten(0, 1), part.contiguous(), group=group, async_op=True)
    assert work is not None
    return buffer, work


def _start_sum(part: Tensor, exchange: _Exchange) -> tuple[Tensor, dist.Work]:
    """The all-reduce, in place, or with sequence parallelism the reduce-scatter of `part`."""
    if not exchange.sequence:
        part = part.contiguous()
        work = dist.all_reduce(part, group=exchange.group, async_op=True)
    else:
        by_rank = part.unflatten(1, (exchange.ranks, -1)).movedim(1, 0).contiguous()  # [ranks, batch, seq, ...]
        part = by_rank.new_empty(by_rank.shape[1:])
        work = dist.reduce_scatter_single(part, by_rank.flatten(0, 1), group=exchange.group, async_op=True)
    assert work is not None
    return part, work


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _through(grad: Tensor, weight: Tensor) -> Tensor:
    """The gradient of the input of a GEMM with `weight`."""
    return matmul(_rows(grad), weight).view(*grad.shape[:-1], weight.shape[1])


def _parameter_gradients(
    grad: Tensor, x: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Those of the weight and the bias of a GEMM of `x`."""
    weight_grad = transposed_matmul(_rows(grad), _rows(x)) if need_weight else None
    return weight_grad, _rows(grad).sum(0) if need_bias else None


class _ColumnParallelLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, exchange: _Exchange) -> Tensor:
        x, y = exchange.gathered_and(x, partial(linear, weight=weight, bias=bias))
        ctx.exchange = exchange
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, *need_parameters, _ = ctx.needs_input_grad
        wait = ctx.exchange.start_sum(grad, partial(_through, weight=weight)) if need_x else None
        of_parameters = _parameter_gradients(grad, x, *need_parameters)  # while the sums are in flight
        return None if wait is None else wait(), *of_parameters, None


class _RowParallelLinear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(x, weight)
        return exchange.start_sum(x, partial(linear, weight=weight, bias=bias))()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, *need_parameters, _ = ctx.needs_input_grad
        grad, x_grad = ctx.exchange.gathered_and(grad, partial(_through, weight=weight) if need_x else unchanged)
        return x_grad if need_x else None, *_parameter_gradients(grad, x, *need_parameters), None
