"""What a run writes belongs to one run at a time.

Owns which places of a run's options are locked, and what is said of one that another run has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cordee import lock
from cordee.checkpoint.storage import Place, is_url, place_of
from cordee.checkpoint.storage_lock import StorageLock
from cordee.errors import Problem, raise_all
from cordee.train.options import TrainConfig

LOCK, METRICS = ".lock", "metrics.jsonl"


def check_free(config: TrainConfig) -> list[Problem]:
    """The places that another run has now, as far as the kernel of this machine knows. ProblemError for one that is
    none."""
    found = _all_at_once(lambda file: lock.holder(file) if isinstance(file, Path) else None, config)
    return [_taken(*place, who) for place, who in found if isinstance(who, lock.HeldError)]


@contextmanager
def held(config: TrainConfig) -> Iterator[None]:
    """Have all places that a run with these options writes to, as its rank 0; ProblemError with those that it cannot
    have.
    """
    with ExitStack() as stack:

        def acquire(file: Place) -> Exception | None:
            try:
                stack.enter_context(lock.acquire(file) if isinstance(file, Path) else StorageLock(file))
            except (lock.HeldError, OSError) as error:
                return error
            return None

        problems = []
        for (option, given), error in _all_at_once(acquire, config):
            if isinstance(error, lock.HeldError):
                problems.append(_taken(option, given, error))
            elif error is not None:
                fix = "give a place that can be written to"
                problems.append(Problem(option, given, f"it cannot be written to: {error}", fix))
        raise_all(problems)
        yield


def _all_at_once(
    look: Callable[[Place], Exception | None], config: TrainConfig
) -> list[tuple[tuple[str, str], Exception | None]]:
    """What stands against each place, by threads: waiting for a lease, or for a run that is dying, is waiting once."""
    locks = _locks(config)
    with ThreadPoolExecutor(max(1, len(locks))) as threads:
        return list(zip(locks.values(), threads.map(look, locks), strict=True))


def _locks(config: TrainConfig) -> dict[Place, tuple[str, str]]:
    """The files to lock, with the option and the place they stand for; each once, however it is written."""
    files: dict[Place, tuple[str, str]] = {}
    if config.save is not None:
        root = place_of(config.save, "--save")
        files[(Path(os.path.realpath(root)) if isinstance(root, Path) else root) / LOCK] = ("--save", config.save)
    if config.tensorboard_dir is not None:
        given = config.tensorboard_dir
        files[Path(os.path.realpath(given)) / LOCK] = ("--tensorboard-dir", given)
    if (given := config.metrics_file) is not None:
        path = Path(os.path.realpath(given))
        beside_checkpoints = path.name == METRICS  # as those are of a run that has its --save there
        file = path.with_name(LOCK if beside_checkpoints else f".{path.name}{LOCK}")
        files.setdefault(file, ("--metrics-file", given))
    return files


def metrics_path(config: TrainConfig) -> Path | None:
    """Where the records of a run go as lines of JSON: beside its checkpoints, if no other place is given and these are
    not in a store, where nothing can be appended to."""
    if config.metrics_file is not None:
        return Path(config.metrics_file)
    return None if config.save is None or is_url(config.save) else Path(config.save) / METRICS


def left_out(config: TrainConfig) -> Iterator[str]:
    """What a run does not write that others do."""
    if config.save is not None and metrics_path(config) is None:
        yield f"{METRICS} is not written beside checkpoints in a store: give --metrics-file for one"


def _taken(option: str, given: str, who: lock.HeldError) -> Problem:
    return Problem(option, given, f"another run writes to it: {who}", "wait for that run or stop it, or give another")
