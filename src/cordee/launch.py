"""Which process this is, and the launch of the others.

Owns the launchers' environment variables and the life of local processes: signals go to all of them, one that dies
takes the others with it, and none outlives the launcher. Must not import torch: it runs before any job does.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

from cordee.errors import Problem, ProblemError, RankLostError

_LAUNCHER = "CORDEE_LAUNCHER"  # names who started the processes of `spawn_local`
CORDEE = "cordee"  # its value
_PIPE = "CORDEE_LAUNCHER_PIPE"  # file descriptor that reaches its end when the launcher is gone
_SOCKET = "CORDEE_LAUNCHER_SOCKET"  # file descriptor of the socket at which rank 0 listens for the others
_GRACE = "CORDEE_LAUNCHER_GRACE"  # seconds a process has to end after that
_LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.02
_GRACE_AFTER_FAILURE = 30.0  # at most: the others may wait for the dead rank for ever
# After a rank found problems, or lost the others, the rest will end, and say why, by themselves, so long at most: who
# has lost others takes up to `LOST_SECONDS` of train/exits.py to end in order, and is not to be blamed meanwhile.
_CAUSE_SECONDS = {ProblemError.exit_code: 5.0, RankLostError.exit_code: 15.0}
_KEPT_LINES = 50  # of the hidden output of a rank, to show if it fails


# ----------------------------------------------------------------------------------------- who am I, among how many


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """Place of this process in the run. `launcher` is who started it; empty for a process on its own.

    `agent_store`: its agent, not rank 0, listens at `master_port` for processes that want to find each other.
    `listen_fd`: a socket's file descriptor, bound to that port, at which rank 0 listens.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = _LOOPBACK
    master_port: int = 29500
    launcher: str = ""
    agent_store: bool = False
    listen_fd: int | None = None

    def environ(self) -> dict[str, str]:
        """The variables under which torch.distributed looks for this."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def rank_info(environ: Mapping[str, str] | None = None) -> RankInfo:
    """Place of this process by the variables of torchrun, Slurm, Open MPI or PMI, in this order; else on its own.

    Raises `ProblemError` if a launcher's variables are incomplete or contradict each other.
    """
    environ = os.environ if environ is None else environ
    for read in (_from_torchrun, _from_slurm, _from_open_mpi, _from_pmi):
        if (info := read(environ)) is not None:
            return _checked(info)
    return RankInfo()


def world_size(nproc_per_node: int | None) -> int:
    """Processes of the run: those the launcher started, else those that are asked for."""
    here = rank_info()
    return here.world_size if here.launcher else nproc_per_node or 1


def rank_0_speaks() -> bool:
    """Whether what all ranks would say can be left to rank 0: our launcher lets it finish, others may kill it first."""
    return rank_info().launcher == CORDEE and rank_info().rank != 0


def _checked(info: RankInfo) -> RankInfo:
    places = (("rank", info.rank, info.world_size), ("local rank", info.local_rank, info.local_world_size))
    problems = [
        Problem(f"{name} of {info.launcher}", place, f"it must be below {size}, their number", "check the job")
        for name, place, size in places
        if not 0 <= place < size
    ]
    if problems:
        raise ProblemError(problems)
    return info


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        problem = Problem(name, text, "the launcher should have set a whole number", "check how the job is started")
        raise ProblemError([problem]) from None


def _from_torchrun(environ: Mapping[str, str]) -> RankInfo | None:
    if "RANK" not in environ or "WORLD_SIZE" not in environ:
        return None
    rank, size = _integer(environ, "RANK"), _integer(environ, "WORLD_SIZE")
    local_rank = _integer(environ, "LOCAL_RANK", rank)
    return RankInfo(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_world_size=_integer(environ, "LOCAL_WORLD_SIZE", size),
        master_addr=environ.get("MASTER_ADDR", _LOOPBACK),
        master_port=_integer(environ, "MASTER_PORT", 29500),
        launcher=environ.get(_LAUNCHER, "torchrun"),
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        listen_fd=_integer(environ, _SOCKET) if environ.get(_SOCKET) else None,
    )


def _from_slurm(environ: Mapping[str, str]) -> RankInfo | None:
    """A task of `srun`; a step of one task is a process on its own."""
    if "SLURM_PROCID" not in environ or _integer(environ, "SLURM_NTASKS", 1) < 2:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    job = _integer(environ, "SLURM_JOB_ID", _integer(environ, "SLURM_JOBID", 0))
    step = _integer(environ, "SLURM_STEP_ID", 0)
    return RankInfo(
        rank=_integer(environ, "SLURM_PROCID"),
        world_size=_integer(environ, "SLURM_NTASKS"),
        local_rank=_integer(environ, "SLURM_LOCALID", 0),
        local_world_size=_slurm_tasks_here(environ),
        master_addr=environ.get("MASTER_ADDR") or first_host(nodes or _LOOPBACK),
        # The same on every node and different for jobs that share one; below the ports that systems hand out.
        master_port=_integer(environ, "MASTER_PORT", 12000 + (job + 101 * step) % 20000),
        launcher="slurm",
    )


def _slurm_tasks_here(environ: Mapping[str, str]) -> int:
    """Tasks on this node, from `4(x2),3`: 4 on each of the first two nodes, 3 on the next."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    if not text:
        return _integer(environ, "SLURM_NTASKS")
    counts: list[int] = []
    for count, repeat in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(count)] * int(repeat or 1)
    node = _integer(environ, "SLURM_NODEID", 0)
    return counts[min(node, len(counts) - 1)]


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[003-005,9],login` -> `gpu003`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else nodelist)


def _from_open_mpi(environ: Mapping[str, str]) -> RankInfo | None:
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return _from_mpi(environ, "Open MPI", *names)


def _from_pmi(environ: Mapping[str, str]) -> RankInfo | None:
    """MPICH, Intel MPI and other launchers that speak PMI."""
    return _from_mpi(environ, "MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")


def _from_mpi(
    environ: Mapping[str, str], launcher: str, rank: str, size: str, local_rank: str, local_size: str
) -> RankInfo | None:
    if rank not in environ or _integer(environ, size, 1) < 2:
        return None
    world_size = _integer(environ, size)
    local_world_size = _integer(environ, local_size, world_size)
    if local_world_size < world_size and "MASTER_ADDR" not in environ:
        why = f"{launcher} has started processes on several nodes, and does not say where rank 0 is"
        raise ProblemError([Problem("MASTER_ADDR", None, why, "export MASTER_ADDR=<host of rank 0> to all processes")])
    return RankInfo(
        rank=_integer(environ, rank),
        world_size=world_size,
        local_rank=_integer(environ, local_rank, _integer(environ, rank) % local_world_size),
        local_world_size=local_world_size,
        master_addr=environ.get("MASTER_ADDR", _LOOPBACK),
        master_port=_integer(environ, "MASTER_PORT", 29500),
        launcher=launcher,
    )


# --------------------------------------------------------------------------------------------------- the launcher


def spawn_local(
    argv: Sequence[str],
    nproc: int,
    *,
    grace_seconds: float = 120.0,
    command: Sequence[str] = (sys.executable, "-m", "cordee"),
) -> int:
    """Run `command *argv` in `nproc` processes of this machine that form one run, and return its exit code.

    The code is 0 if all end with 0, else that of the first process that failed (128 + number for a signal); when one
    fails the others are told to stop. SIGINT, SIGTERM and SIGHUP are passed on once; the processes have
    `grace_seconds` to end, and a second signal kills them. Standard output is that of rank 0, the other ranks' is
    shown only if they fail, their standard error with the rank before each line. Call it in the main thread.
    """
    lifeline, held = os.pipe()  # nothing is written: processes read the end of the file when this one is gone
    processes: list[_Process] = []
    # Held until rank 0 has it: a port that is only looked up may be another's when rank 0 comes to listen.
    with _noted_signals() as signals, socket.socket() as meeting:
        try:
            meeting.bind((_LOOPBACK, 0))
            port = meeting.getsockname()[1]
            for rank in range(nproc):
                info = RankInfo(
                    rank=rank,
                    world_size=nproc,
                    local_rank=rank,
                    local_world_size=nproc,
                    master_port=port,
                    listen_fd=None if rank else meeting.fileno(),
                )
                processes.append(_Process([*command, *argv], info, lifeline, grace_seconds))
                meeting.close()  # if it stayed open here, a dead rank 0 would seem to listen
            return _supervise(processes, signals, grace_seconds)
        finally:
            for process in processes:
                process.close()
            os.close(lifeline)
            os.close(held)


def follow_launcher() -> None:
    """In a process of `spawn_local`: end when the launcher is gone, even by SIGKILL; in order, if the grace allows."""
    if (lifeline := os.environ.pop(_PIPE, None)) is None:
        return
    grace_seconds = float(os.environ.pop(_GRACE))

    def follow() -> None:
        os.read(int(lifeline), 1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=follow, name="follow-launcher", daemon=True).start()


class _Process:
    """One process of the run, in its own session so that the terminal's Ctrl-C reaches it only through us."""

    def __init__(self, command: Sequence[str], info: RankInfo, lifeline: int, grace_seconds: float):
        self.rank = info.rank
        self.hidden: deque[str] = deque(maxlen=_KEPT_LINES)
        shown = info.rank == 0
        self._popen = subprocess.Popen(
            command,
            env={
                "OMP_NUM_THREADS": str(max(1, _cores() // info.local_world_size)),
                **os.environ,
                **info.environ(),
                _LAUNCHER: CORDEE,
                _PIPE: str(lifeline),
                _GRACE: str(grace_seconds),
                _SOCKET: "" if info.listen_fd is None else str(info.listen_fd),
            },
            stdin=subprocess.DEVNULL,
            stdout=None if shown else subprocess.PIPE,
            stderr=None if shown else subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=[fd for fd in (lifeline, info.listen_fd) if fd is not None],
            start_new_session=True,
        )
        self._readers = [] if shown else [self._read(self._popen.stdout, self.hidden.append)]
        self._readers += [] if shown else [self._read(self._popen.stderr, self._show)]

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that killed it."""
        return self._popen.poll()

    def send(self, number: int) -> None:
        """To the process alone: its helpers (data workers, compilers) are needed until it has ended in order."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """The process and its helpers, at once."""
        if self.exit_code() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)

    def close(self) -> None:
        """Nothing is left of the process afterwards, and all it said is read."""
        self.kill()
        self._popen.wait()
        self._read_to_the_end()

    def show_hidden(self) -> None:
        """The last lines of the standard output of a process that has ended."""
        self._read_to_the_end()
        for line in list(self.hidden):
            self._show(line)

    def _read_to_the_end(self) -> None:
        for reader in self._readers:
            reader.join(timeout=1.0)  # no longer: a helper that was left behind may hold the pipe open

    def _show(self, line: str) -> None:
        sys.stderr.write(f"[rank {self.rank}] {line}")
        sys.stderr.flush()

    def _read(self, stream: IO[str] | None, use: Callable[[str], None]) -> threading.Thread:
        assert stream is not None

        def read() -> None:
            with stream:
                for line in stream:
                    use(line)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        return thread


def _supervise(processes: Sequence[_Process], signals: Sequence[int], grace_seconds: float) -> int:
    """Wait for all processes, pass signals on, stop all when one fails. Returns the exit code of the run."""
    failed: _Process | None = None
    passed_on = 0
    deadline = float("inf")
    blame_at = None  # when to take a rank that failed for the cause, and to stop the others
    while running := [process for process in processes if process.exit_code() is None]:
        if len(signals) > passed_on:
            if passed_on:
                return _kill(running, 128 + signals[0], "a second signal came")
            _send(running, signals[0])
            deadline = time.monotonic() + grace_seconds
            passed_on = len(signals)
        elif failed is None and not signals and (first := _first_failed(processes)):
            wait = _CAUSE_SECONDS.get(first.exit_code() or 0, 0.0)
            blame_at = blame_at or time.monotonic() + wait
            if not wait or time.monotonic() >= blame_at:
                failed = first
                _report(failed, running)
                _send(running, signal.SIGTERM)
                deadline = time.monotonic() + min(grace_seconds, _GRACE_AFTER_FAILURE)
        if time.monotonic() > deadline:
            code = _shell_code(failed) if failed else 128 + signals[0]
            return _kill(running, code, "it did not end in time")
        time.sleep(_POLL_SECONDS)
    if failed is None and (failed := _first_failed(processes)) and not signals:
        _report(failed)
    return _shell_code(failed) if failed else 0


def _first_failed(processes: Sequence[_Process]) -> _Process | None:
    """The process that failed; of several at once one that a signal killed, for the others fail in its wake, and last
    of all one that says so itself.
    """
    failed = [process for process in processes if process.exit_code() not in (None, 0)]

    def order(process: _Process) -> tuple[bool, bool, int]:
        return _lost_others(process), (process.exit_code() or 0) > 0, process.rank

    return min(failed, key=order, default=None)


def _lost_others(process: _Process) -> bool:
    return process.exit_code() == RankLostError.exit_code


def _shell_code(process: _Process) -> int:
    code = process.exit_code() or 0
    return code if code >= 0 else 128 - code


def _send(processes: Sequence[_Process], number: int) -> None:
    for process in processes:
        process.send(signal.SIGTERM if number == signal.SIGHUP else number)


def _kill(processes: Sequence[_Process], code: int, why: str) -> int:
    _say(f"killed rank {_ranks(processes)}: {why}")
    for process in processes:
        process.kill()
    return code


def _ranks(processes: Sequence[_Process]) -> str:
    return ", ".join(str(process.rank) for process in processes)


def _report(process: _Process, running: Sequence[_Process] = ()) -> None:
    """Say what stops the run: the end of `process`, or, if that lost the others, those `running` that left it alone."""
    code = process.exit_code() or 0
    if code > 0:
        how = f"ended with exit code {code}"
        if _lost_others(process) and running:
            how += f" because rank {_ranks(running)} did not answer"
    else:
        how = f"was killed by {signal.Signals(-code).name}"
        how += ", often a sign that memory ran out" if -code == signal.SIGKILL else ""
    process.show_hidden()
    _say(f"rank {process.rank} {how}; stopping the run")


def _say(text: str) -> None:
    print(f"cordee: {text}", file=sys.stderr, flush=True)


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Signals that arrive meanwhile, in order, instead of what they would do."""
    noted: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: noted.append(number)) for number in numbers}
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
