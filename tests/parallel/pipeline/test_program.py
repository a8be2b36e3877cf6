"""Messages between ranks: both sides name them in the same order, each is sent once it is made and taken before use."""

from __future__ import annotations

import re

import pytest

from cordee.parallel.pipeline.program import Message, programs
from cordee.parallel.pipeline.schedules import SCHEDULES, Action, rank_actions, rank_of

STAGES = {"gpipe": 1, "1f1b": 1}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_messages_meet(ranks: int, schedule: str, training: bool):
    stages = STAGES.get(schedule, 2)
    found = rank_actions(schedule, ranks, stages, 8)
    if not training:
        found = [[action for action in order if action.kind == "F"] for order in found]
    num_stages = ranks * stages

    def rank(stage: int) -> int:
        return rank_of(schedule, stage, ranks)

    made = programs(found, rank, num_stages)
    assert [[step for step in program if isinstance(step, Action)] for program in made] == found
    links: dict[tuple[int, int], tuple[list, list]] = {}
    for own, program in enumerate(made):
        for place, step in enumerate(program):
            if not isinstance(step, Message):
                continue
            forward = step.kind == "F"
            if step.what == "send":
                to = step.stage + 1 if forward else step.stage - 1
                links.setdefault((own, rank(to)), ([], []))[0].append((step.kind, to, step.micro_batch))
                assert program[place - 1].stage == step.stage and program[place - 1].micro_batch == step.micro_batch
            else:
                source = step.stage - 1 if forward else step.stage + 1
                links.setdefault((rank(source), own), ([], []))[1].append((step.kind, step.stage, step.micro_batch))
                kinds = "F" if forward else "BI"
                use = next(
                    later
                    for later, action in enumerate(program)
                    if isinstance(action, Action)
                    and action.kind in kinds
                    and (action.stage, action.micro_batch) == (step.stage, step.micro_batch)
                )
                assert place < use
    assert links
    for (source, to), (sent, received) in links.items():
        assert source != to
        assert sent == received and len(set(sent)) == len(sent)


def test_a_deadlock_is_found():
    schedules = [[Action("B", 0, 0), Action("F", 0, 0)], [Action("F", 1, 0), Action("B", 1, 0)]]
    with pytest.raises(AssertionError, match=re.escape(str([(0, schedules[0][0])])[:-1])):
        programs(schedules, lambda stage: stage, 2)
