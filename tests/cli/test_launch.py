"""Who am I among how many, and the life of local processes; the children are tiny and know no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from cordee.errors import ProblemError
from cordee.launch import RankInfo, first_host, rank_info

# ------------------------------------------------------------------------------------------------------- RankInfo

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "1234",
}
SLURM = {
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_TASKS_PER_NODE": "4,3",
    "SLURM_JOB_NODELIST": "gpu[07-09,11],cpu1",
    "SLURM_JOB_ID": "4711",
}


def test_alone():
    info = rank_info({})
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size, info.launcher) == (0, 1, 0, 1, "")


def test_torchrun():
    expected = RankInfo(
        rank=5,
        world_size=8,
        local_rank=1,
        local_world_size=4,
        master_addr="node0",
        master_port=1234,
        launcher="torchrun",
    )
    assert rank_info(TORCHRUN) == expected
    assert rank_info(TORCHRUN | SLURM) == expected
    assert rank_info(expected.environ()) == expected


def test_slurm():
    info = rank_info(SLURM)
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (6, 7, 2, 3)
    assert (info.master_addr, info.launcher) == ("gpu07", "slurm")
    assert info.master_port == rank_info(SLURM | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master_port
    assert info.master_port != rank_info(SLURM | {"SLURM_JOB_ID": "4712"}).master_port
    assert 1024 < rank_info(SLURM | {"SLURM_JOB_ID": "99999999"}).master_port < 32768


def test_slurm_prefers_the_step_and_what_the_user_exports():
    info = rank_info(SLURM | {"SLURM_STEP_NODELIST": "a1", "SLURM_STEP_TASKS_PER_NODE": "7(x2)", "MASTER_PORT": "99"})
    assert (info.master_addr, info.local_world_size, info.master_port) == ("a1", 7, 99)
    assert rank_info(SLURM | {"MASTER_ADDR": "here"}).master_addr == "here"


def test_a_single_slurm_task_is_alone():
    assert rank_info({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}).launcher == ""


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[3-5]", "node3"),
        ("node[003-005,9],x", "node003"),
        ("node[9,3]", "node9"),
        ("rack[1-2]n[07-09]-ib", "rack1n07-ib"),
        ("a-b.c,d[1-2]", "a-b.c"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


def test_mpi():
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    info = rank_info(dict(zip(names, ("3", "4", "1", "2"), strict=True)) | {"MASTER_ADDR": "n0", "MASTER_PORT": "7"})
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (3, 4, 1, 2)
    assert (info.master_addr, info.master_port) == ("n0", 7)
    info = rank_info({"PMI_RANK": "1", "PMI_SIZE": "2"})
    assert (info.rank, info.world_size, info.local_rank, info.local_world_size) == (1, 2, 1, 2)
    with pytest.raises(ProblemError) as caught:
        rank_info(dict(zip(names, ("3", "4", "1", "2"), strict=True)))
    assert [problem.option for problem in caught.value.problems] == ["MASTER_ADDR"]


@pytest.mark.parametrize("change", [{"RANK": "x"}, {"RANK": "8"}, {"LOCAL_RANK": "4"}, {"WORLD_SIZE": ""}])
def test_broken_variables(change):
    with pytest.raises(ProblemError):
        rank_info(TORCHRUN | change)


# ---------------------------------------------------------------------------------------------------- spawn_local

CHILD = """
    import os, signal, sys, time
    from pathlib import Path
    from cordee.launch import rank_info
    from cordee.supervisor import follow_launcher
    follow_launcher()
    me = rank_info()
    rank = me.rank
    Path(f"pid{rank}").write_text(str(os.getpid()))

    def note(text):
        with open(f"notes{rank}", "a") as file:
            file.write(text + "\\n")

    def handle(number, frame):
        note(signal.Signals(number).name)
        sys.exit(128 + number)

    def orderly():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, handle)
        Path(f"ready{rank}").touch()
        time.sleep(60)

    def stubborn():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: note(signal.Signals(number).name))
        Path(f"ready{rank}").touch()
        while True:
            time.sleep(60)
"""
PARENT = """
    import sys
    from cordee.supervisor import spawn_local
    sys.exit(spawn_local([], int(sys.argv[1]), grace_seconds=float(sys.argv[2]), command=(sys.executable, "child.py")))
"""


class Run:
    """A launcher in a process of its own, whose children run `body` after the definitions of CHILD."""

    def __init__(self, folder: Path, body: str, nproc: int, grace: float):
        self.folder, self.nproc = folder, nproc
        (folder / "child.py").write_text(textwrap.dedent(CHILD) + textwrap.dedent(body))
        (folder / "parent.py").write_text(textwrap.dedent(PARENT))
        environ = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
        self.process = subprocess.Popen(
            [sys.executable, "parent.py", str(nproc), str(grace)],
            cwd=folder,
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=180)
        return self.process.returncode, out, err

    def ready(self) -> None:
        wait_until(lambda: all((self.folder / f"ready{rank}").exists() for rank in range(self.nproc)))

    def notes(self, rank: int) -> list[str]:
        file = self.folder / f"notes{rank}"
        return file.read_text().split() if file.exists() else []

    def pids(self) -> list[int]:
        return [int((self.folder / f"pid{rank}").read_text()) for rank in range(self.nproc)]


def wait_until(condition) -> None:
    for _ in range(1500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it did not happen within 30 s")


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and is not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def start(tmp_path):
    runs: list[Run] = []

    def start(body: str, nproc: int = 2, grace: float = 20.0) -> Run:
        runs.append(Run(tmp_path, body, nproc, grace))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
        run.process.communicate()


def test_rank_0_is_given_the_socket_at_which_the_others_look_for_it(start):
    body = """
        import socket
        if me.listen_fd is not None:
            note(str(socket.socket(fileno=me.listen_fd).getsockname() == (me.master_addr, me.master_port)))
    """
    run = start(body)
    assert run.end()[0] == 0
    assert (run.notes(0), run.notes(1)) == (["True"], [])


def test_processes_form_one_run(start):
    body = """
        threads = os.environ["OMP_NUM_THREADS"]
        assert me.launcher == "cordee" and me.local_rank == rank and me.local_world_size == 3
        assert "CORDEE_LAUNCHER_PIPE" not in os.environ
        note(f"{me.world_size} {me.master_addr} {me.master_port} {threads}")
        print("out of", rank)
        print("err of", rank, file=sys.stderr)
    """
    run = start(body, nproc=3)
    code, out, err = run.end()
    assert code == 0, err
    assert out == "out of 0\n"
    assert sorted(err.splitlines()) == ["[rank 1] err of 1", "[rank 2] err of 2", "err of 0"]
    assert run.notes(0) == run.notes(1) == run.notes(2)
    size, address, port, threads = run.notes(0)
    assert (size, address) == ("3", "127.0.0.1") and int(port) > 0
    assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 3)


def test_a_failure_stops_the_others(start):
    run = start("if rank == 1: print('last words'); sys.exit(7)\norderly()")
    code, out, err = run.end()
    assert (code, out) == (7, "")
    assert "[rank 1] last words\n" in err
    assert "rank 1 ended with exit code 7" in err
    assert run.notes(0) in ([], ["SIGTERM"])  # [] if it had not come to its handler


@pytest.mark.parametrize("cause", ["sys.exit(7)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_the_cause_is_blamed_not_who_lost_it(start, cause: str):
    code, _, err = start(f"if rank == 0: sys.exit(75)\ntime.sleep(0.5)\n{cause}").end()
    assert code == (7 if "7" in cause else 128 + signal.SIGKILL)
    assert "rank 1 " in err and "rank 0 " not in err


def test_problems_of_all_ranks_are_told_by_the_slowest_too(start):
    run = start("if rank == 0: time.sleep(0.5); print('what is wrong', file=sys.stderr)\nsys.exit(2)")
    code, _, err = run.end()
    assert code == 2 and "what is wrong" in err


@pytest.mark.slow
def test_a_lost_rank_is_not_waited_for_for_ever(start):
    run = start("if rank == 0: sys.exit(75)\norderly()")
    code, _, err = run.end()
    assert code == 75 and "rank 0 ended with exit code 75 because rank 1 did not answer" in err
    assert run.notes(1) in ([], ["SIGTERM"])


def test_a_killed_process_is_named(start):
    body = """
        if rank == 1:
            while not Path("ready0").exists(): time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        orderly()
    """
    run = start(body)
    code, _, err = run.end()
    assert code == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL" in err
    assert run.notes(0) == ["SIGTERM"]


def test_the_others_are_killed_after_the_grace(start):
    body = """
        if rank == 1:
            while not Path("ready0").exists(): time.sleep(0.02)
            sys.exit(3)
        stubborn()
    """
    run = start(body, grace=0.3)
    code, _, err = run.end()
    assert code == 3
    assert run.notes(0) == ["SIGTERM"]
    assert "killed rank 0" in err
    assert not any(map(alive, run.pids()))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once(start, number):
    run = start("orderly()")
    run.ready()
    run.process.send_signal(number)
    code, _, err = run.end()
    assert code == 128 + number
    assert run.notes(0) == run.notes(1) == [number.name]
    assert "rank" not in err  # ending in order is no failure


def test_ctrl_c_of_the_terminal_reaches_processes_through_the_launcher_only(start):
    run = start("orderly()")
    run.ready()
    assert len({os.getsid(pid) for pid in (run.process.pid, *run.pids())}) == 3
    run.process.send_signal(signal.SIGTERM)
    run.end()


def test_a_second_signal_kills(start):
    run = start("stubborn()")
    run.ready()
    run.process.send_signal(signal.SIGINT)
    wait_until(lambda: run.notes(0) == run.notes(1) == ["SIGINT"])
    run.process.send_signal(signal.SIGINT)
    code, _, err = run.end()
    assert code == 128 + signal.SIGINT
    assert "a second signal" in err
    assert not any(map(alive, run.pids()))


def test_the_end_of_the_grace_kills(start):
    run = start("stubborn()", grace=0.3)
    run.ready()
    run.process.send_signal(signal.SIGTERM)
    code, _, err = run.end()
    assert code == 128 + signal.SIGTERM
    assert "did not end in time" in err
    assert not any(map(alive, run.pids()))


@pytest.mark.parametrize("body", ["orderly()", "stubborn()"])
def test_no_process_outlives_the_launcher(start, body):
    run = start(body, grace=0.3)
    run.ready()
    run.process.kill()
    wait_until(lambda: not any(map(alive, run.pids())))
    assert run.notes(0) == run.notes(1) == ["SIGTERM"]  # in order first
