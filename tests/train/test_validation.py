"""What follows from validations: the best checkpoint, early stopping; validation at the start and of each dataset."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cordee import sealed
from cordee.checkpoint import directory
from cordee.checkpoint.storage import location_of
from cordee.train import job
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run
from cordee.train.run_plan import TrainState
from cordee.train.trainer import Trainer
from tests.train import tiny

LOSSES = (3.0, 2.0, 2.5, 1.5, 1.75, 1.6)


@pytest.fixture
def losses(monkeypatch) -> dict[int, float]:
    """What validations come to, by iteration, in place of what the model says."""
    said = dict(enumerate(LOSSES, 1))
    monkeypatch.setattr(Trainer, "_mean_loss", lambda self, split: said[self.state.iteration])
    return said


def config(folder: Path, **options: Any) -> TrainConfig:
    """A validation at each of six steps."""
    defaults = {"micro_batch_size": 8, "eval_iters": 1, "eval_interval": 1, "save_best": True, "keep_last": 1}
    return tiny.config(folder, **{**defaults, **options})


def iterations(given: TrainConfig) -> list[int]:
    return directory.iterations(location_of(given.save or ""))


def best(given: TrainConfig) -> int | None:
    return directory.tracked(location_of(given.save or ""), directory.BEST)


def state(given: TrainConfig, iteration: int) -> dict[str, Any]:
    manifest = json.loads((Path(given.save or "") / directory.name_of(iteration) / directory.MANIFEST).read_text())
    return manifest["trainer"]


# ---- the best checkpoint ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "kept"), [(1, [1]), (2, [2]), (3, [3, 2]), (4, [4]), (5, [5, 4]), (6, [6, 4])])
def test_the_best_is_kept_beside_the_newest(tmp_path: Path, losses, steps: int, kept: list[int]):
    """Whatever is interrupted when, and by resuming in steps of one too."""
    given = config(tmp_path, exit_interval=steps, save_interval=100)
    job.run(given)
    wanted = min(range(1, steps + 1), key=losses.__getitem__)
    assert (iterations(given), best(given)) == (kept, wanted)
    each = replace(given, save=str(tmp_path / "each"), load=str(tmp_path / "each"), exit_interval=1)
    for _ in range(steps):
        job.run(each)
    assert (iterations(each), best(each)) == (kept, wanted)
    assert state(each, steps) == state(given, steps)
    assert (state(each, steps)["best_loss"], state(each, steps)["best_iteration"]) == (losses[wanted], wanted)


def test_the_best_stays_when_the_option_is_dropped(tmp_path: Path, losses):
    given = config(tmp_path, exit_interval=2)
    job.run(given)
    job.run(tiny.resumed(given, save_best=False, save_interval=1))
    assert (iterations(given), best(given)) == ([6, 2], 2)


@pytest.mark.parametrize("at", [2, 3, 6])
def test_a_validation_that_a_stop_aborts_is_done_when_the_run_resumes(tmp_path: Path, losses, monkeypatch, at: int):
    """Also the last one, after which nothing is left to train."""
    options = {"early_stopping_patience": 3, "save_interval": 1}
    whole = config(tmp_path, **options, save=str(tmp_path / "whole"))
    job.run(whole)

    def stopped(self: Trainer, split: str) -> float | None:
        if self.state.iteration < at:
            return losses[self.state.iteration]
        signal.raise_signal(signal.SIGTERM)
        return self._fetch(split, 0, 8, 8) and 0.0

    given = config(tmp_path, **options)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_mean_loss", stopped)
        assert job.run(given) == 128 + signal.SIGTERM
    assert state(given, at)["validation_due"]
    job.run(tiny.resumed(given))
    assert (state(given, 6), best(given)) == (state(whole, 6), best(whole))


def test_without_the_option_the_best_is_known_but_not_kept(tmp_path: Path, losses):
    given = config(tmp_path, save_best=False, exit_interval=5)
    job.run(given)
    assert (iterations(given), best(given), state(given, 5)["best_iteration"]) == ([5], None, 4)


def test_the_last_validation_counts(tmp_path: Path, losses):
    """It comes before the last save, as those at --eval-interval."""
    losses[6] = 0.5
    given = config(tmp_path, eval_interval=4)
    job.run(given)
    assert (iterations(given), best(given), state(given, 6)["best_loss"]) == ([6], 6, 0.5)


def test_a_best_that_is_elsewhere_is_not_named(tmp_path: Path, losses):
    given = config(tmp_path, exit_interval=4)
    job.run(given)
    moved = tiny.resumed(given, save=str(tmp_path / "other"))
    job.run(moved)
    assert (iterations(moved), best(moved), state(moved, 6)["best_iteration"]) == ([6], None, 4)


def test_a_checkpoint_of_before_there_was_a_best(tmp_path: Path, losses):
    given = config(tmp_path, exit_interval=2, save_best=False)
    job.run(given)
    file = Path(given.save or "") / directory.name_of(2) / directory.MANIFEST
    manifest = json.loads(file.read_text())
    for name in ("best_loss", "best_iteration", "stale_validations"):
        del manifest["trainer"][name]
    del manifest[sealed.CHECKSUM]
    file.write_text(sealed.seal(manifest))
    resumed = tiny.resumed(given, save_best=True)
    job.run(resumed)
    assert best(resumed) == 4


def test_ranks_agree(tmp_path: Path, pool):
    given = config(tmp_path, nproc_per_node=2, micro_batch_size=4)
    pool.run(tiny.train_rank, 2, given)
    reported = {i: record["loss"] for i, record in tiny.records(given, "validation").items()}
    assert sorted(reported) == [1, 2, 3, 4, 5, 6]
    assert best(given) == min(reported, key=reported.__getitem__)


# ---- early stopping --------------------------------------------------------------------------------------------------


def patience(losses: list[float], patience: int, threshold: float) -> int | None:
    """The validation after which a run ends: the first at the end of so many that do not beat the best before each."""
    fails = [
        not (math.isfinite(x) and x < min([math.inf, *filter(math.isfinite, losses[:i])]) - threshold)
        for i, x in enumerate(losses)
    ]
    ends = [i for i in range(patience, len(losses) + 1) if all(fails[i - patience : i])]
    return min(ends, default=None)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "losses", [[*LOSSES], [math.nan, 3.0, 2.9, 2.8, 2.7, 1.0], [1.0, 1.0, math.inf, 0.0, 0.1, 0.2]]
)
def test_validations_without_improvement(losses: list[float], count: int, threshold: float):
    state, ended = TrainState(), None
    for number, loss in enumerate(losses, 1):
        state.iteration = number
        state.validated(loss, threshold)
        if state.stale_validations >= count:
            ended = number
            break
    assert ended == patience(losses, count, threshold)
    finite = [loss for loss in losses[: state.iteration] if math.isfinite(loss)]
    assert state.best_loss == min(finite, default=None)


@pytest.mark.parametrize(("threshold", "last"), [(0.0, 6), (0.75, 4)])
def test_a_run_stops_early(tmp_path: Path, losses, threshold: float, last: int):
    """Saved, tested, and over: resuming it trains no further unless it may wait longer."""
    options = {"early_stopping_patience": 2, "early_stopping_threshold": threshold, "split": "80,10,10"}
    given = config(tmp_path, **options, train_iters=8, save_interval=100)
    assert job.run(given) == 0
    assert (max(iterations(given)), sorted(tiny.records(given))[-1]) == (last, last)
    assert list(tiny.records(given, "test")) == [last]
    assert job.run(tiny.resumed(given)) == 0
    assert max(iterations(given)) == last
    losses.update(dict.fromkeys((5, 6, 7), 0.25))
    job.run(tiny.resumed(given, early_stopping_patience=5, exit_interval=7))
    assert max(iterations(given)) == 7


# ---- at the start, and of each dataset -------------------------------------------------------------------------------


def test_validation_at_the_start(tmp_path: Path):
    """The same as of what is not trained, and once; it counts for nothing."""
    given = config(tmp_path, eval_on_start=True, eval_interval=4, exit_interval=2, save_interval=100)
    job.run(given)
    assert list(tiny.records(given, "validation")) == [0]
    assert (state(given, 2)["best_loss"], best(given)) == (None, None)
    job.run(tiny.resumed(given))
    assert list(tiny.records(given, "validation")) == [0, 4, 6]
    untrained = replace(given, skip_train=True, save_best=False, save=None, save_interval=None, keep_last=None)
    job.run(replace(untrained, eval_on_start=False, exit_interval=None, metrics_file=str(tmp_path / "metrics.jsonl")))
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["loss"] == tiny.records(given, "validation")[0]["loss"]


@pytest.mark.parametrize("weighted", [True, False])
def test_each_dataset_of_a_blend(tmp_path: Path, weighted: bool):
    """As if it were the only one to validate on; the blend beside them."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    first, second = (tiny.make_data(tmp_path / "a", 30, seed=seed) for seed in (1, 2))
    third = tiny.make_data(tmp_path / "b", 40, seed=2)
    prefixes = [first, second, third]
    blend = tuple(text for prefix in prefixes for text in (*(["1.0"] if weighted else []), prefix))
    train = tiny.make_data(tmp_path)
    options = {"data_path": (), "train_data_path": (train,), "save_best": False, "keep_last": None, "eval_interval": 2}
    given = config(tmp_path, **options, valid_data_path=blend, multiple_validation_sets=True, train_iters=2)
    assert check_run(given) == []
    job.run(given)
    names = {"data1": first, second: second, third: third}  # two of a name are told apart by their folders
    found = {name: tiny.records(given, f"validation-{name}")[2]["loss"] for name in names}
    for number, (name, prefix) in enumerate(names.items()):
        alone = replace(given, save=str(tmp_path / f"alone{number}"), valid_data_path=(prefix,))
        job.run(replace(alone, multiple_validation_sets=False))
        assert found[name] == tiny.records(alone, "validation")[2]["loss"]
    assert len(set(found.values())) == 3
    weights = tuple(text for prefix in prefixes for text in ("1", prefix))
    alone = replace(given, save=str(tmp_path / "blend"), valid_data_path=weights, multiple_validation_sets=False)
    job.run(alone)
    assert tiny.records(given, "validation") == tiny.records(alone, "validation")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"save_best": True}, "--save-best"),
        ({"early_stopping_patience": 2}, "--early-stopping-patience"),
        ({"eval_on_start": True}, "--eval-on-start"),
        ({"multiple_validation_sets": True}, "--multiple-validation-sets"),
    ],
)
@pytest.mark.parametrize("lacking", [{"split": "100,0,0"}, {"eval_iters": 0}])
def test_what_needs_a_validation(tmp_path: Path, options: dict, named: str, lacking: dict):
    found = check_run(tiny.config(tmp_path, **{"eval_iters": 1, "micro_batch_size": 8, **options, **lacking}))
    assert [(problem.option, problem.kind) for problem in found] == [(named, "requires")]


def test_names_without_weights_need_the_option(tmp_path: Path):
    data = tiny.make_data(tmp_path)
    given = tiny.config(tmp_path, data_path=(), train_data_path=(data,), valid_data_path=(data, data), eval_iters=1)
    (problem,) = check_run(given)
    assert (problem.option, problem.limit) == ("--valid-data-path", data)
