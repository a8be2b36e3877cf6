"""What a run writes belongs to one run at a time.

Owns which places of a run's options are locked, and what is said of one that another run has.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cordee import lock
from cordee.config.schema import TrainConfig
from cordee.errors import Problem, raise_all

LOCK = ".lock"


def check_free(config: TrainConfig) -> list[Problem]:
    """The places that another run has now."""
    patience = _patience()
    held = ((place, lock.holder(file, next(patience))) for file, place in _locks(config).items())
    return [_taken(*place, who) for place, who in held if who is not None]


@contextmanager
def held(config: TrainConfig) -> Iterator[None]:
    """Have all places that a run with these options writes to, as its rank 0; ProblemError with those that it cannot
    have.
    """
    with ExitStack() as stack:
        problems, patience = [], _patience()
        for file, (option, given) in _locks(config).items():
            try:
                stack.enter_context(lock.acquire(file, next(patience)))
            except lock.HeldError as who:
                problems.append(_taken(option, given, who))
            except OSError as error:
                fix = "give a place that can be written to"
                problems.append(Problem(option, given, f"it cannot be written to: {error}", fix))
        raise_all(problems)
        yield


def _patience() -> Iterator[float]:
    """What is left, at each moment, of the time in which a run that is dying lets go of all its places."""
    end = time.monotonic() + lock.PATIENCE
    while True:
        yield end - time.monotonic()


def _locks(config: TrainConfig) -> dict[Path, tuple[str, str]]:
    """The files to lock, with the option and the place they stand for; each once, however it is written."""
    files = {}
    for option, given in (("--save", config.save), ("--tensorboard-dir", config.tensorboard_dir)):
        if given is not None:
            files[Path(os.path.realpath(given)) / LOCK] = (option, given)
    if (given := config.metrics_file) is not None:
        path = Path(os.path.realpath(given))
        files[path.with_name(f".{path.name}{LOCK}")] = ("--metrics-file", given)
    return files


def _taken(option: str, given: str, who: lock.HeldError) -> Problem:
    return Problem(option, given, f"another run writes to it: {who}", "wait for that run or stop it, or give another")
