"""What people are shown of long work, and how numbers read."""

from __future__ import annotations

import logging
import time

import pytest

from cordee.log import SILENCE, console, counted, progress_bar, shortened


@pytest.mark.parametrize(("number", "words"), [(0, "0 pairs"), (1, "1 pair"), (2, "2 pairs"), (12345, "12,345 pairs")])
def test_counted(number: int, words: str):
    assert counted(number, "pair") == words
    assert counted(number, "copy", "copies") == words.replace("pairs", "copies").replace("pair", "copy")


@pytest.mark.parametrize(("number", "text"), [(999, "999"), (1500, "1.5K"), (999_950, "1M"), (6_738_415_616, "6.74B")])
def test_shortened(number: int, text: str):
    assert shortened(number) == text


def test_tables_are_whole_where_there_is_no_terminal(capsys):
    from rich.table import Table

    words = ["runs/[v2]/" + "a" * 100, "b" * 100]
    table = Table(*words, title="[bold]")
    table.add_row(*words)
    console().print(table)
    said = capsys.readouterr().out
    assert all(said.count(word) == 2 for word in words) and "[bold]" in said


@pytest.mark.parametrize("shown", [True, False])
def test_progress_without_a_terminal_is_lines(monkeypatch, caplog, shown: bool):
    """A quarter of the work takes 60 seconds of this clock, in steps of three: 180 seconds are left."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, "cordee"), progress_bar("work", 80, shown=shown) as show:
        for done in range(1, 21):
            now += 3.0
            show(done)
    lines = caplog.messages
    assert len(lines) == (60 // (4 * 3) if shown else 0), f"one every {SILENCE} seconds, when a step ends"
    assert not shown or ("25 %" in lines[-1] and "0:03:00" in lines[-1])
