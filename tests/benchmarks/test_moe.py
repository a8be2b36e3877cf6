"""The benchmark of experts runs, with all contenders, and gives the ratio. Its figures are not tested."""

from __future__ import annotations

from benchmarks import moe
from benchmarks.__main__ import Config


def test_it_gives_the_ratio_of_every_contender(monkeypatch):
    monkeypatch.setattr(moe, "EXPERTS", (4,))
    monkeypatch.setattr(moe, "TOKENS", 16)
    turns = []
    report = moe.run(Config(suite="moe", rounds=1, steps=1), lambda number, name, turn: turns.append(name))
    contenders = ("grouped", "loop", "transformers, eager")
    assert list(report.figures) == [f"{n} experts, {name}: by grouped" for n in (4,) for name in contenders]
    assert min(report.figures.values()) > 0
    assert len(turns) == len(report.rows) == 3
    assert "| 4 experts, grouped" in report.to_markdown()
