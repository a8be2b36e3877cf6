"""The checkpoints of a run.

Owns writing them beside training and reading them back on any layout: torch's distributed checkpoint over canonical
names, so that neither ranks nor shards show in what is stored. Files and names are `directory.py`'s; what the state
of a run means is the trainer's.

    model.<parameter>                 float32 master weights
    optimizer.<parameter>.<state>     such as exp_avg, exp_avg_sq, step"""

import errno
import warnings
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from traceback import StackSummary
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from cordee.checkpoint import directory
from cordee.checkpoint.files import SafeReader, missing_bytes, read_metadata, tensors
from cordee.checkpoint.object_writer import ObjectWriter
from cordee.checkpoint.storage import Location
from cordee.errors import Problem, ProblemError, Problems, RankLostError, raise_all
from cordee.lock import HeldError, Lock
from cordee.log import logger
from cordee.model.parameter import ORIGINS, Origin, of_origins
from cordee.parallel import collectives

# torch warns on every save and load in one process, which is meant here.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)

T = TypeVar("T")
Tensors = dict[str, Tensor]
State = dict[str, Any]


class CheckpointStore:
    """Checkpoints under `root`, saved by all ranks of `group` together.

    `group` is a gloo group that nothing else uses, or None alone in one process: checkpoints are written by a thread
    of their own, whose collectives must not mix with those of training. `keep_last` bounds how many checkpoints are
    kept; None keeps all. Parameters of `origins` are saved, with their state. `on_lost` is called in that thread when
    a checkpoint in the background has lost other ranks: training may hang then, and would never see it. With `lock`,
    of the first rank, nothing is changed under `root` once another process has taken it."""

    def __init__(
        self,
        root: Location,
        *,
        group: ProcessGroup | None = None,
        keep_last: int | None = None,
        origins: Collection[Origin] = ORIGINS,
        on_lost: Callable[[RankLostError], None] | None = None,
        lock: Lock | None = None,
    ):
        self.root = root
        self._group = group
        self._keep_last = keep_last
        self._origins = origins
        self._on_lost = on_lost
        self._lock = lock
        self._first = group is None or dist.get_rank(group) == 0
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(
        self,
        iteration: int,
        model: nn.Module,
        optimizer: Optimizer | None,
        state: State,
        *,
        background: bool = True,
        best: int | None = None,
    ) -> None:
        """Save `model`, `optimizer` (None leaves it out) and `state`, which goes to the manifest as JSON. The
        checkpoint of iteration `best` is named the best one, and kept.

        With `background` it returns as soon as the tensors are copied; parameters may then change. An earlier save
        that is still being written is waited for. ProblemError as `wait` has it."""
        self.wait()
        staged = _stage(tensors_of(model, optimizer, self._origins))
        if background:
            self._pending = self._thread.submit(self._write_beside, iteration, staged, state, best)
        else:
            self._write(iteration, staged, state, best)

    @property
    def failed(self) -> bool:
        """Whether the save in the background is known to have failed; `wait` says why."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> None:
        """Wait until nothing is being written; ProblemError if it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait for what is being written and stop; ProblemError as `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def last_good(self) -> str:
        """Which checkpoint to resume from, in words, once nothing is being written any more."""
        if self._pending is not None:
            wait([self._pending])
        return self._last_good()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close. What stopped the run and what kept the last checkpoint from being written are both reported."""
        try:
            self.close()
        except ProblemError as unsaved:
            if error is None:
                raise
            if isinstance(error, RankLostError):  # which is why the checkpoint could not be written either
                return
            if isinstance(error, ProblemError):
                raise ProblemError([*error.problems, *unsaved.problems], error.everywhere) from error
            logger.error("%s", unsaved)  # and the error propagates as it is

    def _last_good(self) -> str:
        return self._newest()[1]

    def _newest(self) -> tuple[int | None, str]:
        """The iteration of the last good checkpoint, None if none is known, and what there is, in words."""
        try:
            last, _ = directory.latest(self.root)
        except OSError as error:
            return None, f"which checkpoints there are cannot be read ({error})"
        return last, "there is no checkpoint yet" if last is None else f"last good checkpoint: iteration {last}"

    def _write_beside(self, iteration: int, staged: Tensors, state: State, best: int | None) -> None:
        try:
            self._write(iteration, staged, state, best)
        except RankLostError as error:
            if self._on_lost is not None:
                self._on_lost(error)
            raise

    def _write(self, iteration: int, staged: Tensors, state: State, best: int | None) -> None:
        """Runs on every rank; all ranks end alike."""
        new, group = None, self._group
        try:
            with collectives.contact(f"while writing the checkpoint of iteration {iteration}"):
                new = self.root / _from_all(lambda: self._prepare(iteration), group)[0]
                writer = ObjectWriter(new)
                written = dcp.save(staged, storage_writer=writer, process_group=group, no_dist=group is None)
                entries = _from_all(lambda: writer.entries, group)
                files = {name: entry for part in entries for name, entry in part.items()}
                _from_all(lambda: self._publish(new, iteration, written, files, state, best), group)
        except dcp.CheckpointException as error:
            taken = next((cause for _, cause in _causes(error) if isinstance(cause, HeldError)), None)
            if taken is not None:
                raise ProblemError([self._taken(taken)], everywhere=True) from error
            # A whole one stays: then it was retention that failed.
            if self._first and new is not None and directory.damage(new) is not None:
                directory.discard(new)
            raise ProblemError([self._problem(iteration, error)], everywhere=True) from error

    def _prepare(self, iteration: int) -> str:
        """The name of the folder to write to, empty as it is; of the first rank that counts."""
        if not self._first:
            return ""
        self._require_held()
        new = directory.temporary(self.root, iteration)
        directory.discard(new)
        return new.name

    def _publish(
        self,
        new: Location,
        iteration: int,
        written: dcp.Metadata,
        files: dict[str, dict[str, int]],
        state: State,
        best: int | None,
    ) -> None:
        if not self._first:
            return
        if (lack := missing_bytes(new, written)) is not None:
            raise OSError(f"what was written is not what was saved: {lack}")
        self._require_held()
        directory.publish(new, {"format": directory.FORMAT, "iteration": iteration, "files": files, **state})
        if best is not None:
            directory.point_to_best(self.root, best)
        if self._keep_last is None:
            return
        if removed := directory.retain(self.root, iteration, self._keep_last):
            logger.info("removed checkpoints of iterations %s", ", ".join(map(str, sorted(removed))))

    def _require_held(self) -> None:
        if self._lock is not None:
            self._lock.require_held()

    def _taken(self, by: HeldError) -> Problem:
        fix = "stop one of the two runs; to continue this one elsewhere, resume it with --load here and another --save"
        why = f"another run has taken it from this one, which changes nothing there now: {by}; {self._last_good()}"
        return Problem("--save", str(self.root), why, fix, "taken")

    def _problem(self, iteration: int, error: dcp.CheckpointException) -> Problem:
        why = "; ".join(f"rank {rank}: {_short(cause)}" for rank, cause in _causes(error))
        place = str(self.root / directory.name_of(iteration))
        full = any(isinstance(cause, OSError) and cause.errno in NO_SPACE for _, cause in _causes(error))
        if full:
            why = f"no space left: {why}"
        last, found = self._newest()
        again = "again, or with another --save" if last is None else f"with --load {self.root}"
        fix = f"{'free space' if full else 'fix the disk'}, then start the same command {again}"
        why = f"the checkpoint could not be written ({why}); {found}"
        involves = () if last is None else ("load",)
        return Problem("--save", place, why, fix, "unwritable", involves, [rank for rank, _ in _causes(error)])


def _from_all(part: Callable[[], T], group: ProcessGroup | None) -> list[T]:
    """What `part` returns on every rank of `group`; CheckpointException on all of them, as torch's, if one failed."""
    result, failure = None, None
    try:
        result = part()
    except (OSError, ValueError, HeldError) as error:
        failure = error, StackSummary()
    results, failures = zip(*collectives.gather_in(group, (result, failure)), strict=True)
    if failed := {rank: failure for rank, failure in enumerate(failures) if failure is not None}:
        raise dcp.CheckpointException("checkpoint", failed)
    return list(results)


def _causes(error: dcp.CheckpointException) -> list[tuple[int, BaseException]]:
    """What failed on which rank."""
    return [(rank, cause) for rank, (cause, _) in sorted(error.failures.items())]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


def tensors_of(model: nn.Module, optimizer: Optimizer | None, origins: Collection[Origin] = ORIGINS) -> Tensors:
    """Everything a checkpoint holds by its name, sharing memory with `model` and `optimizer`."""
    parameters = of_origins(model, origins)
    found = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    if optimizer is not None:
        for name, parameter in parameters.items():
            for kind, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    found[f"optimizer.{name}.{kind}"] = value
    return found


def _stage(found: Tensors) -> Tensors:
    """A copy in host memory."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    stager = DefaultStager(options)
    try:
        return stager.stage(found)  # type: ignore[return-value]
    finally:
        stager.close()


def restore(
    directory_: Location,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    group: ProcessGroup | None = None,
    origins: Collection[Origin] = ORIGINS,
    optional: Collection[Origin] = (),
) -> set[Origin]:
    """Fill `model`, and `optimizer` unless None, from the checkpoint in `directory_`, whatever layout wrote it.

    Parameters of other `origins` stay as they are, and the checkpoint need not have them. So do those of `optional`
    origins of which it has none at all, which are returned.
    An optimizer that had no state when it was saved (every step was skipped) has none afterwards. All ranks of
    `group` call it together. ProblemError names every parameter that does not fit."""
    metadata = collectives.together(lambda: _metadata(directory_), group)
    kept = tensors(metadata)
    absent: set[Origin] = {origin for origin in optional if not _has_any(kept, of_origins(model, {origin}), group)}
    parameters = of_origins(model, set(origins) - absent)
    wanted = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    raise_all(_misfits(directory_, kept, wanted))
    if optimizer is not None:
        wanted |= _optimizer_slots(kept, parameters, optimizer)
    try:
        dcp.load(wanted, storage_reader=SafeReader(directory_, metadata), process_group=group, no_dist=group is None)
    except dcp.CheckpointException as error:  # of all ranks, to all of them
        raise ProblemError(dict.fromkeys(_unread(directory_, error)), everywhere=True) from error
    return absent


def _has_any(kept: Collection[str], parameters: Collection[str], group: ProcessGroup | None) -> bool:
    """Whether any of `parameters` of any rank is in a checkpoint."""
    return any(collectives.gather_in(group, any(f"model.{name}" in kept for name in parameters)))


def _metadata(path: Location) -> dcp.Metadata:
    """ProblemError if it cannot be read, or has tensors in files that the manifest does not vouch for."""
    try:
        metadata = read_metadata(path)
        unknown = {place.relative_path for place in metadata.storage_data.values()}
        unknown -= directory.read_manifest(path)["files"].keys()
        if unknown:
            raise ValueError(f"its tensors are in {', '.join(sorted(unknown))}, which is none of its files")
    except ValueError as error:
        raise ProblemError.of("--load", str(path), str(error), "take another checkpoint", "corrupt") from error
    return metadata


def _unread(path: Location, error: dcp.CheckpointException) -> Problems:
    """What kept ranks from reading their parts."""
    for rank, cause in _causes(error):
        if isinstance(cause, ProblemError):
            yield from cause.problems
        else:
            why = f"rank {rank} cannot read it: {_short(cause)}"
            yield Problem("--load", str(path), why, "take another checkpoint", "corrupt")


def _misfits(path: Location, kept: dict[str, Any], wanted: Tensors) -> Problems:
    for name, tensor in wanted.items():
        found = list(kept[name].size) if name in kept else None
        if found != list(tensor.shape):
            why = f"parameter {name} has shape {list(tensor.shape)} in the model, {found or 'none'} in the checkpoint"
            yield Problem("--load", str(path), why, "load it into the model it was saved from", "shape", limit=name)


def _optimizer_slots(kept: dict[str, Any], parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> Tensors:
    """Empty state of `optimizer`, attached to it, by the names under which the checkpoint holds its values."""
    states: dict[str, list[str]] = {}
    for full in kept:
        if full.startswith("optimizer."):
            name, _, kind = full.removeprefix("optimizer.").rpartition(".")
            states.setdefault(name, []).append(kind)
    slots: Tensors = {}
    on_device = any(group.get("fused") for group in optimizer.param_groups)
    for name, parameter in parameters.items():
        state = {}
        for kind in states.get(name, []):
            full = f"optimizer.{name}.{kind}"
            like = parameter.detach()
            if tuple(kept[full].size) == tuple(like.shape):
                state[kind] = torch.zeros_like(like)
            else:
                device = like.device if on_device else "cpu"  # the place where torch's optimizers count steps
                state[kind] = torch.zeros(kept[full].size, dtype=kept[full].properties.dtype, device=device)
            slots[full] = state[kind]
        if state:
            optimizer.state[parameter] = state
    return slots
