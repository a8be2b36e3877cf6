"""The benchmark of long sequences runs and finds attention equal. Its memory and times are not tested."""

from __future__ import annotations

import pytest

from benchmarks import context
from benchmarks.__main__ import Config


@pytest.mark.slow
def test_it_compares_algorithms_with_one_process(monkeypatch):
    monkeypatch.setattr(context, "LENGTH", 128)
    monkeypatch.setattr(context, "RANKS", 2)
    monkeypatch.setattr(context, "ALGORITHMS", {"Ulysses": context.ALGORITHMS["Ulysses"]})
    turns = []
    config = Config(suite="context", threads=1)
    report = context.run(config, lambda number, name, turn: turns.append(name))
    assert turns == [row[0] for row in report.rows] == ["one process", "Ulysses"]
    for name in turns:
        assert report.figures[f"{name}: error"] < 1e-5
        assert report.figures[f"{name}: loss"] < 1e-5
        assert report.figures[f"{name}: memory by one process"] > 0
