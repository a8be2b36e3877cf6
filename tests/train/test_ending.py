"""The end of a run: every command that is shown works as it stands, and a run that keeps nothing says so before."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from cordee.cli import main
from cordee.train import job
from cordee.train.ending import describe_end
from cordee.train.plan import plan_run
from tests.generate.folders import VOCAB_SIZE, write_tokenizer
from tests.train import tiny


@pytest.fixture
def given(tmp_path: Path, monkeypatch):
    """A run with spaces in its paths, seen from its folder; its data is held out by no split."""
    monkeypatch.chdir(tmp_path)
    Path("my data").mkdir()
    write_tokenizer(Path("my data"))
    prefix = tiny.make_data(Path("my data"))
    changes = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 64, "tokenizer_name_or_path": "my data"}
    return tiny.config(tmp_path, data_path=(prefix,), save="my run", save_interval=None, **changes)


def commands(lines: list[str]) -> list[list[str]]:
    text = "\n".join(lines).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line.startswith("  cordee ")]


def test_what_is_shown_at_the_end_works(given, capsys):
    assert job.run(given) == 0
    said = capsys.readouterr().err.splitlines()
    assert f"checkpoint: {Path('my run') / 'iter_0000006'}" in said, "saved at the end without an interval"
    found = commands(said)
    assert [name for _, name, *_ in found] == ["generate", "evaluate", "convert"]
    for _, *argv in found:
        assert main(argv) == 0
    assert Path("my run-hf", "config.json").is_file()


def test_a_run_that_stops_early_says_how_to_resume(given):
    plan = plan_run(given, 1)
    folder = Path("my run", "iter_0000004")
    assert list(describe_end(plan, 4)) == [], "nothing is there"
    folder.mkdir(parents=True)
    (folder / "manifest.json").touch()
    assert any("--load 'my run'" in line for line in describe_end(plan, 4) if not line.startswith("  "))


def test_a_command_is_on_the_line_of_its_name(given):
    folder = "r" * 90
    Path(folder, "iter_0000006").mkdir(parents=True)
    Path(folder, "iter_0000006", "manifest.json").touch()
    lines = list(describe_end(replace(plan := plan_run(given, 1), config=replace(plan.config, save=folder)), 6))
    assert [line.split()[1] for line in lines if line.startswith("  cordee")] == ["generate", "evaluate", "convert"]


def test_a_run_that_keeps_nothing_says_so_before(tmp_path: Path):
    for options, told in (({"save": None}, 1), ({"save": None, "skip_train": True, "eval_iters": 1}, 0), ({}, 0)):
        given = tiny.config(tmp_path, **{"save_interval": None, **options})
        assert sum("--save" in note for note in plan_run(given, 1).notes) == told
    assert list(describe_end(plan_run(given, 1), 6)) == []
