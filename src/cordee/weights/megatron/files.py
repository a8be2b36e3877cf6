"""The files of a checkpoint of Megatron, opened, and the layout that they are in.

Owns finding every rank's file, what may be wrong with them as files (missing, corrupt, at odds with each other), and
reading the degrees of parallelism from them. Knows no model."""

import math
import re
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product, starmap
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from cordee.errors import Findings, Problem, ProblemError, raise_all
from cordee.tensors.views import Index, Shape
from cordee.weights.files import opened
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.layout import MegatronLayout, Rank, chunks_of, rank_files
from cordee.weights.torch_file import Keys, TorchFile

K = TypeVar("K")
T = TypeVar("T")

MOST_RANKS = 2**20  # along one axis
COPY_AGAIN = "copy the checkpoint again, with all its folders"
ONE_CHECKPOINT = "copy all ranks from one and the same checkpoint"
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


class Held(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Contents(Protocol):
    """What a rank holds, be it in one file or in several."""

    content: Any
    not_read: list[str]

    @property
    def tensors(self) -> Mapping[Keys, Held]: ...

    def read(self, keys: Keys, index: Index) -> Tensor: ...


@dataclass(frozen=True)
class RankFile:
    """One rank's file: its tensors' keys by chunk and dotted name."""

    file: Contents
    keys: dict[tuple[int, str], Keys]

    @staticmethod
    def open(path: Path) -> "RankFile":
        """Raises one of `UNREADABLE`."""
        file = open_file(path)
        keys: dict[tuple[int, str], Keys] = {}
        for path_in_file in file.tensors:
            if match := _MODEL.fullmatch(path_in_file[0]):
                name = ".".join(path_in_file[1:]).removeprefix(_WRAPPED)
                key = (int(match[1] or 0), name)
                if key in keys:
                    raise ValueError(f"it holds {name} twice")
                keys[key] = path_in_file
        return RankFile(file, keys)

    @property
    def args(self) -> Namespace | None:
        args = self.file.content.get("args") if isinstance(self.file.content, dict) else None
        return args if isinstance(args, Namespace) else None

    def region(self, virtual: int, name: str) -> Held:
        return self.file.tensors[self.keys[virtual, name]]


def open_file(path: Path) -> TorchFile:
    """Raises one of `UNREADABLE`, also if the file holds something else than a dict."""
    file = TorchFile(path)
    if not isinstance(file.content, dict):
        raise ValueError("it holds nothing by name")
    return file


def open_ranks(folder: Path) -> dict[tuple[int, ...], RankFile]:
    """The file of every rank by the numbers in its name. ProblemError with all that cannot be read."""
    paths = rank_files(folder)
    if not paths:
        raise ProblemError.of(str(folder), None, "there are no folders of ranks in it", COPY_AGAIN, "missing")
    return open_all(paths, RankFile.open)


def open_all(paths: Mapping[K, Path], opener: Callable[[Path], T]) -> dict[K, T]:
    """ProblemError with all files that cannot be read."""
    found = Findings()
    files = {key: found.attempt(lambda path=path: opened(path, opener, COPY_AGAIN)) for key, path in paths.items()}
    raise_all(found.problems)
    return {key: file for key, file in files.items() if file is not None}


def by_rank(folder: Path, files: dict[tuple[int, ...], RankFile]) -> dict[Rank, RankFile]:
    """Files by rank. ProblemError if ranks are missing or say different things of the checkpoint."""
    args = next(iter(files.values())).args
    second_is_expert = size_of(args, "expert") > 1 and size_of(args, "pipeline") == 1
    found: dict[Rank, RankFile] = {}
    for ranks, file in files.items():
        rank = Rank(ranks[0], 0, ranks[1]) if len(ranks) == 2 and second_is_expert else Rank(*ranks)
        if rank in found:
            why = f"several files are of {rank}"
            raise ProblemError.of(str(folder), None, why, "leave only those of one checkpoint in it")
        found[rank] = file
    sizes = [max(size_of(args, a), *(1 + getattr(rank, a) for rank in found)) for a in ("tensor", "pipeline", "expert")]
    problems = []
    if missing := math.prod(sizes) - len(found):
        absent = [*islice((rank for rank in starmap(Rank, product(*map(range, sizes))) if rank not in found), 20)]
        more = f" and {missing - 20} more" if missing > 20 else ""
        why = f"there are no folders of these ranks: {', '.join(map(str, absent))}{more}"
        problems.append(Problem(str(folder), None, why, COPY_AGAIN, "missing", limit=absent))
    problems += disagreements(folder, found)
    raise_all(problems)
    return found


def size_of(args: Namespace | None, kind: str) -> int:
    """The degree of parallelism `kind` ("tensor", ...) in a checkpoint's settings, 1 if they do not have it."""
    name = f"{kind}_model_parallel_size"
    size = getattr(args, name, None)
    if size is not None and (type(size) is not int or not 0 <= size <= MOST_RANKS):
        why = f"it must be a number up to {MOST_RANKS}"
        raise ProblemError.of(f"args.{name}", shown(size), why, COPY_AGAIN)
    return size or 1


def shown(value: object, most: int = 100) -> str:
    """A value of untrusted settings for a message: its type, if it is no plain one."""
    text = _comparable(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _comparable(value: object) -> str:
    """What is the same for the same plain values."""
    if value is not None and type(value) not in (str, bool, int, float):  # may be endless: lists that hold one another
        return f"an object of type {type(value).__name__}"
    # Decimal digits take a time that grows with the square of their number.
    return hex(value) if isinstance(value, int) and value.bit_length() > 64 else repr(value)


def disagreements(folder: Path, files: Mapping[Rank, RankFile]) -> Iterator[Problem]:
    """What ranks state differently though it must be the same."""
    stated = {name: [getattr(file.args, name, None) for file in files.values()] for name in _AGREED}
    stated["iteration"] = [file.file.content.get("iteration") for file in files.values()]
    for name, values in stated.items():
        if different := _differing(values):
            why = f"ranks disagree about {name}: {different}"
            yield Problem(str(folder), None, why, ONE_CHECKPOINT, "disagree", limit=name)
    for rank, file in files.items():
        first = files.get(Rank(0, rank.pipeline, rank.expert), file)
        if first.keys.keys() != file.keys.keys():
            names = ", ".join(sorted({name for _, name in first.keys.keys() ^ file.keys.keys()}))
            why = f"tensor ranks 0 and {rank.tensor} of stage {rank.pipeline} hold different tensors: {names}"
            yield Problem(str(folder), None, why, ONE_CHECKPOINT, "disagree", limit=(rank.tensor, rank.pipeline))


def _differing(values: Iterable[object]) -> str | None:
    """Values listed if they differ; None if they do not."""
    different = {_comparable(value): value for value in values}
    return ", ".join(shown(different[key]) for key in sorted(different)) if len(different) > 1 else None


def layout_of(folder: Path, files: dict[Rank, RankFile], dialect: Dialect, most: int | None = None) -> MegatronLayout:
    """The chunks by what layers the files hold.

    most: the layers of the model, of which some may have no tensors here; None: each layer has some.
    ProblemError if layers or chunks have numbers that are not those of the first so many."""
    before, after = dialect.layer_prefix.split("{n}")
    pattern = re.compile(re.escape(before) + r"(\d+)" + re.escape(after))
    stages = 1 + max(rank.pipeline for rank in files)
    layers: dict[tuple[int, int], set[str]] = {}  # numbers of each chunk, by (chunk of the stage, stage)
    for rank, file in files.items():
        for virtual, name in file.keys:
            numbers = layers.setdefault((virtual, rank.pipeline), set())
            if match := pattern.match(name):
                numbers.add(match[1])
    raise_all(_misnumbered(folder, layers, most))
    virtual = any(keys[0] == "model0" for file in files.values() for keys in file.keys.values())
    counts = {where: 1 + max(map(int, numbers), default=-1) for where, numbers in layers.items()}
    rounds = 1 + max((chunk for chunk, _ in counts), default=0)
    sizes = [counts.get((chunk, stage), 0) for chunk in range(rounds) for stage in range(stages)]
    return MegatronLayout(
        tensor=1 + max(rank.tensor for rank in files),
        expert=1 + max(rank.expert for rank in files),
        chunks=chunks_of(sizes, stages),
        virtual=virtual,
    )


def _misnumbered(folder: Path, layers: Mapping[tuple[int, int], set[str]], most: int | None) -> Iterator[Problem]:
    """Numbers that are not those of the first so many. They are untrusted: no loop runs so many times."""
    chunks = {str(chunk) for chunk, _ in layers}
    if wrong := _beyond(chunks, len(chunks)):
        yield Problem(str(folder), None, f"of its chunks only {len(chunks)} are there, but one is {wrong}", COPY_AGAIN)
    for (_, stage), numbers in sorted(layers.items()):
        if wrong := _beyond(numbers, len(numbers) if most is None else most):
            why = f"layers are missing: stage {stage} holds {len(numbers)} of a chunk, but one has the number {wrong}"
            yield Problem(str(folder), None, why, COPY_AGAIN)


def _beyond(numbers: set[str], count: int) -> str | None:
    """The first of `numbers` that is not one below `count`."""
    wrong = numbers - set(map(str, range(count)))
    return min(wrong)[:20] if wrong else None
