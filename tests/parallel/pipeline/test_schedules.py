"""Schedules: torch's own where it has them, complete and free of deadlock everywhere."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch.distributed.pipelining.schedules as peer

from cordee.errors import ProblemError
from cordee.parallel.pipeline.program import deadlocked
from cordee.parallel.pipeline.schedules import (
    REDUCING,
    SCHEDULES,
    Action,
    problems,
    rank_actions,
    rank_of,
    with_reduction,
)

PEERS = {
    "gpipe": peer.ScheduleGPipe,
    "1f1b": peer.Schedule1F1B,
    "interleaved": peer.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": peer.ScheduleInterleavedZeroBubble,
    "zbv": peer.ScheduleZBVZeroBubble,
    "dualpipev": peer.ScheduleDualPipeV,
    "fold_fifo": peer.ScheduleInterleaved1F1B,
}
GRID = [
    (schedule, ranks, stages, micro_batches)
    for schedule in SCHEDULES
    for ranks in (1, 2, 3, 4, 6)
    for stages in (1, 2, 3)
    for micro_batches in (*range(1, 11), 13, 16, 20)
    if not list(problems(schedule, ranks, stages, micro_batches))
]


def of_torch(schedule: str, ranks: int, stages_per_rank: int, micro_batches: int) -> list[list[str]]:
    """The compute actions of torch's schedule, made from stages that have nothing but their numbers."""
    stages = [
        SimpleNamespace(
            num_stages=ranks * stages_per_rank, stage_index=index, group_size=ranks, group_rank=0, submod=None
        )
        for index in range(stages_per_rank)
    ]
    several = issubclass(PEERS[schedule], peer.PipelineScheduleMulti)
    made = PEERS[schedule](stages if several else stages[0], micro_batches)  # type: ignore[arg-type]
    steps = [[step for step in made.pipeline_order[rank] if step] for rank in range(ranks)]
    parts = [[part for step in order for part in step.sub_actions or (step,)] for order in steps]
    flat = [[part for part in order if part.is_compute_op] for order in parts]
    if schedule == "1f1b":  # the description numbers the forwards of the last rank from 1; its execution does from 0
        last = [a._replace(microbatch_index=a.microbatch_index - (a.computation_type is peer.F)) for a in flat[-1]]
        flat[-1] = last
    return [list(map(str, order)) for order in flat]


def torch_takes(schedule: str, ranks: int, stages: int, micro_batches: int) -> bool:
    return schedule in PEERS and (schedule != "1f1b" or micro_batches >= ranks)


@pytest.mark.parametrize("schedule", PEERS)
def test_schedules_are_those_of_torch(schedule):
    cases = [case for case in GRID if case[0] == schedule and torch_takes(*case)]
    assert len(cases) > 20
    for case in cases:
        assert [[str(action) for action in order] for order in rank_actions(*case)] == of_torch(*case), case


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_action_once_on_its_rank_and_none_waits_for_ever(schedule):
    for _, ranks, stages_per_rank, micro_batches in (case for case in GRID if case[0] == schedule):
        made = rank_actions(schedule, ranks, stages_per_rank, micro_batches)
        counts = Counter(action for order in made for action in order)
        assert max(counts.values()) == 1
        for stage in range(ranks * stages_per_rank):
            for micro_batch in range(micro_batches):
                kinds = "".join(kind for kind in "FBIW" if Action(kind, stage, micro_batch) in counts)
                assert kinds in ("FB", "FIW"), (schedule, ranks, stages_per_rank, micro_batches, stage, micro_batch)
        assert all(rank_of(schedule, a.stage, ranks) == rank for rank, order in enumerate(made) for a in order)
        assert not deadlocked(made)
        assert not deadlocked(with_reduction(made))


def test_schedules_by_hand():
    assert [" ".join(map(str, order)) for order in rank_actions("1f1b", 2, 1, 3)] == [
        "0F0 0F1 0B0 0F2 0B1 0B2",
        "1F0 1B0 1F1 1B1 1F2 1B2",
    ]
    assert [" ".join(map(str, order)) for order in rank_actions("fold_aiao", 2, 2, 2)] == [
        "0F0 0F1 2F0 2F1 2B0 2B1 0B0 0B1",
        "1F0 1F1 3F0 3F1 3B0 3B1 1B0 1B1",
    ]


def test_a_deadlock_is_found():
    made = rank_actions("1f1b", 2, 1, 2)
    made[0][1], made[0][2] = made[0][2], made[0][1]  # now rank 0 waits for a gradient ...
    made[1] = [made[1][0], made[1][2], made[1][1], made[1][3]]  # ... of what rank 1 needs more input for
    assert (0, Action("B", 0, 0)) in deadlocked(made)
    assert (1, Action("F", 1, 1)) in deadlocked(made)


@pytest.mark.parametrize("schedule", REDUCING)
def test_reduction_starts_with_the_last_backward_of_a_stage(schedule):
    order = [str(action) for action in with_reduction(rank_actions(schedule, 2, 2, 4))[0]]
    assert [action for action in order if "R" in action] == ["2R3", "0R3"]
    assert order[order.index("2B3") + 1] == "2R3"
    assert order.index("2R3") < order.index("0B3")


def test_reduction_waits_for_the_weight_gradients():
    for order in with_reduction(rank_actions("zbv", 4, 2, 8)):
        for number, action in enumerate(order):
            if action.kind == "R":
                later = {other.kind for other in order[number + 1 :] if other.stage == action.stage}
                assert not later & {"F", "B", "I", "W"}


@pytest.mark.parametrize(
    ("case", "kind", "limit"),
    [
        (("1f1b", 4, 2, 8), "stages", "1"),
        (("interleaved", 4, 1, 8), "stages", "at least 2"),
        (("interleaved", 4, 2, 9), "rounds", (8, 12)),
        (("fold_aiao", 4, 1, 8), "stages", "at least 2"),
        (("fold_fifo", 4, 2, 9), "rounds", (8, 12)),
        (("zbv", 4, 3, 8), "stages", "2"),
        (("dualpipev", 4, 2, 7), "micro-batches", 8),
    ],
)
def test_what_does_not_fit_is_reported(case, kind, limit):
    with pytest.raises(ProblemError) as caught:
        rank_actions(*case)
    (problem,) = caught.value.problems
    assert (problem.option, problem.value, problem.kind, problem.limit) == ("schedule", case[0], kind, limit)
