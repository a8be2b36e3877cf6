"""The local processes of one run: started, watched, ended together.

Owns their life: signals go to all of them, one that dies takes the others with it, and none outlives the supervisor.
Must not import torch: it runs before any job does."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from cordee.errors import ProblemError, RankLostError
from cordee.launch import CORDEE, LOOPBACK, RankInfo

_PIPE = "CORDEE_LAUNCHER_PIPE"  # file descriptor that reaches its end when the supervisor is gone
_GRACE = "CORDEE_LAUNCHER_GRACE"  # seconds a process has to end after that
_COMMAND = (sys.executable, "-m", "cordee")
_POLL_SECONDS = 0.02
_GRACE_AFTER_FAILURE = 30.0  # at most: the others may wait for the dead rank for ever
# After a rank found problems, or lost the others, the rest will end, and say why, by themselves, so long at most: who
# has lost others takes up to `LOST_SECONDS` of train/exits.py to end in order, and is not to be blamed meanwhile.
_CAUSE_SECONDS = {ProblemError.exit_code: 5.0, RankLostError.exit_code: 15.0}
_KEPT_LINES = 50  # of the hidden output of a rank, to show if it fails


def spawn_local(
    argv: Sequence[str], nproc: int, *, grace_seconds: float = 120.0, command: Sequence[str] = _COMMAND
) -> int:
    """Run `command *argv` in `nproc` processes of this machine that form one run, and return its exit code.

    The code is 0 if all end with 0, else that of the first process that failed (128 + number for a signal); when one
    fails the others are stopped. SIGINT, SIGTERM and SIGHUP are passed on once; the processes have
    `grace_seconds` to end, and a second signal kills them. Standard output is that of rank 0, the other ranks' is
    shown only if they fail, their standard error with the rank before each line. Call it in the main thread."""
    lifeline, held = os.pipe()  # nothing is written: processes read the end of the file when this one is gone
    processes: list[_Process] = []
    # Held until rank 0 has it: a port that is only looked up may be another's when rank 0 comes to listen.
    with _caught_signals() as signals, socket.socket() as rendezvous:
        try:
            rendezvous.bind((LOOPBACK, 0))
            port = rendezvous.getsockname()[1]
            for rank in range(nproc):
                info = RankInfo(
                    rank=rank,
                    world_size=nproc,
                    local_rank=rank,
                    local_world_size=nproc,
                    master_port=port,
                    launcher=CORDEE,
                    listen_fd=None if rank else rendezvous.fileno(),
                )
                processes.append(_Process([*command, *argv], info, lifeline, grace_seconds))
                rendezvous.close()  # if it stayed open here, a dead rank 0 would seem to listen
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
                _PIPE: str(lifeline),
                _GRACE: str(grace_seconds),
            },
            stdin=subprocess.DEVNULL,
            stdout=None if shown else subprocess.PIPE,
            stderr=None if shown else subprocess.PIPE,
            text=True,
            errors="replace",
            pass_fds=[fd for fd in (lifeline, info.listen_fd) if fd is not None],
            start_new_session=True,
        )
        pipes = ((self._popen.stdout, self.hidden.append), (self._popen.stderr, self._show))
        self._readers = [_read_lines(pipe, use) for pipe, use in pipes if pipe is not None]

    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that killed it."""
        return self._popen.poll()

    @property
    def lost_others(self) -> bool:
        return self.exit_code() == RankLostError.exit_code

    def send(self, number: int) -> None:
        """To the process alone: its helpers (data workers, compilers) are needed until it has ended in order."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """The process and its helpers, at once."""
        if self.exit_code() is None:
            os.killpg(self._popen.pid, signal.SIGKILL)

    def close(self) -> None:
        """Nothing is left of the process afterwards, and all its output is read."""
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


def _read_lines(stream: IO[str], use: Callable[[str], None]) -> threading.Thread:
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
            return _kill(running, _shell_code(failed) if failed else 128 + signals[0], "it did not end in time")
        time.sleep(_POLL_SECONDS)
    if failed is None and (failed := _first_failed(processes)) and not signals:
        _report(failed)
    return _shell_code(failed) if failed else 0


def _first_failed(processes: Sequence[_Process]) -> _Process | None:
    """The process that failed first: of several, one that a signal killed, and last one that reports itself lost."""
    failed = [process for process in processes if process.exit_code() not in (None, 0)]

    def order(process: _Process) -> tuple[bool, bool, int]:
        return process.lost_others, (process.exit_code() or 0) > 0, process.rank

    return min(failed, key=order, default=None)


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
    """Report what stops the run: the end of `process`, or of those `running` that it lost."""
    code = process.exit_code() or 0
    if code > 0:
        how = f"ended with exit code {code}"
        if process.lost_others and running:
            how += f" because rank {_ranks(running)} did not answer"
    else:
        how = f"was killed by {signal.Signals(-code).name}"
        how += ", often a sign that memory ran out" if -code == signal.SIGKILL else ""
    process.show_hidden()
    _say(f"rank {process.rank} {how}; stopping the run")


def _say(text: str) -> None:
    print(f"cordee: {text}", file=sys.stderr, flush=True)


@contextmanager
def _caught_signals() -> Iterator[list[int]]:
    """Signals that arrive meanwhile, in order, instead of what they would do."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: caught.append(number)) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
