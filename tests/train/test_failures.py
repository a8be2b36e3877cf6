"""What stops a run: it says why, where and what is left, and nothing good is lost."""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cordee import device, lock
from cordee.checkpoint import directory, source
from cordee.checkpoint.storage import LocalStorage, location_of
from cordee.data import order_cache
from cordee.errors import Problem, ProblemError
from cordee.parallel.degrees import Degrees
from cordee.parallel.layout import Layout
from cordee.train import job, not_finite, objectives
from cordee.train.exits import Exit
from cordee.train.objectives.next_token import NextToken
from cordee.train.options import TrainConfig
from cordee.train.sinks import JsonSink, TensorBoardSink
from tests.problems import facts
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Explodes(NextToken):
    """A loss that is not finite from its n-th micro-batch on, or only whose gradient is not."""

    stage = "explodes"

    def __init__(self, after: int, how: str):
        self.after = after
        self.how = how

    def loss(self, head, hidden, batch, reduce):
        total, metrics = super().loss(head, hidden, batch, reduce)
        self.after -= 1
        if self.after < 0:
            total = total * math.nan if self.how == "loss" else total + (0 * hidden.sum()).sqrt()
        return total, metrics


def explode(rank: int, world_size: int, given, after: int, how: str, bad_rank: int) -> list[Problem]:
    objectives.registry()["explodes"] = Explodes(after if rank == bad_rank else 10**9, how)
    try:
        with pytest.raises(ProblemError) as caught:
            tiny.train_rank(rank, world_size, given)
        return caught.value.problems
    finally:
        del objectives.registry()["explodes"]


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_not_finite(tmp_path: Path, pool, how: str):
    given = tiny.config(tmp_path, stage="explodes", nproc_per_node=2)
    with pytest.raises(AssertionError):  # the objective is only known to the ranks
        pool.run(tiny.train_rank, 2, given)
    # Four micro-batches a rank and step: the last one of step 5 is the first that explodes.
    for (problem,) in pool.run(explode, 2, given, 19, how, 1):
        assert (problem.option, problem.kind) == ("step 5", how)
        assert problem.limit == ["1"] or how == "gradient"
    assert directory.latest(location_of(given.save)) == (4, [])
    assert max(tiny.records(given)) == 4


def test_overflow_that_no_scale_cures(tmp_path: Path, monkeypatch):
    given = tiny.config(tmp_path, stage="explodes", fp16=True, initial_loss_scale=4.0, hysteresis=1, train_iters=50)
    monkeypatch.setitem(objectives.registry(), "explodes", Explodes(0, "loss"))
    with pytest.raises(ProblemError) as caught:
        job.run(given)
    assert options_of(caught) == ["step 3"]  # at 4, at 2, and at 1, which is the smallest


def options_of(caught: pytest.ExceptionInfo[ProblemError]) -> list[str]:
    return [problem.option for problem in caught.value.problems]


WRITE = LocalStorage.write


def on_full_disk(self: LocalStorage, url: str, mode: int = 0o666):
    """Holds one checkpoint."""
    if ".distcp" in url and "0000002" not in url:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return WRITE(self, url, mode)


@pytest.mark.slow
@pytest.mark.parametrize("background", [True, False])
def test_full_disk_stops_the_run_and_keeps_what_is_good(tmp_path: Path, monkeypatch, background: bool):
    monkeypatch.setattr(LocalStorage, "write", on_full_disk)
    given = tiny.config(tmp_path, async_save=background, keep_last=1, train_iters=12)
    with pytest.raises(ProblemError) as caught:
        job.run(given)
    assert facts(caught) == [("--save", f"{given.save}/iter_0000004", "unwritable")]
    assert directory.iterations(location_of(given.save)) == [2]
    assert max(tiny.records(given)) < 12
    monkeypatch.undo()
    assert job.run(tiny.resumed(given)) == 0
    assert directory.iterations(location_of(given.save)) == [12]


def test_both_failures_are_told(tmp_path: Path, monkeypatch):
    """The disk is full while step 5 is taken: a save that has failed before it would end the run by itself."""
    exploded = threading.Event()

    class Signals(Explodes):
        def loss(self, head, hidden, batch, reduce):
            found = super().loss(head, hidden, batch, reduce)
            if self.after < 0:
                exploded.set()
            return found

    def waits(self: LocalStorage, url: str, mode: int = 0o666):
        assert exploded.wait(60)
        return on_full_disk(self, url, mode)

    monkeypatch.setattr(LocalStorage, "write", waits)
    monkeypatch.setitem(objectives.registry(), "explodes", Signals(4, "loss"))
    given = tiny.config(tmp_path, stage="explodes", save_interval=4, micro_batch_size=8, train_iters=5)
    with pytest.raises(ProblemError) as caught:
        job.run(given)
    assert options_of(caught) == ["step 5", "--save"]


def test_where_the_first_checkpoint_finds_no_space_there_is_nothing_to_resume(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(LocalStorage, "write", on_full_disk)
    given = tiny.config(tmp_path, save_interval=None, train_iters=3)
    with pytest.raises(ProblemError) as caught:
        job.run(given)
    (problem,) = caught.value.problems
    assert (problem.subject, problem.kind) == ("save", "unwritable") and "load" not in problem.names


def run_on_full_disk(rank: int, world_size: int, given) -> list[Problem]:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ProblemError) as caught:
        if rank == 1:
            patch.setattr(LocalStorage, "write", on_full_disk)
        tiny.train_rank(rank, world_size, given)
    return caught.value.problems


def test_full_disk_of_one_rank_stops_all(tmp_path: Path, pool):
    given = tiny.config(tmp_path, nproc_per_node=2, train_iters=8)
    for problems in pool.run(run_on_full_disk, 2, given):
        assert [(problem.option, problem.kind, problem.limit) for problem in problems] == [
            ("--save", "unwritable", [1])
        ]
        assert "load" in problems[0].names, "there is one to resume from"
    assert directory.latest(location_of(given.save)) == (2, [])


def test_retention(tmp_path: Path):
    given = tiny.config(tmp_path, save_interval=1, keep_last=2)
    job.run(given)
    assert directory.iterations(location_of(given.save)) == [6, 5]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    given = tiny.config(tmp_path_factory.mktemp("trained"))
    job.run(given)
    return given


@pytest.fixture
def copied(trained: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A run that has ended, to be spoilt."""
    shutil.copytree(trained.save or "", tmp_path / "run")
    return replace(trained, save=str(tmp_path / "run"))


def shorten(path: Path):
    with (path / "__0_0.distcp").open("r+b") as file:
        file.truncate(100)


def flip(path: Path):
    data = bytearray((path / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 255
    (path / "__0_0.distcp").write_bytes(data)


def unfinished(path: Path):
    path.rename(path.with_name(f".{path.name}.new"))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [(shorten, "instead of"), (flip, "checksum"), (unfinished, "removed what an interrupted save had left")],
)
def test_damaged_latest_is_passed_over(copied: TrainConfig, capsys, spoil, says: str):
    before = tiny.losses(copied)
    spoil(Path(copied.save) / "iter_0000006")
    job.run(tiny.resumed(copied))
    said = capsys.readouterr().err
    assert says in said and "resuming from" in said and "iter_0000004" in said
    assert tiny.losses(copied) == before
    assert directory.latest(location_of(copied.save)) == (6, [])


def test_no_whole_checkpoint_is_no_silent_restart(copied: TrainConfig):
    for iteration in (2, 4, 6):
        shorten(Path(copied.save) / f"iter_{iteration:07d}")
    with pytest.raises(ProblemError) as caught:
        job.run(tiny.resumed(copied))
    assert facts(caught) == [("--load", copied.save, "corrupt")]


def test_named_checkpoint_that_is_damaged_is_not_replaced(copied: TrainConfig):
    flip(Path(copied.save) / "iter_0000004")
    with pytest.raises(ProblemError) as caught:
        job.run(tiny.resumed(copied, ckpt_step=4))
    assert facts(caught) == [("--load", f"{copied.save}/iter_0000004", "corrupt")]
    assert job.run(tiny.resumed(copied, ckpt_step=2)) == 0
    assert tiny.losses(copied)[1] == tiny.records(copied)[2]["loss"]


def test_token_outside_the_vocabulary(tmp_path: Path, pool):
    prefix = tiny.make_data(tmp_path, vocab=200, seed=1)
    Path(f"{prefix}.json").unlink(missing_ok=True)  # without its note the data is only found out in the run
    given = tiny.config(tmp_path, data_path=(prefix,), nproc_per_node=2)
    for ending in pool.run(read_wrong_token, 2, given):
        assert "the vocabulary has only tokens 0 to 60" in ending


def run_with_another_option(rank: int, world_size: int, given, name: str, value) -> list[Problem]:
    with pytest.raises(ProblemError) as caught:
        tiny.train_rank(rank, world_size, replace(given, **{name: value}) if rank else given)
    return caught.value.problems


@pytest.mark.parametrize(("name", "value"), [("lr", 5e-3), ("seed", 7), ("clip_grad", 0.5)])
def test_ranks_with_different_options_do_not_start(tmp_path: Path, pool, name: str, value):
    given = tiny.config(tmp_path, nproc_per_node=2)
    for found in pool.run(run_with_another_option, 2, given, name, value):
        assert (name, value, "differs") in [(problem.subject, problem.value, problem.kind) for problem in found]
    assert not Path(given.save).exists()


def test_metrics_that_cannot_be_written_do_not_stop_the_run(tmp_path: Path, monkeypatch, capsys):
    def full(self, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(JsonSink, "_write", full)
    given = tiny.config(tmp_path)
    assert job.run(given) == 0
    assert directory.latest(location_of(given.save)) == (6, [])
    assert capsys.readouterr().err.count("metrics.jsonl gets no more metrics") == 1


def test_places_of_metrics_that_are_full_from_the_start_do_not_stop_the_run(tmp_path: Path, monkeypatch, capsys):
    def full(self, path, loss_name):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for sink in (JsonSink, TensorBoardSink):
        monkeypatch.setattr(sink, "__init__", full)
    given = tiny.config(tmp_path, tensorboard_dir=str(tmp_path / "board"))
    assert job.run(given) == 0
    told = capsys.readouterr().err
    assert told.count("metrics.jsonl gets no more metrics") == told.count("board gets no more metrics") == 1


def test_steps_before_a_failure_are_reported(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(objectives.registry(), "explodes", Explodes(3, "loss"))
    given = tiny.config(tmp_path, stage="explodes", micro_batch_size=8, log_interval=100)
    with pytest.raises(ProblemError) as caught:
        job.run(given)
    assert options_of(caught) == ["step 4"]
    assert list(tiny.records(given)) == [3]


def test_train_in_a_thread(tmp_path: Path):
    with ThreadPoolExecutor(1) as thread:  # which cannot have signal handlers
        assert thread.submit(job.run, tiny.config(tmp_path)).result() == 0


def read_wrong_token(rank: int, world_size: int, given) -> str:
    with pytest.raises(ProblemError) as caught:
        tiny.train_rank(rank, world_size, given)
    return str(caught.value)


def test_exits_save_first(tmp_path: Path):
    given = tiny.config(tmp_path, save_interval=100, exit_duration_in_mins=1e-9)
    assert job.run(given) == 0
    assert not directory.iterations(location_of(given.save))  # over before the first step: there is nothing to save
    shutil.rmtree(given.save)
    given = tiny.config(tmp_path, save_interval=100, exit_interval=3)
    ending = tiny.train_rank(0, 1, given)
    assert ending == Exit("--exit-interval 3")
    assert directory.iterations(location_of(given.save)) == [3]


def test_settings_of_the_process_are_put_back(tmp_path: Path):
    import gc

    given = tiny.config(tmp_path, use_deter_comp=True, manual_gc=True, manual_gc_interval=2, eval_iters=1)
    assert job.run(given) == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert gc.isenabled()


def test_norm_of_the_weights_and_zero_gradients(tmp_path: Path):
    given = tiny.config(tmp_path, log_num_zeros_in_grad=True, log_params_norm=True)
    job.run(given)
    record = tiny.records(given)[6]
    assert record["zeros_in_grad"] >= 0
    names = source.read(given.save).names()
    weights = torch.cat([source.read(given.save).tensor(name).flatten() for name in names])
    assert record["params_norm"] == pytest.approx(weights.norm().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("gradient", "expected"), [(1e30, ("norm", None)), (math.inf, ("gradient", ["weight", "bias"]))]
)
def test_gradient_that_is_not_finite_is_found(gradient: float, expected: tuple[str, object]):
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    layout = Layout(Degrees())
    problem = not_finite.find(model, torch.tensor(1.0), layout, step=7, values="norm inf", samples=range(8, 16))
    assert problem.option == "step 7" and (problem.kind, problem.limit) == expected
    assert "samples 8 to 15" in problem.fix  # which are nowhere else


# ---- what ranks have to agree on -------------------------------------------------------------------------------------


def run_without_the_checkpoint(rank: int, world_size: int, given) -> list[str]:
    with pytest.raises(ProblemError) as caught:
        tiny.train_rank(rank, world_size, replace(given, load=None) if rank else given)
    return [problem.option for problem in caught.value.problems]


def test_ranks_of_which_one_has_no_checkpoint_do_not_start(tmp_path: Path, pool):
    """What is compared comes before what all ranks do with the checkpoint, so none waits for another."""
    given = tiny.config(tmp_path, train_iters=2, micro_batch_size=8)
    job.run(given)
    given = replace(given, load=given.save, save=None, save_interval=None, micro_batch_size=1, nproc_per_node=2)
    assert pool.run(run_without_the_checkpoint, 2, given) == [["checkpoint"], ["checkpoint"]]


def sums_at_the_start(rank: int, world_size: int, given, machines: str, full: str) -> int | list[str]:
    """Checksums of arrays of sample orders that a rank computes until it trains, on the machine that a letter names;
    or the options that it refuses. The machines in `full` have no memory left.
    """
    sums = []

    def seal(path: Path, content: object) -> bytes:
        sums.append(path)
        return _seal(path, content)

    _seal = order_cache._seal
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lock, "machine", lambda: machines[rank])
        patch.setattr(order_cache, "_seal", seal)
        patch.setattr(device, "available_memory", lambda: 0 if machines[rank] in full else 2**40)
        try:
            tiny.train_rank(rank, world_size, given)
        except ProblemError as error:
            return [problem.option for problem in error.problems]
    return len(sums)


def test_one_rank_of_each_machine_verifies_the_orders_and_only_who_builds_needs_memory(tmp_path: Path, pool):
    given = tiny.config(tmp_path, train_iters=2, save=None, save_interval=None, nproc_per_node=4)

    def start(machines: str, full: str) -> list[int | list[str]]:
        return pool.run(sums_at_the_start, 4, given, machines, full)

    assert start("abab", "a") == [["dataset"]] * 4  # rank 0 would have to build it
    assert start("abab", "b") == [3, 3, 0, 0]  # rank 0 writes three arrays, rank 1 reads them
    assert start("aaaa", "a") == [3, 0, 0, 0]
