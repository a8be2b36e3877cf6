"""When a run ends, and with which exit code.

Owns the reasons. Some are seen by single ranks only (a signal, a clock): those are counted over all ranks, so that
all stop at the same step. Knows no collective: the trainer adds up.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from cordee.config.schema import ExitOptions
from cordee.errors import RankLostError
from cordee.train.signals import WATCHED, Signals, exit_code


@dataclass(frozen=True)
class Exit:
    """Why a run ends, in words, and the exit code of the process."""

    reason: str
    code: int = 0


LOST_SECONDS = 10.0  # for a process that has lost other ranks to end in order, and to finish writing what it can
COMPLETE = Exit("the run is complete")


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
        that waits for this one in turn, and torch has no way to break off a wait of gloo's but the end of a process.
        """
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
