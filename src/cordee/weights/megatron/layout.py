"""Who holds what in a checkpoint of Megatron: ranks, stages, chunks, experts, and the names of their files.

Owns the arithmetic of the layout and all that can be wrong with one. Knows no tensor and no parameter name.

A checkpoint has a file for every (tensor, pipeline, expert) rank. A pipeline stage holds one run of layers, or with
virtual stages several, its chunks; layers are numbered from 0 again in each chunk."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise, product, starmap
from pathlib import Path

from cordee.errors import Problem, ProblemError, Problems, divides, excludes, raise_all, requires
from cordee.files import holds_weights, read_json
from cordee.model import shards
from cordee.model.config import ModelConfig

PIPELINE = "--target-pipeline-parallel-size"
TRACKER = "latest_checkpointed_iteration.txt"
DEEPSPEED_TRACKER = "latest"
FILE = "model_optim_rng.pt"
DISTRIBUTED = "metadata.json"  # in a folder whose tensors are whole: says how they are stored
RELEASE = "release"  # in place of an iteration: weights that no run of this checkpoint has trained
_FOLDER = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")
_DEEPSPEED_FILE = re.compile(r"mp_rank_(\d{2,})_model_states\.pt")
_PARTITIONS = "*zero_pp_rank_*_mp_rank_*_model_states.pt"
_LAYER_FILE = re.compile(r"layer_(\d{2,})(?:-model_(\d{2,}))?-model_states\.pt")


@dataclass(frozen=True, order=True)
class Rank:
    """One file of a checkpoint."""

    tensor: int = 0
    pipeline: int = 0
    expert: int = 0

    def __str__(self) -> str:
        return f"tensor {self.tensor} pipeline {self.pipeline} expert {self.expert}"


@dataclass(frozen=True)
class Chunk:
    """A run of layers that one stage holds."""

    pipeline: int
    virtual: int
    layers: range


@dataclass(frozen=True, kw_only=True)
class MegatronLayout:
    """Degrees of parallelism, and the chunks in the order of the forward.

    virtual: stages hold chunks of their own names, be it one: Megatron then writes `model0`, `model1`."""

    tensor: int = 1
    expert: int = 1
    chunks: tuple[Chunk, ...]
    virtual: bool = False

    @property
    def pipeline(self) -> int:
        return 1 + max(chunk.pipeline for chunk in self.chunks)

    @property
    def num_layers(self) -> int:
        return self.last.layers.stop

    @property
    def first(self) -> Chunk:
        return self.chunks[0]

    @property
    def last(self) -> Chunk:
        return self.chunks[-1]

    def ranks(self) -> Iterator[Rank]:
        """All files."""
        return starmap(Rank, product(range(self.tensor), range(self.pipeline), range(self.expert)))

    def folder(self, rank: Rank) -> str:
        """Name of a rank's folder."""
        pipeline = f"_{rank.pipeline:03d}" if self.pipeline > 1 else ""
        expert = f"_{rank.expert:03d}" if self.expert > 1 else ""
        return f"mp_rank_{rank.tensor:02d}{pipeline}{expert}"

    def place_of_layer(self, layer: int) -> tuple[Chunk, int]:
        """The chunk that holds a layer, and the layer's number in it."""
        chunk = next(chunk for chunk in self.chunks if layer in chunk.layers)
        return chunk, layer - chunk.layers.start


def is_megatron(path: Path) -> bool:
    """Whether `path` is a checkpoint of Megatron, AscendSpeed, MindSpeed-LLM or DeepSpeed, or one of its iterations, in
    files of ranks or modules."""
    return any(rank_files(folder) or layer_files(folder) for folder in (path, current(path)) if folder is not None)


def is_distributed(path: Path) -> bool:
    """Whether `path` is a checkpoint of Megatron, or one of its iterations, in files that all ranks share."""
    return any(backend(folder) is not None for folder in (path, current(path)) if folder is not None)


def is_partitioned(path: Path) -> bool:
    """Whether all that `path` has of a model are the partitions of DeepSpeed's ZeRO stage 3."""
    return not holds_weights(path) and any(any(folder.glob(_PARTITIONS)) for folder in (path, current(path)) if folder)


def backend(folder: Path) -> object:
    """How whole tensors are stored in a folder of Megatron: `torch_dist`, or another name; None if they are not."""
    try:
        stated = read_json(folder / DISTRIBUTED)
    except (OSError, ValueError):
        return None
    return stated.get("sharded_backend") if isinstance(stated, dict) else None


def folder_of(path: Path, iteration: int | None = None) -> Path:
    """The folder with the files: of a checkpoint that of `iteration`, or that which its tracker file names, or `path`
    itself. ProblemError if there is none of `iteration`."""
    if iteration is None:
        is_one = rank_files(path) or layer_files(path) or backend(path) is not None
        return path if is_one else current(path) or path
    if not (folder := path / _name_of(iteration)).is_dir():
        present = sorted(int(at.name[5:]) for at in path.glob("iter_*") if at.name[5:].isdecimal())
        fix = f"choose one of those that are there: {', '.join(map(str, present)) or 'none'}"
        raise ProblemError.of("--ckpt-step", iteration, f"there is no {folder}", fix, "missing", limit=present)
    return folder


def _name_of(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def current(root: Path) -> Path | None:
    """The folder that the tracker file of a checkpoint names, as far as it can be read.

    Beside weights of Hugging Face's form DeepSpeed's names what a trainer resumes from, and no checkpoint of a model.
    """
    if (text := _tracked(root / TRACKER)) is not None:
        return root / (_name_of(int(text)) if text.isdecimal() else RELEASE)
    if not holds_weights(root) and (text := _tracked(root / DEEPSPEED_TRACKER)) is not None:
        return root / text if text == Path(text).name else None  # such as global_step1000: a name, and no path
    return None


def _tracked(path: Path, most: int = 100) -> str | None:
    """What a tracker file says; None if there is none, it cannot be read, or it has more than `most` bytes."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError:
        return None
    return data.decode("utf-8", errors="surrogateescape").strip() if len(data) <= most else None


def rank_files(folder: Path) -> dict[tuple[int, ...], Path]:
    """The file of every rank in a folder, by the ranks its name gives: `mp_rank_01_000` is (1, 0)."""
    if not folder.is_dir():
        return {}
    found = {}
    for path in sorted(folder.iterdir()):
        if (match := _FOLDER.fullmatch(path.name)) and path.is_dir():
            found[tuple(int(part) for part in match.groups() if part is not None)] = path / FILE
        elif match := _DEEPSPEED_FILE.fullmatch(path.name):
            found[(int(match[1]),)] = path
    return found


def layer_files(folder: Path) -> dict[tuple[int, int], Path]:
    """What a pipeline of DeepSpeed has saved: the file of every module by its number and tensor rank."""
    if not folder.is_dir():
        return {}
    matches = ((_LAYER_FILE.fullmatch(path.name), path) for path in sorted(folder.iterdir()))
    return {(int(match[1]), int(match[2] or 0)): path for match, path in matches if match}


def even_chunks(num_layers: int, pipeline: int, per_chunk: int | None = None) -> tuple[Chunk, ...]:
    """`num_layers` in equal runs over the stages, or `per_chunk` at a time, going round over them.

    Chunk v of stage p begins with layer (v * stages + p) * `per_chunk`."""
    size = per_chunk or num_layers // pipeline
    return chunks_of([size] * (num_layers // size), pipeline)


def chunks_of(sizes: Iterable[int], pipeline: int) -> tuple[Chunk, ...]:
    """Runs of `sizes` layers, going round over the stages."""
    bounds = pairwise(accumulate(sizes, initial=0))
    return tuple(Chunk(i % pipeline, i // pipeline, range(start, stop)) for i, (start, stop) in enumerate(bounds))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A layout as a user asks for it."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    layer_list: tuple[int, ...] | None = None
    layers_per_chunk: int | None = None

    def layout(self, model: ModelConfig) -> MegatronLayout:
        """The layout for `model`; ProblemError with everything in it that cannot be."""
        raise_all([*self._stages(model.num_layers), *indivisible(model, self.tensor, self.expert)])
        if self.layer_list is not None:
            chunks = chunks_of(self.layer_list, self.pipeline)
        else:
            chunks = even_chunks(model.num_layers, self.pipeline, self.layers_per_chunk)
        virtual = self.layers_per_chunk is not None
        return MegatronLayout(tensor=self.tensor, expert=self.expert, chunks=chunks, virtual=virtual)

    def _stages(self, layers: int) -> Problems:
        virtual, size = "--num-layers-per-virtual-pipeline-stage", self.layers_per_chunk
        if self.layer_list is not None:
            yield from self._listed(self.layer_list, layers)
        elif size is not None and self.pipeline < 2:
            yield from requires(virtual, size, f"{PIPELINE} 2 or more", "there is only one pipeline stage")
        elif size is not None:
            yield from shards.virtual_stage_problems(virtual, size, self.pipeline, layers)
        else:
            instead = "set the layers of each stage with --num-layer-list"
            yield from divides(PIPELINE, self.pipeline, layers, "layers", instead=instead)

    def _listed(self, given: tuple[int, ...], layers: int) -> Problems:
        option, text = "--num-layer-list", ",".join(map(str, given))
        yield from excludes(option, text, "--num-layers-per-virtual-pipeline-stage", self.layers_per_chunk)
        yield from shards.layer_list_problems(option, given, self.pipeline, layers)
        if min(given) < 1:
            yield Problem(option, text, "a stage would have no layers", "give positive numbers", "idle")


def indivisible(model: ModelConfig, tensor: int, expert: int) -> Problems:
    """What `tensor` and `expert` ranks cannot shard evenly."""
    option = "--target-tensor-parallel-size"
    for groups in shards.num_groups(model):
        yield from divides(option, tensor, groups, "heads with keys and values of their own")
    for width in shards.mlp_widths(model):
        yield from divides(option, tensor, width, "channels of the MLP")
    yield from shards.expert_problems("--target-expert-parallel-size", expert, model)
