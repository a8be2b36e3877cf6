"""Collectives outside the model.

Owns the few collectives of the training loop, gradient norms over a pipeline, and the messages of pipelines. Those
within a forward and backward are `differentiable.py`'s, and `overlap.py`'s where they run under GEMMs: no other file
communicates through torch.distributed. Alone in one process every function returns its own value."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cordee import launch
from cordee.errors import Findings, Problem, ProblemError, RankLostError
from cordee.optim import clip
from cordee.parallel.degrees import SUM_AXES
from cordee.parallel.layout import Layout

T = TypeVar("T")


def sum_over(values: Tensor, layout: Layout, axes: tuple[str, ...] = SUM_AXES) -> Tensor:
    """Sum of `values`, any shape, over the ranks along `axes`; the given tensor is overwritten."""
    for group in layout.groups(axes):
        dist.all_reduce(values, group=group)
    return values


def global_norm(tensors: Sequence[Tensor], layout: Layout, device: torch.device) -> float:
    """L2 norm over all elements of the `tensors` of all pipeline ranks; NaN or inf where one of them is not finite."""
    norm = clip.global_norm(tensors) if tensors else torch.zeros((), device=device)
    if layout.degrees.pp == 1:
        return norm.item()
    return sum_over(norm.square(), layout, ("pp",)).sqrt().item()


def count_zeros(tensors: Sequence[Tensor], layout: Layout, device: torch.device) -> int:
    """How many elements of the `tensors` of all pipeline ranks are exactly 0."""
    count = clip.count_zeros(tensors) if tensors else torch.zeros((), dtype=torch.int64, device=device)
    return int(sum_over(count, layout, ("pp",)))


def send(tensor: Tensor, to: int, group: ProcessGroup) -> dist.Work:
    """Start to send `tensor` to that rank of `group`; the tensor must not change until then."""
    work = dist.isend(tensor, group=group, group_dst=to)
    assert work is not None, "this rank is in the group"
    return work


def receive(into: Tensor, source: int, group: ProcessGroup) -> dist.Work:
    """Start to fill `into` from that rank of `group`. Messages arrive in the order they were sent."""
    work = dist.irecv(into, group=group, group_src=source)
    assert work is not None, "this rank is in the group"
    return work


def broadcast(tensor: Tensor, source: int, group: ProcessGroup | None = None) -> Tensor:
    """`tensor` of rank `source` of `group` (None: all) on every rank; others' are overwritten."""
    tensor = tensor.contiguous()
    dist.broadcast(tensor, group=group, group_src=source)
    return tensor


def sum_numbers(numbers: Sequence[float], layout: Layout) -> list[float]:
    """Sums over all ranks of numbers on the host, of integers exact up to 2^53; no wait for the device."""
    if layout.control is None:
        return list(numbers)
    values = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(values, group=layout.control)
    return values.tolist()


def gather(value: Any, layout: Layout) -> list[Any]:
    """The picklable `value` of every rank, in order, on every rank."""
    return gather_in(layout.control, value)


def gather_in(group: ProcessGroup | None, value: Any) -> list[Any]:
    """The picklable `value` of every rank of `group`, in order, on each of them."""
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(value: Any, layout: Layout) -> Any:
    """The picklable `value` of rank 0 on every rank."""
    if layout.control is None:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=layout.control)
    return values[0]


def raise_together(problems: Iterable[Problem], group: ProcessGroup | None) -> None:
    """Raise `ProblemError` on every rank of `group` if any has problems, with those of all, each once."""
    if found := dict.fromkeys(problem for part in gather_in(group, list(problems)) for problem in part):
        raise ProblemError(found, everywhere=True)


def together(function: Callable[[], T], group: ProcessGroup | None) -> T:
    """What `function` returns on this rank; ProblemError on all ranks of `group` with the problems of any."""
    found = Findings()
    result = found.attempt(function)
    raise_together(found.problems, group)
    return cast(T, result)


@contextmanager
def contact(phase: str) -> Iterator[None]:
    """Raise `RankLostError`, naming this rank and `phase` ("in step 7"), where torch cannot reach other ranks.

    Phases may be nested: the innermost is named."""
    try:
        yield
    except RuntimeError as error:
        # gloo has no error type of its own, but names the file of its own in which it failed.
        if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
            raise
        rank = dist.get_rank() if dist.is_initialized() else launch.rank_info().rank
        why = f"it lost the other ranks {phase}: {_first_sentence(str(error))}"
        fix = "find the rank that failed first, which the launcher names; then resume from the last checkpoint: --load"
        raise RankLostError([Problem(f"rank {rank}", None, why, fix, "lost", limit=phase)]) from error


def _first_sentence(text: str) -> str:
    """Without the file that gloo puts before the text and the advice after it."""
    line = text.strip().partition("\n")[0]
    if line.startswith("["):
        line = line.partition("] ")[2]
    return line.partition(". ")[0]
