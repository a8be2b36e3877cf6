"""A rank that leaves a collective of the model out: the others say so within the time-out, on the way back too."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist

from cordee.errors import Problem, RankLostError
from cordee.parallel import collectives, differentiable
from cordee.parallel.differentiable import (
    all_gather_fwd_reduce_scatter_bwd,
    all_gather_fwd_split_bwd,
    all_reduce_fwd_all_reduce_bwd,
    all_reduce_fwd_identity_bwd,
    identity_fwd_all_reduce_bwd,
    reduce_scatter_fwd_all_gather_bwd,
)

FORWARD = [
    all_reduce_fwd_identity_bwd,
    all_reduce_fwd_all_reduce_bwd,
    partial(all_gather_fwd_reduce_scatter_bwd, dim=1),
    partial(all_gather_fwd_split_bwd, dim=1, sizes=(4, 4)),
]
BACKWARD = [
    identity_fwd_all_reduce_bwd,
    all_reduce_fwd_all_reduce_bwd,
    partial(all_gather_fwd_reduce_scatter_bwd, dim=1),
    partial(reduce_scatter_fwd_all_gather_bwd, dim=1),
]


def some(functions: list[Callable]) -> list:
    """The second and the last: each waits for its time-out. All of them with `-m exhaustive`."""
    left = [pytest.param(each, marks=pytest.mark.exhaustive) for each in (functions[0], functions[2])]
    return [functions[1], functions[3], *left]


def left_alone(rank: int, world_size: int, function: Callable, in_backward: bool) -> list[Problem]:
    group = dist.new_group(timeout=timedelta(seconds=1))
    x = torch.ones(2, 4, requires_grad=True)
    present = rank == 0 or in_backward
    found: list[Problem] = []
    with collectives.contact("in step 6"):
        y = function(x, group) if present and in_backward else None
    if rank == 0:
        with pytest.raises(RankLostError) as caught, collectives.contact("in step 7"):
            if y is None:
                function(x, group)
            else:
                (y * y).sum().backward()
        found = caught.value.problems
    dist.barrier()  # the rank that stays out is there, and its connections are open, until the other has given up
    return found


def assert_lost(found: list[list[Problem]]) -> None:
    (problem,), others = found
    assert (problem.option, problem.kind, problem.limit) == ("rank 0", "lost", "in step 7")
    assert not others


@pytest.mark.slow
@pytest.mark.parametrize("function", some(FORWARD))
def test_forward(pool, function: Callable):
    assert_lost(pool.run(left_alone, 2, function, False))


@pytest.mark.slow
@pytest.mark.parametrize("function", some(BACKWARD))
def test_backward(pool, function: Callable):
    assert_lost(pool.run(left_alone, 2, function, True))


def largest_left_alone(rank: int, world_size: int) -> list[Problem]:
    return left_alone(rank, world_size, differentiable.all_reduce_max, False)


def test_without_gradient(pool):
    assert_lost(pool.run(largest_left_alone, 2))
