"""`cordee check` as a dry run: what it shows of a run, also where data and machines are missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cordee.cli import main
from cordee.data.indexed import IndexedDataset
from cordee.errors import ProblemError
from cordee.log import counted
from cordee.train.check import examine
from cordee.train.plan import plan_run
from tests import problems
from tests.train import tiny

FLAGS = [
    word for name, value in tiny.MODEL.items() if not isinstance(value, bool) for word in (f"--{name}", str(value))
]
FLAGS += [f"--{'' if value else 'no-'}{name}" for name, value in tiny.MODEL.items() if isinstance(value, bool)]
FLAGS = [word.replace("_", "-") for word in FLAGS]
FLAGS += ["--seq-length", "16", "--lr", "1e-2", "--eval-iters", "0", "--global-batch-size", "32"]


@pytest.fixture
def given(tmp_path: Path):
    return tiny.config(tmp_path, split="1", save_interval=None)


def tokens_of(given) -> int:
    return sum(len(each) for each in IndexedDataset(given.data_path[0]))


def test_shows_what_the_run_is(given):
    tokens = tokens_of(given)
    shown, found = examine(replace(given, sgd_momentum=0.5, save=None))
    assert found == []
    for part in (
        "17,472 parameters",
        counted(tokens, "token"),
        "8 samples = 1 per micro-batch x 8 micro-batches x 1 data-parallel rank",
        f"6 steps, {6 * 8 * 16} tokens",
        f"epochs of {given.data_path[0]}: {6 * 8 * 16 / tokens:.3g}\n",
        "16 bytes for each of the 17,472 parameters",
        "ignored: --sgd-momentum",
        "--save",
    ):
        assert part in shown, part


def test_shares_of_a_blend(tmp_path: Path):
    """Of 96 samples a quarter is of the first dataset, three quarters are of the second."""
    prefixes = [tiny.make_data(tmp_path, documents=20 * seed, seed=seed) for seed in (1, 2)]
    blend = ("1", prefixes[0], "3", prefixes[1])
    shown, found = examine(
        tiny.config(tmp_path, data_path=blend, split="1", train_iters=12, save=None, save_interval=None)
    )
    assert found == []
    for prefix, samples in zip(prefixes, (24, 72), strict=True):
        tokens = sum(len(each) for each in IndexedDataset(prefix))
        assert f"epochs of {prefix}: {samples * 16 / tokens:.3g}\n" in shown


def test_without_data_and_machines(tmp_path: Path, capsys):
    flags = [*FLAGS, "--train-iters", "5", "--data-path", str(tmp_path / "absent"), "--world-size", "16"]
    flags += ["--pipeline-model-parallel-size", "2", "--tensor-model-parallel-size", "2"]
    assert main(["check", *flags]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("1 problem:\n1. dataset = ") and "ok" not in said.out.splitlines()
    for part in ("17,472 parameters", "5 steps", "16 processes = pp 2 x dp 4 x cp 1 x tp 2", "layer 0 | layer 1, head"):
        assert part in said.out
    assert "memory of the rank with the most" in said.out
    assert main(["train", *flags]) == 2
    assert "--world-size" in capsys.readouterr().err, "an option of the check alone"


def test_a_flag_goes_before_the_file(tmp_path: Path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(f"train_iters: 1000\ndata_path: {tiny.make_data(tmp_path)}\n")
    assert main(["check", *FLAGS, "--config", str(file), "--num-epochs", "2", "--nproc-per-node", "1"]) == 0
    said = capsys.readouterr()
    assert said.err == f"note: --num-epochs replaces train_iters 1000 ({file}:1)\n"
    assert "num_epochs: 2" in said.out and "train_iters" not in said.out


@pytest.mark.parametrize("epochs", [0.001, 1, 2.5])
def test_epochs_make_steps(given, epochs: float):
    plan = plan_run(replace(given, train_iters=None, num_epochs=epochs, lr_warmup_iters=0), 1)
    of_a_step, tokens = 8 * 16, tokens_of(given)
    assert plan.iterations == plan.config.train_iters
    assert (plan.iterations - 1) * of_a_step < epochs * tokens <= plan.iterations * of_a_step
    assert plan.schedule.decay == plan.iterations * 8


def test_epochs_of_a_run_are_its_only_length(given, tmp_path: Path):
    with pytest.raises(ProblemError) as caught:
        plan_run(replace(given, num_epochs=2.0), 1)
    assert problems.facts(caught) == [("--num-epochs", 2.0, "excludes")]
    with pytest.raises(ProblemError) as caught:
        plan_run(replace(given, train_iters=None, num_epochs=1.0, lr_warmup_iters=10**6), 1)
    assert problems.facts(caught) == [("--lr-warmup-iters", 10**6, "at most")]
    absent = str(tmp_path / "absent")
    with pytest.raises(ProblemError) as caught:
        plan_run(replace(given, train_iters=None, num_epochs=1.0, data_path=(absent,)), 1)
    assert [(option, value) for option, value, _ in problems.facts(caught)] == [("dataset", absent)]
