"""Runs over two nodes, which are two groups of processes of this machine that know each other by the launcher only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cordee.train import job
from cordee.train.options import TrainConfig
from tests.matrix import on_demand
from tests.train import tiny
from tests.train.test_kill import children, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[float]:
    given = tiny.config(tmp_path_factory.mktemp("one"))
    job.run(given)
    return tiny.losses(given)


def free_port(first: int = 12000, last: int = 31999) -> int:
    for port in range(first + os.getpid() % 10000, last):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")


def options_file(folder: Path, given: TrainConfig) -> str:
    """What differs from the defaults of a tiny run, over tensor- and data-parallel ranks."""
    file = folder / "run.yaml"
    values = {name: getattr(given, name) for name in tiny.config(folder).__dataclass_fields__}
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    file.write_text(yaml.safe_dump({name: value for name, value in values.items() if value not in (None, {}, [])}))
    return str(file)


def start(command: list[str], variables: dict[str, str]) -> subprocess.Popen:
    environ = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return subprocess.Popen(
        command,
        env={**environ, "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def agents():
    """Starts agents of torchrun, as `_agents` does; none is left after the test."""
    started: list[subprocess.Popen] = []

    def start_agents(file: str, *more: str) -> list[subprocess.Popen]:
        started.extend(_agents(file, *more))
        return started

    yield start_agents
    for agent in started:
        if agent.poll() is None:
            agent.terminate()  # which it passes on to its ranks
        agent.communicate()


def _agents(file: str, *more: str) -> list[subprocess.Popen]:
    """Two agents of torchrun, as `torchrun ... $(which cordee) train` starts them on two nodes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", *more]
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=7"]
    command = [*torchrun, *meeting, "--local-addr=127.0.0.1", "-m", "cordee", "train", "--config", file]
    return [start(command, {}) for _ in range(2)]


def require_success(processes: list[subprocess.Popen]) -> None:
    said = [process.communicate(timeout=180)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)


@pytest.mark.parametrize("tensor", [2, *on_demand(1)])
def test_torchrun(tmp_path: Path, agents, expected: list[float], tensor: int):
    given = tiny.config(tmp_path, nproc_per_node=2, tensor_model_parallel_size=tensor)
    require_success(agents(options_file(tmp_path, given)))
    assert tiny.losses(given) == pytest.approx(expected, rel=1e-5)


def test_slurm(tmp_path: Path, expected: list[float]):
    given = tiny.config(tmp_path, nproc_per_node=None, tensor_model_parallel_size=2)
    file = options_file(tmp_path, given)
    tasks = []
    job_id = free_port() - 12000  # which decides where the ranks meet
    for rank in range(4):
        variables = {
            "SLURM_PROCID": str(rank),
            "SLURM_NTASKS": "4",
            "SLURM_LOCALID": str(rank % 2),
            "SLURM_NODEID": str(rank // 2),
            "SLURM_TASKS_PER_NODE": "2(x2)",
            "SLURM_JOB_NODELIST": "localhost,elsewhere",
            "SLURM_JOB_ID": str(job_id),
        }
        tasks.append(start([sys.executable, "-m", "cordee", "train", "--config", file], variables))
    require_success(tasks)
    assert tiny.losses(given) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_both_nodes_start_anew_after_a_rank_has_died(tmp_path: Path, agents):
    """Only the agent of the dead rank counts a restart; for the other one, nodes have come and gone."""
    steps = {"train_iters": 60, "save_interval": 5}
    whole = tiny.config(tmp_path, save=str(tmp_path / "whole"), **steps)
    job.run(whole)
    run = tmp_path / "run"
    given = tiny.config(tmp_path, nproc_per_node=2, tensor_model_parallel_size=2, load=str(run), **steps)
    first, second = agents(options_file(tmp_path, given), "--max-restarts=1", "--monitor-interval=0.1")
    wait_until(first, lambda: any(run.glob("iter_*")))
    os.kill(children(second)[-1], signal.SIGKILL)
    require_success([first, second])
    assert tiny.losses(given) == pytest.approx(tiny.losses(whole), rel=1e-5)
