"""Saving and restoring, in one process and across layouts, and what happens when it cannot be done."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from cordee.checkpoint import directory
from cordee.checkpoint.storage import LocalStorage, Location, location_of
from cordee.checkpoint.store import CheckpointStore, restore
from cordee.errors import Problem, ProblemError
from tests.checkpoint import toy

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("background", [True, False])
def test_round_trip(tmp_path: Path, background: bool):
    model, optimizer = toy.build()
    before = toy.values(model, optimizer)
    store = CheckpointStore(location_of(tmp_path))
    store.save(10, model, optimizer, {"hello": [1, 2]}, background=background)
    with torch.no_grad():  # what was saved is the moment of the call, whatever training does meanwhile
        for parameter in model.parameters():
            parameter.add_(1)
            optimizer.state[parameter]["exp_avg"].add_(1)
    store.close()
    assert directory.latest(location_of(tmp_path)) == (10, [])
    assert (tmp_path / directory.TRACKER).read_text() == "10"
    assert directory.read_manifest(location_of(tmp_path / "iter_0000010"))["hello"] == [1, 2]
    other, fresh = toy.build(seed=1)
    fresh.state.clear()
    restore(location_of(tmp_path / "iter_0000010"), other, fresh)
    same(toy.values(other, fresh), before)
    assert fresh.state[next(other.parameters())]["step"].dtype == torch.float32


def save_sharded(rank: int, world_size: int, root: Path, dim: int) -> dict[str, torch.Tensor]:
    model, optimizer = toy.build(world_size, dim=dim)
    store = CheckpointStore(location_of(root), group=toy.background())
    store.save(1, model, optimizer, {"ranks": world_size})
    store.close()
    return toy.values(model, optimizer)


def load_sharded(rank: int, world_size: int, path: Path, dim: int) -> dict[str, torch.Tensor]:
    model, optimizer = toy.build(world_size, seed=rank + 5, dim=dim)
    optimizer.state.clear()
    restore(location_of(path), model, optimizer, group=toy.background())
    return toy.values(model, optimizer)


@pytest.mark.parametrize(("ranks", "dim"), [(2, 0), (2, 1), (4, 0)])
def test_any_layout_reads_any_other(tmp_path: Path, pool, ranks: int, dim: int):
    saved = pool.run(save_sharded, ranks, tmp_path, dim)[0]
    path = tmp_path / "iter_0000001"
    assert directory.damage(location_of(path), contents=directory.read_manifest(location_of(path))["files"]) is None
    model, optimizer = toy.build(seed=3)
    optimizer.state.clear()
    restore(location_of(path), model, optimizer)
    same(toy.values(model, optimizer), saved)
    for others in (2, 4):
        for loaded in pool.run(load_sharded, others, path, 1 - dim if others == 2 else 0):
            same(loaded, saved)


def test_retention_keeps_the_newest(tmp_path: Path):
    model, optimizer = toy.build()
    store = CheckpointStore(location_of(tmp_path), keep_last=2)
    for iteration in (1, 2, 3, 4):
        store.save(iteration, model, optimizer, {})
    store.close()
    assert directory.iterations(location_of(tmp_path)) == [4, 3]
    assert not list(tmp_path.glob(".iter*"))


def test_retention_spares_the_last_whole_one(tmp_path: Path):
    model, _ = toy.build()
    store = CheckpointStore(location_of(tmp_path), keep_last=1)
    store.save(1, model, None, {})
    store.wait()
    store.root = Location(Broken(), str(tmp_path))
    store.save(2, model, None, {})
    with pytest.raises(ProblemError) as caught:
        store.close()
    assert [(problem.option, problem.kind) for problem in caught.value.problems] == [("--save", "unwritable")]
    assert store.last_good() == "last good checkpoint: iteration 1"
    assert directory.latest(location_of(tmp_path)) == (1, [])


def test_rewound_run_replaces_what_lies_ahead(tmp_path: Path):
    store = CheckpointStore(location_of(tmp_path), keep_last=2)
    for seed, iteration in enumerate((10, 20, 30, 20)):
        store.save(iteration, toy.build(seed=seed)[0], None, {"seed": seed})
    store.close()
    assert directory.iterations(location_of(tmp_path)) == [30, 20]
    assert directory.latest(location_of(tmp_path))[0] == 20
    assert directory.read_manifest(location_of(tmp_path / "iter_0000020"))["seed"] == 3


class Broken(LocalStorage):
    """A disk that fills up."""

    @contextmanager
    def write(self, url: str, mode: int = 0o666):
        with super().write(url, mode) as file:
            yield file
            raise OSError(errno.ENOSPC, "No space left on device")


class Slow(LocalStorage):
    """Writes when `gate` opens."""

    gate = threading.Event()

    def write(self, url: str, mode: int = 0o666):
        assert self.gate.wait(30)
        return super().write(url, mode)


def test_a_save_is_in_the_background_and_the_next_waits(tmp_path: Path):
    model, _ = toy.build()
    store = CheckpointStore(Location(Slow(), str(tmp_path)))
    Slow.gate.clear()
    store.save(1, model, None, {})
    assert directory.iterations(location_of(tmp_path)) == []
    assert not store.failed
    Slow.gate.set()
    store.save(2, model, None, {})
    assert directory.iterations(location_of(tmp_path))[-1] == 1
    store.close()
    assert directory.iterations(location_of(tmp_path)) == [2, 1]


def test_failure_shows_at_the_next_step_and_at_the_end(tmp_path: Path):
    store = CheckpointStore(Location(Broken(), str(tmp_path)))
    store.save(1, toy.build()[0], None, {})
    for _ in range(1000):
        if store.failed:
            break
        threading.Event().wait(0.01)
    assert store.failed
    with pytest.raises(ProblemError) as caught:
        store.wait()
    (problem,) = caught.value.problems
    assert (problem.option, problem.value) == ("--save", f"{tmp_path}/iter_0000001") and problem.kind == "unwritable"
    assert problem.limit == [0]  # the rank that failed
    store.close()
    assert list(tmp_path.iterdir()) == []


def fail_on_one_rank(rank: int, world_size: int, root: Path) -> list[Problem]:
    model, optimizer = toy.build(world_size)
    store = CheckpointStore(location_of(root), group=toy.background())
    store.save(1, model, optimizer, {})
    store.wait()
    if rank == 1:
        store.root = Location(Broken(), str(root))
    store.save(2, model, optimizer, {})
    with pytest.raises(ProblemError) as caught:
        store.close()
    return caught.value.problems


def test_failure_of_one_rank_is_known_to_all(tmp_path: Path, pool):
    for problems in pool.run(fail_on_one_rank, 2, tmp_path):
        assert [(problem.option, problem.kind, problem.limit) for problem in problems] == [
            ("--save", "unwritable", [1])
        ]
    assert directory.iterations(location_of(tmp_path)) == [1]


@pytest.mark.slow
def test_full_disk(tmp_path: Path):
    """A real limit on the size of files, in a process of its own."""
    script = textwrap.dedent(f"""
        import resource, signal, torch
        from cordee.checkpoint.storage import LocalStorage, Location, location_of
        from cordee.checkpoint.store import CheckpointStore
        from cordee.errors import Problem, ProblemError
        store = CheckpointStore(location_of({str(tmp_path)!r}))
        store.save(1, torch.nn.Linear(8, 8), None, {{}})
        store.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        store.save(2, torch.nn.Linear(1000, 1000), None, {{}})
        try:
            store.close()
        except ProblemError as error:
            print([(problem.option, problem.kind) for problem in error.problems])
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == str([("--save", "unwritable")])
    assert directory.latest(location_of(tmp_path)) == (1, [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", directory.TRACKER]


def test_what_does_not_fit_is_named(tmp_path: Path):
    store = CheckpointStore(location_of(tmp_path))
    store.save(1, torch.nn.Sequential(torch.nn.Linear(3, 4)), None, {})
    store.close()
    other = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 5))
    with pytest.raises(ProblemError) as caught:
        restore(location_of(tmp_path / "iter_0000001"), other)
    found = {problem.limit for problem in caught.value.problems}
    assert found == {"model.0.weight", "model.0.bias", "model.1.weight", "model.1.bias"}
    assert {problem.kind for problem in caught.value.problems} == {"shape"}


def test_optimizer_without_state(tmp_path: Path):
    model, optimizer = toy.build()
    store = CheckpointStore(location_of(tmp_path))
    store.save(1, model, None, {})
    store.close()
    optimizer.state.clear()
    restore(location_of(tmp_path / "iter_0000001"), model, optimizer)
    assert not optimizer.state
