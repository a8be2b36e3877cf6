"""Collectives within the model, each named by its forward and its backward.

Owns the pairs. `x` is local to this rank; `group` is the group of an axis. Where ranks compute parts of a sum, the
backward of "every rank gets the same" is "the gradients of all ranks are summed", and the reverse; each function says
whether an operand's gradient is whole or a part on each rank."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup

Collective = Callable[[Tensor], Tensor]
Collectives = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def identity_fwd_all_reduce_bwd(x: Tensor, group: ProcessGroup) -> Tensor:
    """x, the same on all ranks, into work that differs between them: its gradient is the sum of theirs."""
    return _Pair.apply(x, _view, partial(all_reduce, group=group))


def all_reduce_fwd_identity_bwd(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' x, for work that is the same on all of them: the gradient is passed on as it is."""
    return _Pair.apply(x, partial(all_reduce, group=group), _view)


def all_reduce_fwd_all_reduce_bwd(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of all ranks' x, for work that differs between them: the gradient is the sum of theirs, too."""
    return _Pair.apply(x, partial(all_reduce, group=group), partial(all_reduce, group=group))


def all_gather_fwd_reduce_scatter_bwd(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The shards of all ranks, of one shape, joined along `dim`, for work that differs between them: the gradient of a
    shard is the sum over ranks."""
    return _Pair.apply(x, partial(all_gather, group=group, dim=dim), partial(reduce_scatter, group=group, dim=dim))


def reduce_scatter_fwd_all_gather_bwd(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's shard along `dim` of the sum of all ranks' x: the gradient is gathered."""
    return _Pair.apply(x, partial(reduce_scatter, group=group, dim=dim), partial(all_gather, group=group, dim=dim))


def all_gather_fwd_split_bwd(x: Tensor, group: ProcessGroup, dim: int, sizes: Sequence[int]) -> Tensor:
    """The shards of all ranks joined along `dim`, for work that is the same on all of them: the gradient of a shard is
    its own shard of the gradient. `sizes` are those of the shards along `dim`."""

    def own(grad: Tensor) -> Tensor:
        return grad.split(list(sizes), dim)[dist.get_rank(group)]

    return _Pair.apply(x, partial(all_gather_uneven, group=group, dim=dim, sizes=sizes), own)


def all_to_all_fwd_bwd(x: Tensor, group: ProcessGroup, split: int, joined: int) -> Tensor:
    """All-to-all: x, whole along `split` and a shard along `joined`, becomes the reverse; so does its gradient."""
    there, back = (partial(all_to_all, group=group, split=a, joined=b) for a, b in ((split, joined), (joined, split)))
    return _Pair.apply(x, there, back)


def split_fwd_pad_bwd(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's shard along `dim` of x, the same on all ranks. The gradient of x is zero outside of the shard: a part
    of the whole on each rank."""
    size = x.shape[dim] // dist.get_world_size(group)
    return x.narrow(dim, dist.get_rank(group) * size, size)


def all_gather_together_fwd_reduce_scatter_bwd(
    xs: Sequence[Tensor], group: ProcessGroup, *, at_once: bool
) -> tuple[Tensor, ...]:
    """As `all_gather_fwd_reduce_scatter_bwd` along the first dim, of each x. Integers have no gradient.

    `at_once`: all of them are in flight together."""
    size = dist.get_world_size(group)
    gather = partial(dist.all_gather_single, group=group), lambda rows: rows * size
    scatter = partial(dist.reduce_scatter_single, group=group), lambda rows: rows // size
    return _Pairs.apply(partial(_each, *gather, at_once), partial(_each, *scatter, at_once), *xs)


def all_to_all_rows_fwd_bwd(
    xs: Sequence[Tensor], group: ProcessGroup, sent: list[int], received: list[int], *, at_once: bool
) -> tuple[Tensor, ...]:
    """Of each x the first `sent[0]` rows to rank 0 and so on; the result has `received[0]` rows from rank 0 and so on.
    Gradients go back likewise. `at_once`: all of them are in flight together."""

    def exchange(sent: list[int], received: list[int]) -> Collectives:
        splits = {"output_split_sizes": received, "input_split_sizes": sent}
        collective = partial(dist.all_to_all_single, **splits, group=group)
        return partial(_each, collective, lambda rows: sum(received), at_once)

    return _Pairs.apply(exchange(sent, received), exchange(received, sent), *xs)


def _view(x: Tensor) -> Tensor:
    return x.view_as(x)


class _Pair(Function):
    """`forward(x)`, whose gradient is `backward(grad)`."""

    @staticmethod
    def forward(ctx, x: Tensor, forward: Collective, backward: Collective) -> Tensor:
        ctx.back = backward
        return forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.back(grad), None, None


class _Pairs(Function):
    """`forward(xs)`, whose gradients are `backward(grads)` of those x that need one, the same ones on all ranks."""

    @staticmethod
    def forward(ctx, forward: Collectives, backward: Collectives, *xs: Tensor) -> tuple[Tensor, ...]:
        ctx.back = backward
        ys = tuple(forward(xs))
        ctx.mark_non_differentiable(*[y for y in ys if not y.is_floating_point()])
        return ys

    @staticmethod
    def backward(ctx, *grads: Tensor):
        needed = ctx.needs_input_grad[2:]
        made = iter(ctx.back([grad for grad, need in zip(grads, needed, strict=True) if need]))
        return None, None, *(next(made) if need else None for need in needed)


def all_reduce(x: Tensor, group: ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """A new tensor."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, op, group=group)
    return x


def all_reduce_max(x: Tensor, group: ProcessGroup) -> Tensor:
    """The largest of all ranks' x, element by element; a new tensor."""
    return all_reduce(x, group, dist.ReduceOp.MAX)


def all_gather(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """The parts of all ranks, of one shape, joined along `dim`."""
    size = dist.get_world_size(group)
    parts = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_single(parts, x.contiguous(), group=group)
    return parts if dim % x.ndim == 0 else torch.cat(parts.chunk(size), dim)


def all_gather_uneven(x: Tensor, group: ProcessGroup, dim: int, sizes: Sequence[int]) -> Tensor:
    """The parts of all ranks, of `sizes` along `dim`, joined along it."""
    if len(set(sizes)) == 1:
        return all_gather(x, group, dim)
    longest = max(sizes)
    missing = list(x.shape)
    missing[dim] = longest - x.shape[dim]
    parts = all_gather(torch.cat((x, x.new_zeros(missing)), dim), group, 0).chunk(len(sizes))
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)


def reduce_scatter(x: Tensor, group: ProcessGroup, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' x."""
    size = dist.get_world_size(group)
    x = x.contiguous() if dim % x.ndim == 0 else torch.cat(x.chunk(size, dim))
    part = x.new_empty(x.shape[0] // size, *x.shape[1:])
    dist.reduce_scatter_single(part, x, group=group)
    return part


def begin_all_to_all(x: Tensor, group: ProcessGroup) -> tuple[Tensor, Callable[[], object]]:
    """Start an all-to-all of equal parts of x along the first dim; the result is valid after a call of the second."""
    x = x.contiguous()
    y = torch.empty_like(x)
    work = dist.all_to_all_single(y, x, group=group, async_op=True)
    assert work is not None
    return y, work.wait


def _each(
    collective: Callable[..., dist.Work | None], rows: Callable[[int], int], at_once: bool, xs: Sequence[Tensor]
) -> list[Tensor]:
    """`collective(result, x)` of each x, one after the other or all in flight; `rows` are a result's, by those of x."""
    xs = [x.contiguous() for x in xs]
    ys = [x.new_empty(rows(len(x)), *x.shape[1:]) for x in xs]
    for work in [collective(y, x, async_op=at_once) for x, y in zip(xs, ys, strict=True)]:
        if work is not None:
            work.wait()
    return ys


def all_to_all(x: Tensor, group: ProcessGroup, split: int, joined: int) -> Tensor:
    """As `all_to_all_fwd_bwd`, for dims counted from 0."""
    parts = x.unflatten(split, (dist.get_world_size(group), -1)).movedim(split, 0).contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.movedim(0, joined).flatten(joined, joined + 1)


class Transfer:
    """A tensor in flight."""

    def __init__(self, works: list[dist.Work], sent: Tensor, received: Tensor):
        self._works = works
        self._sent = sent  # must outlive the sending
        self._received = received

    def wait(self) -> Tensor:
        """The received tensor, once it is complete."""
        while self._works:
            self._works.pop().wait()
        return self._received


def send_receive(x: Tensor, group: ProcessGroup, to: int, source: int, tag: int = 0) -> Transfer:
    """Send x to rank `to` of `group`, and receive its like from rank `source`; all ranks do so at once."""
    x = x.contiguous()
    received = torch.empty_like(x)
    send = dist.P2POp(dist.isend, x, group=group, group_peer=to, tag=tag)
    receive = dist.P2POp(dist.irecv, received, group=group, group_peer=source, tag=tag)
    return Transfer(dist.batch_isend_irecv([send, receive]), x, received)
