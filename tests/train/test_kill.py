"""A real `cordee train` is interrupted at several moments; going on gives the losses of a run that was not."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml

from cordee.checkpoint import directory
from cordee.checkpoint.storage import location_of
from cordee.config.option import options_of
from cordee.train import job
from cordee.train.options import TrainConfig
from tests.matrix import on_demand
from tests.train import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
STEPS = 60


def start(
    given: TrainConfig, folder: Path, command: Sequence[str] = (sys.executable, "-m", "cordee")
) -> subprocess.Popen:
    """`cordee train` in a process of its own, from a YAML file."""
    defaults = {option.name: option.default for option in options_of(TrainConfig)}
    values = {
        name: list(value) if isinstance(value, tuple) else value
        for name in defaults
        if (value := getattr(given, name)) != defaults[name]
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return subprocess.Popen(
        [*command, "train", "--config", str(file)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(process: subprocess.Popen, reached: Callable[[], bool], seconds: float = 180.0) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "the run is stuck"
        time.sleep(0.005)


def moments(given: TrainConfig) -> dict[str, Callable[[], bool]]:
    root, metrics = Path(given.save), Path(given.save) / "metrics.jsonl"
    return {
        "early": lambda: metrics.is_file() and metrics.stat().st_size > 0,
        "while saving": lambda: any(root.glob(".iter_*.new")) if root.is_dir() else False,
        "later": lambda: len(directory.iterations(location_of(root))) >= 3,
    }


def long_run(folder: Path, **options) -> TrainConfig:
    return tiny.config(folder, train_iters=STEPS, save_interval=5, keep_last=3, **options)


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[float]:
    given = long_run(tmp_path_factory.mktemp("whole"))
    job.run(given)
    return tiny.losses(given)


ONE = [("early", signal.SIGINT), ("while saving", signal.SIGKILL), ("later", signal.SIGTERM)]
OTHERS = {(moment, number) for moment, _ in ONE for _, number in ONE} - set(ONE)


@pytest.mark.parametrize(("moment", "number"), [*ONE, *on_demand(*sorted(OTHERS))])
def test_one_process(tmp_path: Path, expected: list[float], number: int, moment: str):
    given = long_run(tmp_path, micro_batch_size=1)
    process = start(given, tmp_path)
    wait_until(process, moments(given)[moment])
    process.send_signal(number)
    process.wait(60)
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number, process.stderr.read()
        assert directory.latest(location_of(given.save))[0] == max(tiny.records(given)), "the last step was not saved"
    assert job.run(tiny.resumed(given)) == 0
    assert tiny.losses(given) == expected
    assert directory.latest(location_of(given.save)) == (STEPS, [])
    assert not list(Path(given.save).glob(".iter_*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, *on_demand(signal.SIGTERM)])
def test_two_processes(tmp_path: Path, expected: list[float], number: int):
    given = long_run(tmp_path, nproc_per_node=2)
    process = start(given, tmp_path)
    wait_until(process, moments(given)["later"])
    process.send_signal(number)
    process.wait(60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    if number == signal.SIGKILL:  # the ranks notice that their launcher is gone, and end in order
        wait_for_quiet(Path(given.save))
    assert job.run(tiny.resumed(given, nproc_per_node=1)) == 0
    assert tiny.losses(given) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_survivors_of_a_dead_rank_say_so(tmp_path: Path):
    given = long_run(tmp_path, nproc_per_node=4)
    process = start(given, tmp_path)
    wait_until(process, moments(given)["later"])
    os.kill(children(process)[2], signal.SIGKILL)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 128 + signal.SIGKILL
    assert "rank 2 was killed by SIGKILL" in said and "Traceback" not in said
    assert "did not end in time" not in said
    for rank in (0, 1, 3):
        assert re.search(rf"rank {rank}\n.* why: it lost the other ranks (in step|while writing the checkpoint)", said)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize(
    ("processes", "number"), [(2, signal.SIGKILL), (4, signal.SIGSTOP), *on_demand((4, signal.SIGKILL))]
)
def test_survivors_within_tensor_parallel_collectives(tmp_path: Path, processes: int, number: int):
    """A rank that dies, and one that hangs: the time-out is 6 s, and the run would take minutes."""
    given = tiny.config(
        tmp_path,
        train_iters=10**5,
        save_interval=10**5,
        nproc_per_node=processes,
        tensor_model_parallel_size=2,
        distributed_timeout_minutes=0.1,
        exit_grace_seconds=10.0,  # for all ranks to say what they know
    )
    process = start(given, tmp_path)
    wait_until(process, moments(given)["early"])
    os.kill(children(process)[1], number)
    _, said = process.communicate(timeout=180)
    if number == signal.SIGKILL:
        assert process.returncode == 128 + signal.SIGKILL and "rank 1 was killed by SIGKILL" in said
    else:
        assert process.returncode == 75 and "because rank 1 did not answer" in said
        assert "Timed out waiting 6000ms" in said and "killed rank 1: it did not end in time" in said
    assert f"{processes} processes = pp 1 x dp {processes // 2} x cp 1 x tp 2\n" in said
    assert "Traceback" not in said
    for rank in {*range(processes)} - {1}:
        assert len(re.findall(rf"rank {rank}\n.* why: it lost the other ranks in step \d+: ", said)) == 1


def wait_for_quiet(root: Path) -> None:
    """Until no file of the run changes any more."""
    before = None
    for _ in range(60):
        time.sleep(1.0)
        now = sorted((str(path), path.stat().st_size) for path in root.rglob("*") if path.is_file())
        if now == before:
            return
        before = now
    raise AssertionError("the ranks outlive their launcher")


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_torchrun_starts_a_run_with_a_dead_rank_anew(tmp_path: Path, expected: list[float]):
    given = long_run(tmp_path, nproc_per_node=2, load=str(tmp_path / "run"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
    process = start(given, tmp_path, [*torchrun, "--monitor-interval=0.1", "-m", "cordee"])
    wait_until(process, moments(given)["later"])
    os.kill(children(process)[-1], signal.SIGKILL)
    assert process.wait(100) == 0, process.stderr.read()
    assert tiny.losses(given) == pytest.approx(expected, rel=1e-5)
