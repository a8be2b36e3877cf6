"""The checkpoints of a run.

Owns writing them beside training and reading them back on any layout: torch's distributed checkpoint over canonical
names, so that neither ranks nor shards show in what is stored. Files and names are `directory.py`'s; what the state
of a run means is the trainer's.

    model.<parameter>                 float32 master weights
    optimizer.<parameter>.<state>     such as exp_avg, exp_avg_sq, step
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import StorageWriter
from torch.optim import Optimizer

from cordee.checkpoint import directory
from cordee.checkpoint.files import METADATA, SafeReader, missing_bytes, read_metadata, tensors
from cordee.checkpoint.object_writer import ObjectWriter
from cordee.checkpoint.storage import Place
from cordee.errors import Problem, ProblemError, RankLostError
from cordee.log import logger
from cordee.parallel import collectives

# It is said on every save and load of a run in one process, where it is what is meant.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

T = TypeVar("T")
Tensors = dict[str, Tensor]
State = dict[str, Any]


class CheckpointStore:
    """Checkpoints under `root`, saved by all ranks of `group` together.

    `group` is a gloo group that nothing else uses, or None alone in one process: checkpoints are written by a thread
    of their own, whose collectives must not mix with those of training. `keep_last` bounds how many checkpoints are
    kept; None keeps all. `on_lost` is told, in that thread, that a checkpoint in the background has lost other ranks:
    training may hang then, and would never see it.
    """

    def __init__(
        self,
        root: Place,
        *,
        group: ProcessGroup | None = None,
        keep_last: int | None = None,
        writer: Callable[[Any], StorageWriter] | None = None,
        on_lost: Callable[[RankLostError], None] | None = None,
    ):
        self.root = root
        self._group = group
        self._keep_last = keep_last
        self._writer: Callable[[Any], StorageWriter] = writer or (
            dcp.FileSystemWriter if isinstance(root, Path) else ObjectWriter
        )
        self._on_lost = on_lost
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
    ) -> None:
        """Save `model`, `optimizer` (None leaves it out) and `state`, which goes to the manifest as JSON.

        With `background` it returns as soon as the tensors are copied; parameters may then change. An earlier save
        that is still being written is waited for. ProblemError as `wait` has it.
        """
        self.wait()
        staged = _stage(tensors_of(model, optimizer))
        if background:
            self._pending = self._thread.submit(self._write_beside, iteration, staged, state)
        else:
            self._write(iteration, staged, state)

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
        """What can be gone back to, in words, once nothing is being written any more."""
        if self._pending is not None:
            wait([self._pending])
        return self._last_good()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close. What stopped the run and what kept the last checkpoint from being written are both told."""
        try:
            self.close()
        except ProblemError as unsaved:
            if error is None:
                raise
            if isinstance(error, RankLostError):  # which is why the checkpoint could not be written either
                return
            if isinstance(error, ProblemError):
                raise ProblemError([*error.problems, *unsaved.problems], error.everywhere) from error
            logger.error("%s", unsaved)  # and the error goes on as it is

    def _last_good(self) -> str:
        try:
            last, _ = directory.latest(self.root)
        except OSError as error:
            return f"which checkpoints there are cannot be read ({error})"
        return "there is no checkpoint yet" if last is None else f"the checkpoint of iteration {last} is whole"

    def _write_beside(self, iteration: int, staged: Tensors, state: State) -> None:
        try:
            self._write(iteration, staged, state)
        except RankLostError as error:
            if self._on_lost is not None:
                self._on_lost(error)
            raise

    def _write(self, iteration: int, staged: Tensors, state: State) -> None:
        """Runs on every rank; all ranks end alike."""
        new = None
        try:
            with collectives.contact(f"while writing the checkpoint of iteration {iteration}"):
                name = _on_all(lambda: self._prepare(iteration), self._group)
                new = self.root / self._gathered(name)[0]
                writer, alone = self._writer(new), self._group is None
                written = dcp.save(staged, storage_writer=writer, process_group=self._group, no_dist=alone)
                own = _on_all(lambda: self._own_files(new, writer), self._group)
                files = {name: entry for part in self._gathered(own) for name, entry in part.items()}
                _on_all(lambda: self._publish(new, iteration, written, files, state), self._group)
        except (dcp.CheckpointException, _RanksFailed) as error:
            if (
                self._first and new is not None and directory.damage(new) is not None
            ):  # else it was retention that failed
                directory.discard(new)
            raise ProblemError([self._problem(iteration, error)], everywhere=True) from error

    def _gathered(self, value: T) -> list[T]:
        return [value] if self._group is None else collectives.gather_in(self._group, value)

    def _prepare(self, iteration: int) -> str:
        """The name of the folder to write to, empty as it is; of the first rank that counts."""
        if not self._first:
            return ""
        new = directory.temporary(self.root, iteration)
        if isinstance(new, Path):
            directory.discard(new)
            new.mkdir(parents=True)
        return new.name

    def _own_files(self, new: Place, writer: StorageWriter) -> dict[str, dict[str, int]]:
        """Manifest entries of the files this rank wrote; from a file system they are read back."""
        if isinstance(writer, ObjectWriter):
            return writer.entries
        rank = 0 if self._group is None else dist.get_rank(self._group)
        assert isinstance(new, Path), "in a store nothing but an ObjectWriter writes"
        own = [*new.glob(f"__{rank}_*"), *([new / METADATA] if rank == 0 else [])]
        return {path.name: directory.file_entry(path) for path in own}

    def _publish(
        self, new: Place, iteration: int, written: dcp.Metadata, files: dict[str, dict[str, int]], state: State
    ) -> None:
        if not self._first:
            return
        if (lack := missing_bytes(new, written)) is not None:
            raise OSError(f"what was written is not what was saved: {lack}")
        manifest = {"format": directory.FORMAT, "iteration": iteration, "files": files, **state}
        directory.publish(new, manifest)
        if self._keep_last is not None and (removed := directory.retain(self.root, iteration, self._keep_last)):
            logger.info("removed checkpoints of iterations %s", ", ".join(map(str, sorted(removed))))

    def _problem(self, iteration: int, error: dcp.CheckpointException | _RanksFailed) -> Problem:
        why = "; ".join(f"rank {rank}: {_short(cause)}" for rank, cause in _causes(error))
        return Problem(
            "--save",
            self.root / directory.name_of(iteration),
            f"the checkpoint could not be written ({why}); {self._last_good()}",
            "make room or mend the disk, then start the same command with --load pointing at --save",
        )


class _RanksFailed(Exception):
    """Some ranks could not do their part; what each of them raised."""

    def __init__(self, failures: Mapping[int, BaseException]):
        super().__init__(failures)
        self.failures = failures


def _on_all(part: Callable[[], T], group: ProcessGroup | None) -> T:
    """What `part` returns on this rank, once all of `group` have done theirs; `_RanksFailed` on all if one failed."""
    error = result = None
    try:
        result = part()
    except (OSError, ValueError) as caught:
        error = caught
    errors = [error] if group is None else collectives.gather_in(group, error)
    if failures := {rank: error for rank, error in enumerate(errors) if error is not None}:
        raise _RanksFailed(failures)
    return result  # type: ignore[return-value]


def _causes(error: dcp.CheckpointException | _RanksFailed) -> list[tuple[int, BaseException]]:
    """What failed on which rank; torch puts a trace beside it."""
    return [(rank, each[0] if isinstance(each, tuple) else each) for rank, each in sorted(error.failures.items())]


def _short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".rstrip(": ")


def tensors_of(model: nn.Module, optimizer: Optimizer | None) -> Tensors:
    """Everything a checkpoint holds by its name, sharing memory with `model` and `optimizer`."""
    found = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    if optimizer is not None:
        for name, parameter in model.named_parameters():
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
    directory_: Place,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    *,
    group: ProcessGroup | None = None,
) -> None:
    """Fill `model`, and `optimizer` unless None, from the checkpoint in `directory_`, whatever layout wrote it.

    An optimizer that had no state when it was saved (every step was skipped) has none afterwards. All ranks of
    `group` call it together. ProblemError names every parameter that does not fit.
    """
    try:
        metadata = _on_all(lambda: _metadata(directory_), group)
        kept = tensors(metadata)
        wanted = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
        _raise_misfits(directory_, kept, wanted)
        if optimizer is not None:
            wanted |= _optimizer_slots(kept, model, optimizer)
        reader = SafeReader(directory_, metadata)
        dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    except (dcp.CheckpointException, _RanksFailed) as error:  # of all ranks, to all of them
        raise ProblemError(dict.fromkeys(_unread(directory_, error)), everywhere=True) from error


def _metadata(path: Place) -> dcp.Metadata:
    """ProblemError if it cannot be read, or has tensors in files that the manifest does not vouch for."""
    try:
        metadata = read_metadata(path)
        unknown = {place.relative_path for place in metadata.storage_data.values()}
        unknown -= directory.read_manifest(path)["files"].keys()
        if unknown:
            raise ValueError(f"its tensors are in {', '.join(sorted(unknown))}, which is none of its files")
    except ValueError as error:
        raise ProblemError([Problem("--load", path, str(error), "take another checkpoint")]) from error
    return metadata


def _unread(path: Place, error: dcp.CheckpointException | _RanksFailed) -> Iterator[Problem]:
    """What kept ranks from reading their parts."""
    for rank, cause in _causes(error):
        if isinstance(cause, ProblemError):
            yield from cause.problems
        else:
            why = f"rank {rank} cannot read it: {_short(cause)}"
            yield Problem("--load", path, why, "take another checkpoint")


def _raise_misfits(path: Place, kept: dict[str, Any], wanted: Tensors) -> None:
    problems = []
    for name, tensor in wanted.items():
        found = tuple(kept[name].size) if name in kept else None
        if found != tuple(tensor.shape):
            why = f"the model's parameter {name} has shape {list(tensor.shape)}, the checkpoint's "
            why += "is missing" if found is None else str(list(found))
            problems.append(Problem("--load", path, why, "load it into the model that it was saved from"))
    if problems:
        raise ProblemError(problems)


def _optimizer_slots(kept: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> Tensors:
    """Empty state of `optimizer`, attached to it, by the names under which the checkpoint holds its values."""
    states: dict[str, list[str]] = {}
    for full in kept:
        if full.startswith("optimizer."):
            name, _, kind = full.removeprefix("optimizer.").rpartition(".")
            states.setdefault(name, []).append(kind)
    slots: Tensors = {}
    on_device = any(group.get("fused") for group in optimizer.param_groups)
    for name, parameter in model.named_parameters():
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
