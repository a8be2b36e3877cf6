"""What a run writes belongs to one run at a time.

Owns which places of a run's options are locked, and what is said of one that another run has."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cordee import lock
from cordee.checkpoint import storage_lock
from cordee.checkpoint.storage import Location, local_path, location_of
from cordee.errors import Problem, raise_all
from cordee.train.options import TrainConfig

LOCK, METRICS = ".lock", "metrics.jsonl"


def check_free(config: TrainConfig) -> list[Problem]:
    """The places that another run has now, as far as the kernel of this machine knows. ProblemError for one that is
    none."""
    found = _all_at_once(lambda file: lock.holder(file.local) if file.local is not None else None, config)
    return [_taken(*place, who) for place, who in found if isinstance(who, lock.HeldError)]


@contextmanager
def held(config: TrainConfig) -> Iterator[dict[str, lock.Lock]]:
    """Have all places that a run with these options writes to, as its rank 0; ProblemError with those that it cannot
    have. Yields the locks by option."""
    with ExitStack() as stack:
        locks: dict[Location, lock.Lock] = {}  # filled by threads

        def acquire(file: Location) -> Exception | None:
            try:
                locks[file] = stack.enter_context(storage_lock.acquire(file))
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
        yield {option: locks[file] for file, (option, _) in _locks(config).items()}


def _all_at_once(
    look: Callable[[Location], Exception | None], config: TrainConfig
) -> list[tuple[tuple[str, str], Exception | None]]:
    """What stands against each place, by threads: waiting for a lease, or for a run that is dying, is waiting once."""
    locks = _locks(config)
    with ThreadPoolExecutor(max(1, len(locks))) as threads:
        return list(zip(locks.values(), threads.map(look, locks), strict=True))


def _locks(config: TrainConfig) -> dict[Location, tuple[str, str]]:
    """The files to lock, with the option and the place they stand for; each once, however it is written."""
    files: dict[Location, tuple[str, str]] = {}
    if (given := config.save) is not None:
        files[location_of(given, "--save").resolve() / LOCK] = ("--save", given)
    if (given := config.tensorboard_dir) is not None:
        files.setdefault(location_of(Path(given)).resolve() / LOCK, ("--tensorboard-dir", given))
    if (given := config.metrics_file) is not None:
        path = location_of(Path(given)).resolve()
        beside_checkpoints = path.name == METRICS  # as those are of a run that has its --save there
        name = LOCK if beside_checkpoints else f".{path.name}{LOCK}"
        files.setdefault(path.parent / name, ("--metrics-file", given))
    return files


def metrics_path(config: TrainConfig) -> Path | None:
    """Where the records of a run go as lines of JSON: beside its checkpoints, if no other place is given and these are
    not in a store, where nothing can be appended to."""
    return place(config, config.metrics_file, METRICS)


def place(config: TrainConfig, given: str | None, beside: str = "") -> Path | None:
    """The place that is `given` for what a run writes, else `beside` its checkpoints; None where these are in a store,
    or not kept."""
    if given:
        return Path(given)
    root = None if config.save is None else local_path(config.save)
    return None if root is None else root / beside


def left_out(config: TrainConfig) -> Iterator[str]:
    """What a run does not write that others do."""
    if config.save is None and not config.skip_train:
        yield "nothing of what this run trains is kept: give --save DIR for checkpoints"
    if config.save is not None and metrics_path(config) is None:
        yield f"{METRICS} is not written beside checkpoints in a store: give --metrics-file for one"


def written_before(config: TrainConfig) -> Iterator[str]:
    """What a run that starts anew adds its records to, though it holds those of another."""
    if (path := metrics_path(config)) is not None and path.is_file() and path.stat().st_size:
        yield f"{path} holds the records of another run: those of this run are appended"
    if (folder := config.tensorboard_dir) is not None and any(Path(folder).glob("events.out.tfevents.*")):
        yield f"--tensorboard-dir {folder} holds the events of another run: TensorBoard shows both runs as one"


def _taken(option: str, given: str, who: lock.HeldError) -> Problem:
    return Problem(option, given, f"another run writes to it: {who}", "wait for that run or stop it, or give another")
