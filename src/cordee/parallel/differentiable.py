"""Collectives within the model: what goes forward, and what its gradient does on the way back.

Owns the pairs. `x` is local to this rank; `group` is the group of an axis. For a sum over ranks F of functions of
parts, the backward of "every rank gets the same" is "the gradients of all ranks are added up", and the other way
round; whether an operand's gradient is whole or a part on each rank is said with each function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup


def copied(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, the same on all ranks, into work that differs between them: its gradient is the sum of theirs."""
    return _Copied.apply(x, group)


def summed(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' x, for work that is the same on all of them: the gradient is passed on as it is."""
    return _Summed.apply(x, group)


def summed_for_parts(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' x, for work that differs between them: the gradient is the sum of theirs, too."""
    return _SummedForParts.apply(x, group)


def gathered(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The parts of all ranks joined along `dim`, for work that differs between them: a part gets the sum of its
    gradients. All parts have one shape.
    """
    return _Gathered.apply(x, group, dim)


def gathered_for_same(x: Tensor, group: ProcessGroup, dim: int, sizes: Sequence[int]) -> Tensor:
    """The parts of all ranks joined along `dim`, for work that is the same on all of them: a part gets its own part of
    the gradient. `sizes` are those of the parts along `dim`.
    """
    return _GatheredForSame.apply(x, group, dim, sizes)


def scattered_sum(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' x: the gradient is joined again."""
    return _ScatteredSum.apply(x, group, dim)


def own_part(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's part along `dim` of x, the same on all ranks. x gets the gradient of that part only, zeros elsewhere:
    its gradient is a part of the whole on each rank.
    """
    size = x.shape[dim] // dist.get_world_size(group)
    return x.narrow(dim, dist.get_rank(group) * size, size)


def gathered_together(xs: Sequence[Tensor], group: ProcessGroup, *, at_once: bool) -> tuple[Tensor, ...]:
    """Of each x the parts of all ranks, of one shape, joined along the first dim; gradients as of `gathered`.

    `at_once`: all of them are under way together. Those of whole numbers have no gradient.
    """
    return _GatheredTogether.apply(group, at_once, *xs)


def exchanged(
    xs: Sequence[Tensor], group: ProcessGroup, sent: list[int], received: list[int], *, at_once: bool
) -> tuple[Tensor, ...]:
    """Rows of each x to the rank they are for: the first `sent[0]` to rank 0 and so on; back come `received[0]` from
    rank 0 and so on. Gradients go the way back. `at_once`: all of them are under way together.
    """
    return _Exchanged.apply(group, sent, received, at_once, *xs)


def redivided(x: Tensor, group: ProcessGroup, split: int, joined: int) -> Tensor:
    """Of x, divided along the dim `split`, every rank gets its part from all ranks, joined along `joined`: what was
    whole along one dim and a part along the other becomes the reverse. The gradient takes the way back.
    """
    return _Redivided.apply(x, group, split, joined)


# ---- the collectives, without gradients ------------------------------------------------------------------------------


def sum_all(x: Tensor, group: ProcessGroup) -> Tensor:
    """A new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def largest(x: Tensor, group: ProcessGroup) -> Tensor:
    """The largest of all ranks' x, element by element; a new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x


def join(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The parts of all ranks, of one shape, joined along `dim`."""
    size = dist.get_world_size(group)
    parts = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_single(parts, x.contiguous(), group=group)
    return parts if dim % x.ndim == 0 else torch.cat(parts.chunk(size), dim)


def join_uneven(x: Tensor, group: ProcessGroup, dim: int, sizes: Sequence[int]) -> Tensor:
    """The parts of all ranks, of `sizes` along `dim`, joined along it."""
    if len(set(sizes)) == 1:
        return join(x, group, dim)
    longest = max(sizes)
    missing = list(x.shape)
    missing[dim] = longest - x.shape[dim]
    parts = join(torch.cat((x, x.new_zeros(missing)), dim), group, 0).chunk(len(sizes))
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)


def sum_parts(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' x."""
    size = dist.get_world_size(group)
    x = x.contiguous() if dim % x.ndim == 0 else torch.cat(x.chunk(size, dim))
    part = x.new_empty(x.shape[0] // size, *x.shape[1:])
    dist.reduce_scatter_single(part, x, group=group)
    return part


def join_together(xs: Sequence[Tensor], group: ProcessGroup, *, at_once: bool) -> list[Tensor]:
    """Of each x the parts of all ranks, of one shape, joined along the first dim."""
    size = dist.get_world_size(group)
    xs = [x.contiguous() for x in xs]
    ys = [x.new_empty(size * x.shape[0], *x.shape[1:]) for x in xs]
    _run([partial(dist.all_gather_single, y, x, group=group) for x, y in zip(xs, ys, strict=True)], at_once)
    return ys


def sum_parts_together(xs: Sequence[Tensor], group: ProcessGroup, *, at_once: bool) -> list[Tensor]:
    """Of each x this rank's part along the first dim of the sum of all ranks' x."""
    size = dist.get_world_size(group)
    xs = [x.contiguous() for x in xs]
    ys = [x.new_empty(x.shape[0] // size, *x.shape[1:]) for x in xs]
    _run([partial(dist.reduce_scatter_single, y, x, group=group) for x, y in zip(xs, ys, strict=True)], at_once)
    return ys


def exchange(
    xs: Sequence[Tensor], group: ProcessGroup, sent: list[int], received: list[int], *, at_once: bool
) -> list[Tensor]:
    """As `exchanged`."""
    xs = [x.contiguous() for x in xs]
    ys = [x.new_empty(sum(received), *x.shape[1:]) for x in xs]
    send = partial(dist.all_to_all_single, output_split_sizes=received, input_split_sizes=sent, group=group)
    _run([partial(send, y, x) for x, y in zip(xs, ys, strict=True)], at_once)
    return ys


def begin_exchange(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Callable[[], object]]:
    """Equal parts of x along the first dim, one for each rank: those for this rank, once what is returned beside them
    has been called.
    """
    x = x.contiguous()
    y = torch.empty_like(x)
    work = dist.all_to_all_single(y, x, group=group, async_op=True)
    assert work is not None
    return y, work.wait


def _run(collectives: Sequence[Callable[..., dist.Work | None]], at_once: bool) -> None:
    """One after the other, or all started before the first is waited for."""
    for work in [collective(async_op=at_once) for collective in collectives]:
        if work is not None:
            work.wait()


def redivide(x: Tensor, group: ProcessGroup, split: int, joined: int) -> Tensor:
    """As `redivided`, for dims counted from 0."""
    size = dist.get_world_size(group)
    parts = x.unflatten(split, (size, -1)).movedim(split, 0).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.movedim(0, joined).flatten(joined, joined + 1)


class Transfer:
    """A tensor on its way, which may be waited for later."""

    def __init__(self, works: list[dist.Work], sent: Tensor, received: Tensor):
        self._works = works
        self._sent = sent  # must outlive the sending
        self._received = received

    def wait(self) -> Tensor:
        """What has come in."""
        while self._works:
            self._works.pop().wait()
        return self._received


def hand_on(x: Tensor, group: ProcessGroup, to: int, source: int, tag: int = 0) -> Transfer:
    """Send x to rank `to` of `group`, and receive its like from rank `source`; all ranks do so at once."""
    x = x.contiguous()
    received = torch.empty_like(x)
    send = dist.P2POp(dist.isend, x, group=group, group_peer=to, tag=tag)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=source, tag=tag)
    return Transfer(dist.batch_isend_irecv([send, receive]), x, received)


# ---- with gradients --------------------------------------------------------------------------------------------------


class _Copied(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return sum_all(grad, ctx.group), None


class _Summed(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        return sum_all(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


class _SummedForParts(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return sum_all(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return sum_all(grad, ctx.group), None


class _Gathered(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return join(x, group, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return sum_parts(grad, ctx.group, ctx.dim), None, None


class _GatheredForSame(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup, dim: int, sizes: Sequence[int]) -> Tensor:
        ctx.dim, ctx.sizes, ctx.rank = dim, list(sizes), dist.get_rank(group)
        return join_uneven(x, group, dim, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.split(ctx.sizes, ctx.dim)[ctx.rank], None, None, None


class _ScatteredSum(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return sum_parts(x, group, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return join(grad, ctx.group, ctx.dim), None, None


class _GatheredTogether(Function):
    @staticmethod
    def forward(ctx, group: ProcessGroup, at_once: bool, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.at_once = group, at_once
        ys = join_together(xs, group, at_once=at_once)
        ctx.mark_non_differentiable(*[y for y in ys if not y.is_floating_point()])
        return tuple(ys)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, None, *_of_needed(ctx, grads, partial(sum_parts_together, group=ctx.group, at_once=ctx.at_once))


class _Exchanged(Function):
    @staticmethod
    def forward(
        ctx, group: ProcessGroup, sent: list[int], received: list[int], at_once: bool, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.sent, ctx.received, ctx.at_once = group, sent, received, at_once
        return tuple(exchange(xs, group, sent, received, at_once=at_once))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        back = partial(exchange, group=ctx.group, sent=ctx.received, received=ctx.sent, at_once=ctx.at_once)
        return None, None, None, None, *_of_needed(ctx, grads, back)


def _of_needed(ctx, grads: Sequence[Tensor], back: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor | None]:
    """What `back` makes of the gradients of those last operands that need one, the same ones on all ranks."""
    needed = ctx.needs_input_grad[-len(grads) :]
    made = iter(back([grad for grad, need in zip(grads, needed, strict=True) if need]))
    return [next(made) if need else None for need in needed]


class _Redivided(Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: ProcessGroup, split: int, joined: int) -> Tensor:
        ctx.way = group, joined, split
        return redivide(x, group, split, joined)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return redivide(grad, *ctx.way), None, None, None
