"""The files of a checkpoint of Megatron, opened, and the layout that they are in.

Owns finding every rank's file, what may be wrong with them as files (missing, damaged, at odds with each other), and
reading the degrees of parallelism from them. Knows no model.
"""

from __future__ import annotations

import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product, starmap
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from cordee.errors import Problem, ProblemError, raise_all
from cordee.families.rules import Index
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.layout import Layout, Rank, chunks_of, current, layer_files, rank_files
from cordee.weights.regions import Region
from cordee.weights.torch_file import UNREADABLE, Keys, TorchFile

K = TypeVar("K")
T = TypeVar("T")

MOST_RANKS = 2**20  # along one axis
COPY_AGAIN = "copy the checkpoint again, with all its folders"
_MODEL = re.compile(r"model(\d*)|module")
_WRAPPED = "base_model.model."  # what PEFT puts before names
_AGREED = (  # what all ranks must say alike
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
)


def open_checkpoint(path: Path) -> tuple[Path, dict[Rank, RankFile]]:
    """The folder of ranks at `path` and the file of every rank. ProblemError with all that is wrong with them."""
    folder = folder_of(path)
    return folder, by_rank(folder, open_ranks(folder))


def folder_of(path: Path) -> Path:
    """The folder with the files: of a checkpoint the iteration that its tracker file names, or `path` itself."""
    return path if rank_files(path) or layer_files(path) else current(path) or path


class Contents(Protocol):
    """What a rank holds, be it in one file or in several."""

    content: Any
    not_read: list[str]
    tensors: dict[Keys, Region]

    def read(self, keys: Keys, index: Index) -> Tensor: ...


@dataclass(frozen=True)
class RankFile:
    """One rank's file: its tensors' keys by chunk and dotted name."""

    file: Contents
    keys: dict[tuple[int, str], Keys]

    @staticmethod
    def open(path: Path) -> RankFile:
        """Raises one of `UNREADABLE`."""
        file = TorchFile(path)
        keys = {}
        for path_in_file in file.tensors:
            if match := _MODEL.fullmatch(path_in_file[0]):
                name = ".".join(path_in_file[1:]).removeprefix(_WRAPPED)
                keys[int(match[1] or 0), name] = path_in_file
        return RankFile(file, keys)

    @property
    def args(self) -> Namespace | None:
        args = self.file.content.get("args") if isinstance(self.file.content, dict) else None
        return args if isinstance(args, Namespace) else None

    def region(self, virtual: int, name: str) -> Region:
        return self.file.tensors[self.keys[virtual, name]]


def open_ranks(folder: Path) -> dict[tuple[int, ...], RankFile]:
    """The file of every rank by the numbers in its name. ProblemError with all that cannot be read."""
    paths = rank_files(folder)
    if not paths:
        raise ProblemError([Problem(str(folder), None, "there are no folders of ranks in it", COPY_AGAIN)])
    return open_all(paths, RankFile.open)


def open_all(paths: Mapping[K, Path], opener: Callable[[Path], T]) -> dict[K, T]:
    """ProblemError with all files that cannot be read."""
    opened, problems = {}, []
    for key, path in paths.items():
        try:
            opened[key] = opener(path)
        except FileNotFoundError:
            problems.append(Problem(str(path), None, "the file of this rank is missing", COPY_AGAIN))
        except UNREADABLE as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            problems.append(Problem(str(path), None, f"the file cannot be read: {why}", COPY_AGAIN))
    raise_all(problems)
    return opened


# ---- the layout of what is there -------------------------------------------------------------------------------------


def by_rank(folder: Path, files: dict[tuple[int, ...], RankFile]) -> dict[Rank, RankFile]:
    """Files by rank. ProblemError if ranks are missing or say different things of the checkpoint."""
    args = next(iter(files.values())).args
    second_is_expert = size_of(args, "expert") > 1 and size_of(args, "pipeline") == 1
    found = {}
    for ranks, file in files.items():
        if len(ranks) == 2 and second_is_expert:
            found[Rank(ranks[0], 0, ranks[1])] = file
        else:
            found[Rank(*ranks)] = file
    sizes = (
        max(size_of(args, "tensor"), *(1 + rank.tensor for rank in found)),
        max(size_of(args, "pipeline"), *(1 + rank.pipeline for rank in found)),
        max(size_of(args, "expert"), *(1 + rank.expert for rank in found)),
    )
    problems = []
    if missing := math.prod(sizes) - len(found):
        absent = (rank for rank in starmap(Rank, product(*map(range, sizes))) if rank not in found)
        names = ", ".join(f"tensor {r.tensor} pipeline {r.pipeline} expert {r.expert}" for r in islice(absent, 20))
        more = f" and {missing - 20} more" if missing > 20 else ""
        problems.append(Problem(str(folder), None, f"there are no folders of these ranks: {names}{more}", COPY_AGAIN))
    problems += disagreements(folder, found)
    raise_all(problems)
    return found


def size_of(args: Namespace | None, kind: str) -> int:
    """The degree of parallelism `kind` ("tensor", ...) in a checkpoint's settings, 1 if they do not have it."""
    name = f"{kind}_model_parallel_size"
    size = getattr(args, name, None)
    if size is not None and (type(size) is not int or not 0 <= size <= MOST_RANKS):
        raise ProblemError([Problem(f"args.{name}", size, f"it must be a number up to {MOST_RANKS}", COPY_AGAIN)])
    return size or 1


def disagreements(folder: Path, files: Mapping[Rank, RankFile]) -> Iterator[Problem]:
    """What ranks say differently though they must say it alike."""
    fix = "copy all ranks from one and the same checkpoint"
    for name in _AGREED:
        values = {repr(getattr(file.args, name, None)) for file in files.values()}
        if len(values) > 1:
            why = f"ranks disagree about {name}: {', '.join(sorted(values))}"
            yield Problem(str(folder), None, why, fix)
    iterations = {repr(file.file.content.get("iteration")) for file in files.values()}
    if len(iterations) > 1:
        why = f"ranks are of different iterations: {', '.join(sorted(iterations))}"
        yield Problem(str(folder), None, why, fix)
    for rank, file in files.items():
        first = files.get(Rank(0, rank.pipeline, rank.expert), file)
        if first.keys.keys() != file.keys.keys():
            names = ", ".join(sorted({name for _, name in first.keys.keys() ^ file.keys.keys()}))
            why = f"tensor ranks 0 and {rank.tensor} of stage {rank.pipeline} hold different tensors: {names}"
            yield Problem(str(folder), None, why, fix)


def layout_of(files: dict[Rank, RankFile], dialect: Dialect) -> Layout:
    """The chunks by what layers the files hold."""
    before, after = dialect.layer_prefix.split("{n}")
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    stages = 1 + max(rank.pipeline for rank in files)
    counts: dict[tuple[int, int], int] = {}  # layers of each chunk, by (chunk of the stage, stage)
    for rank, file in files.items():
        for virtual, name in file.keys:
            where = (virtual, rank.pipeline)
            match = pattern.match(name)
            counts[where] = max(counts.get(where, 0), 1 + int(match[1]) if match else 0)
    virtual = any(keys[0] == "model0" for file in files.values() for keys in file.keys.values())
    rounds = 1 + max(chunk for chunk, _ in counts)
    sizes = [counts.get((chunk, stage), 0) for chunk in range(rounds) for stage in range(stages)]
    return Layout(
        tensor=1 + max(rank.tensor for rank in files),
        expert=1 + max(rank.expert for rank in files),
        chunks=chunks_of(sizes, stages),
        virtual=virtual,
    )
