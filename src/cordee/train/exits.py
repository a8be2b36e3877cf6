"""When a run ends, and with which exit code.

Owns the reasons, and the handlers of SIGTERM and SIGINT, which only record a signal. Some reasons are seen by single
ranks only (a signal, a clock): those are counted over all ranks between two steps, so that all stop at the same one.
Knows no collective: the trainer adds up."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from cordee.errors import RankLostError
from cordee.train.options import ExitOptions

WATCHED = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """The first signal that came, as its number; 0 before one does. A second one ends the process at once."""

    def __init__(self) -> None:
        self.received = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(exit_code(number))
        self.received = number


def exit_code(number: int) -> int:
    """What a shell reports for a process that signal `number` ended."""
    return 128 + number


@contextmanager
def watch(enabled: bool = True) -> Iterator[Signals]:
    """Record signals instead of dying from them; the former handlers are restored at the end.

    Python gives signals to the main thread: in any other none is recorded."""
    signals = Signals()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield signals
        return
    former = {number: signal.signal(number, signals._note) for number in WATCHED}
    try:
        yield signals
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Exit:
    """Why a run ends, in words, and the exit code of the process. `final`: there is nothing left to train, so the
    last validation and the test follow."""

    reason: str
    code: int = 0
    final: bool = False


LOST_SECONDS = 10.0  # for a process that has lost other ranks to end in order, and to finish writing what it can
COMPLETE = Exit("the run is complete", final=True)


class ExitRule:
    """The ends of a run other than its completion. `started` is the moment it began, by `time.monotonic`."""

    def __init__(self, options: ExitOptions, signals: Signals, started: float):
        self._options = options
        self._signals = signals
        self._started = started
        self._timer: threading.Timer | None = None

    def votes(self) -> list[int]:
        """What this rank sees, to be added over ranks: one number per watched signal, one for the time."""
        minutes = self._options.exit_duration_in_mins
        overtime = minutes is not None and time.monotonic() - self._started > 60 * minutes
        return [*(int(self._signals.received == number) for number in WATCHED), int(overtime)]

    def decide(self, votes: Sequence[int]) -> Exit | None:
        """What the votes of all ranks, added up, say."""
        *signalled, overtime = votes
        for number, count in zip(WATCHED, signalled, strict=True):
            if count:
                return Exit(f"signal {signal.Signals(number).name}", exit_code(number))
        return Exit(f"{self._options.exit_duration_in_mins} minutes are over") if overtime else None

    def after(self, iteration: int) -> Exit | None:
        """Whether the step that made `iteration` is the last by --exit-interval."""
        interval = self._options.exit_interval
        return Exit(f"--exit-interval {interval}") if interval and iteration % interval == 0 else None

    def early(self, validations: int) -> Exit | None:
        """Whether so many validations in a row without improvement are enough by --early-stopping-patience."""
        patience = self._options.early_stopping_patience
        if patience is None or validations < patience:
            return None
        return Exit(f"--early-stopping-patience {patience}: no better validation loss", final=True)

    @contextmanager
    def bounded_after_loss(self) -> Iterator[None]:
        """See that the process ends if other ranks are lost meanwhile, as `rank_lost` does."""
        try:
            yield
        except RankLostError as error:
            self.rank_lost(error)
            raise

    def rank_lost(self, error: RankLostError) -> None:
        """End the process after `LOST_SECONDS`, unless `settle` is called before. For any thread.

        Training and checkpoints have collectives of their own. Where one has failed, the other may wait for a rank
        that waits for this one in turn, and torch aborts a wait of gloo's only with the process."""
        if self._timer is None:
            self._timer = threading.Timer(LOST_SECONDS, _end, [error])
            self._timer.daemon = True
            self._timer.start()

    def settle(self) -> None:
        """The job is over: nothing of it can hang any more."""
        if self._timer is not None:
            self._timer.cancel()


def _end(error: RankLostError) -> None:
    print(f"1 problem:\n{error}", file=sys.stderr, flush=True)
    os._exit(error.exit_code)
