"""The benchmark of pipelines runs its steps with delays and simulates the same ones. Its times are not tested."""

from __future__ import annotations

import pytest

from benchmarks import pipeline
from benchmarks.__main__ import Config
from benchmarks.pipeline import GROUPS, Step


def test_it_measures_and_simulates_the_same_steps(monkeypatch):
    few = {"num_ranks": 2, "num_micro_batches": 4, "size": 2}
    dynamic = (Step(schedule="1f1b", **few), Step(schedule="1f1b", manual="1,2,3,2", **few))
    fold = tuple(Step(schedule=schedule, data_ranks=2, reduction=2, **few) for schedule in ("interleaved", "fold_aiao"))
    monkeypatch.setattr(pipeline, "GROUPS", (dynamic, fold))
    monkeypatch.setattr(pipeline, "UNIT", 1e-4)
    turns = []
    report = pipeline.run(Config(suite="pipeline"), lambda number, name, turn: turns.append((number, name)))
    assert turns == [(1, "1f1b"), (1, "1f1b, 1,2,3,2"), (2, "interleaved"), (2, "fold_aiao")]
    for number, name in turns:
        assert 0 < report.figures[f"{number}: {name}: simulated"] < 1
        assert 0 < report.figures[f"{number}: {name}: measured"] < 1
    # By hand: 2 ranks, 4 micro-batches of 2, a stage of 2 layers: (p - 1) / (m + p - 1) of the step are idle.
    assert report.figures["1: 1f1b: simulated"] == pytest.approx(1 / 5)
    assert [row[:3] for row in report.rows] == [
        ["1f1b", "2 x 1", "8"],
        ["1f1b, 1,2,3,2", "2 x 1", "8"],
        ["interleaved", "2 x 2", "8"],
        ["fold_aiao", "2 x 2", "8"],
    ]
    assert [bool(row[-1]) for row in report.rows] == [False, False, True, True]


def test_the_examples_and_fold_are_compared_with_plain_schedules():
    dynamic = [[case.name for case in group] for group in GROUPS[:2]]
    assert dynamic == [["1f1b", f"1f1b, example-config-{number}", "interleaved"] for number in (1, 2)]
    assert [case.schedule for case in GROUPS[2]] == ["1f1b", "interleaved", "fold_aiao", "fold_fifo"]
    for group in GROUPS:
        assert all(case.num_ranks >= 4 and sum(case.sizes) == sum(group[0].sizes) for case in group)
