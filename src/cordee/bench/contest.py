"""Contenders that take turns.

Owns their processes and whose turn it is. Each contender lives in a process of its own, so that its memory is its
own, and works only while it holds the turn, so that none disturbs another. All of them meet the machine's slow and
fast minutes in the same rounds, and only figures of the same round are compared. Must not import torch: the peak memory
that the system reports for a process begins at that of the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Protocol

from cordee import device
from cordee.errors import ProblemError


@dataclass(frozen=True)
class Turn:
    """What a contender did in one turn: `seconds` of each piece of work, further `figures`, and its peak memory."""

    seconds: list[float]
    figures: dict[str, float] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Baton(Protocol):
    """How a contender takes its turns: `while baton.take(): baton.give(seconds)`."""

    def take(self) -> bool:
        """Wait for the turn; False if the contest is over."""
        ...

    def give(self, seconds: Sequence[float], **figures: float) -> None:
        """End the turn."""
        ...


class Shift:
    """The turns of a loop: call `piece_done` after every piece of work, and leave when `over`."""

    def __init__(self, baton: Baton, pieces: int):
        """`pieces` of work are a turn. Waits for the first."""
        self._baton = baton
        self._pieces = pieces
        self._seconds: list[float] = []
        self.over = not baton.take()
        self._last = time.perf_counter()

    def piece_done(self, **figures: float) -> None:
        """Note a piece of work; after the last one of a turn, wait for the next turn."""
        self._seconds.append(time.perf_counter() - self._last)
        if len(self._seconds) == self._pieces:
            self._baton.give(self._seconds, **figures)
            self._seconds = []
            self.over = not self._baton.take()
        self._last = time.perf_counter()


@dataclass(frozen=True)
class Contender:
    """`play(baton, *args)` is importable, and runs in a process of its own from warm-up to the last turn."""

    name: str
    play: Callable[..., None]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Results:
    """The turns of every contender by its name, one a round; warm-up left out."""

    turns: dict[str, list[Turn]]

    def median(self, name: str) -> float:
        """Median seconds of a piece of work, over all rounds."""
        return statistics.median(second for turn in self.turns[name] for second in turn.seconds)

    def ratio(self, name: str, other: str) -> float:
        """How many times as long `other` took as `name`: the median of the rounds' own ratios."""
        pairs = zip(self.turns[name], self.turns[other], strict=True)
        return statistics.median(theirs.median / ours.median for ours, theirs in pairs)

    def figure(self, name: str, key: str) -> float:
        """Median over rounds of a figure that a contender gave with its turns."""
        return statistics.median(turn.figures[key] for turn in self.turns[name])

    def peak_bytes(self, name: str) -> int:
        return max(turn.peak_bytes for turn in self.turns[name])


def hold(
    contenders: Sequence[Contender], rounds: int, threads: int, on_turn: Callable[[int, str, Turn], None] | None = None
) -> Results:
    """Let every contender work once a round, after a first round that is not counted.

    `threads` is the number of CPU threads of each; `on_turn(round, name, turn)` sees every turn, round 0 too.
    Raises ProblemError for what a contender reports, RuntimeError with its traceback if it fails otherwise."""
    turns: dict[str, list[Turn]] = {contender.name: [] for contender in contenders}
    with ExitStack() as stack:
        seats = [stack.enter_context(_Seat(contender, threads)) for contender in contenders]
        for number in range(rounds + 1):
            for contender, seat in zip(contenders, seats, strict=True):
                turn = seat.turn()
                if on_turn is not None:
                    on_turn(number, contender.name, turn)
                if number:
                    turns[contender.name].append(turn)
    return Results(turns)


def once(contender: Contender, threads: int) -> Turn:
    """A single turn in a process that is then over: for memory, whose peak never sinks again."""
    with _Seat(contender, threads) as seat:
        return seat.turn()


def together(contenders: Sequence[Contender], threads: int) -> list[Turn]:
    """A single turn of contenders that work at the same time, as the ranks of a run do, each in its own process."""
    with ExitStack() as stack:
        seats = [stack.enter_context(_Seat(contender, threads)) for contender in contenders]
        for seat in seats:
            seat.begin()
        return [seat.end() for seat in seats]


def apart(prepare: Callable[..., None], *args: Any) -> None:
    """Call an importable function in a process of its own, which takes its memory with it."""
    once(Contender(prepare.__name__, _prepare, (prepare, *args)), os.cpu_count() or 1)


def _prepare(baton: Baton, prepare: Callable[..., None], *args: Any) -> None:
    baton.take()
    prepare(*args)
    baton.give([0.0])


class _Seat:
    """The process of one contender, seen from outside."""

    def __init__(self, contender: Contender, threads: int):
        self._name = contender.name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_play, args=(theirs, contender, threads), daemon=False)
        self._process.start()
        theirs.close()

    def turn(self) -> Turn:
        self.begin()
        return self.end()

    def begin(self) -> None:
        self._connection.send(True)

    def end(self) -> Turn:
        try:
            result = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self._name}: its process died with exit code {self._process.exitcode}") from None
        if isinstance(result, ProblemError):
            raise result
        if isinstance(result, str):
            raise RuntimeError(f"{self._name}:\n{result}")
        return result

    def __enter__(self) -> _Seat:
        return self

    def __exit__(self, kind: object, *exception: object) -> None:
        self._connection.close()
        if kind is not None:
            self._process.terminate()
        self._process.join()


class _PipeBaton:
    """The contender's end. A closed pipe is the end of the contest."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def take(self) -> bool:
        try:
            return self._connection.recv()
        except EOFError:
            return False

    def give(self, seconds: Sequence[float], **figures: float) -> None:
        self._connection.send(Turn(list(seconds), figures, _peak_bytes()))


def _peak_bytes() -> int:
    """Of the accelerator or, on a CPU, resident; asked without torch if this process has none."""
    return device.memory().peak if "torch" in sys.modules else device.peak_resident_bytes()


def _play(connection: Connection, contender: Contender, threads: int) -> None:
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(threads)  # read when the libraries start, which they have not yet
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    try:
        contender.play(_PipeBaton(connection), *contender.args)
    except ProblemError as error:
        connection.send(error)
    except Exception:
        connection.send(traceback.format_exc())
