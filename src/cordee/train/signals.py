"""Signals that end a run in order.

Owns the handlers of SIGTERM and SIGINT. A signal only leaves a note; the training loop reads it between steps, agrees
with the other ranks, saves and stops. A second one ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

WATCHED = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """The first signal that came, as its number; 0 before one does."""

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
    """Note signals instead of dying from them; the former handlers are put back at the end.

    Python gives signals to the main thread: in any other nothing is noted.
    """
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
