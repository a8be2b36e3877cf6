"""How many ways a run is divided along each axis, worked out without torch.

Owns the axes, their order and the law that joins them. `layout.py` turns degrees into meshes; nothing here knows a
device or a process."""

import math
from dataclasses import dataclass

from cordee.errors import Problem, Problems, divides, divisible, raise_all
from cordee.parallel.options import InferenceLayoutOptions, ParallelOptions

AXES = ("pp", "replicate", "shard", "cp", "tp")
DATA_AXES = ("replicate", "shard")
TOKEN_AXES = (*DATA_AXES, "cp")  # along which ranks hold different tokens
SUM_AXES = ("pp", *TOKEN_AXES)  # along which each rank has a part of the loss, or none
DEGREES = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
RANKS = ("nproc_per_node", *DEGREES)  # the number of data-parallel ranks follows from these


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of the mesh axes in the order of ranks, the slowest first: rank = tp + tp_size * (cp + cp_size * (...)).

    pp: pipeline ranks. replicate x shard: data parallel, whose ranks see different samples; optimizer state and
    parameters are sharded over shard and replicated over replicate. cp: shards of a sequence. tp: shards of a matrix.

    Of the cp ranks, `ulysses` neighbours run all-to-all over heads and sequence, and each is in a ring with its like.

    ep: shards of the experts. It is no axis of its own, but folds over the ranks that hold different tokens
    (replicate, shard and cp together), neighbours first, so that ep divides their number. `unsharded`: all of
    those hold whole parameters (ZeRO stage 0)."""

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    ulysses: int = 1
    tp: int = 1
    ep: int = 1
    unsharded: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        return self.pp * self.token_ranks * self.tp

    @property
    def ring(self) -> int:
        """Context-parallel ranks that rotate keys and values."""
        return self.cp // self.ulysses

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    @property
    def token_ranks(self) -> int:
        """Ranks that hold different tokens: parameters are sharded over them."""
        return self.data * self.cp

    @property
    def storage(self) -> tuple[int, int]:
        """How many replicas of a parameter the token ranks hold, and into how many shards each is cut."""
        if self.unsharded:
            return self.token_ranks, 1
        return self.replicate, self.shard * self.cp

    @property
    def expert_storage(self) -> tuple[int, int]:
        """As `storage`, of the experts, each of which has 1 / ep of the token ranks."""
        copies = self.token_ranks // self.ep
        if self.unsharded:
            return copies, 1
        shards = max(1, self.storage[1] // self.ep)
        return copies // shards, shards


def model_ranks(options: ParallelOptions) -> int:
    """The number of ranks of one model replica: they process the same samples."""
    return math.prod(getattr(options, name) for name in DEGREES)


def fewest_processes(options: ParallelOptions) -> int:
    """The smallest number of processes that the degrees divide."""
    return model_ranks(options) * options.expert_model_parallel_size * options.num_distributed_optimizer_instances


def model_processes(options: InferenceLayoutOptions) -> int:
    """The number of processes that shard one copy of a model which only runs."""
    return options.tensor_model_parallel_size * options.pipeline_model_parallel_size


def degrees(options: ParallelOptions, world_size: int) -> Degrees:
    """Degrees of a run over `world_size` processes, the rest of which are data parallel. ProblemError if unfit."""
    raise_all(problems(options, world_size))
    return fitting(options, world_size)


def fitting(options: ParallelOptions, world_size: int) -> Degrees:
    """As `degrees`; where these do not fit `world_size`, those over the fewest processes that they fit."""
    data, left = divmod(world_size, model_ranks(options))
    if left or not data:
        data = fewest_processes(options) // model_ranks(options)
    instances = options.num_distributed_optimizer_instances
    replicate = data if options.zero_stage == 0 else instances if data % instances == 0 else 1
    return Degrees(
        pp=options.pipeline_model_parallel_size,
        replicate=replicate,
        shard=data // replicate,
        cp=options.context_parallel_size,
        ulysses=ulysses_ranks(options),
        tp=options.tensor_model_parallel_size,
        ep=options.expert_model_parallel_size,
        unsharded=options.zero_stage == 0,
    )


def ulysses_ranks(options: ParallelOptions) -> int:
    """How many of the context-parallel ranks run all-to-all over heads and sequence with each other."""
    if options.context_parallel_algo == "hybrid_cp_algo":
        return options.ulysses_degree_in_cp or 1
    return options.context_parallel_size if options.context_parallel_algo == "ulysses_cp_algo" else 1


def problems(options: ParallelOptions, world_size: int) -> Problems:
    """Why degrees do not fit each other or `world_size`."""
    tp, cp, pp = options.tensor_model_parallel_size, options.context_parallel_size, options.pipeline_model_parallel_size
    model, ep = model_ranks(options), options.expert_model_parallel_size
    instances = options.num_distributed_optimizer_instances
    if options.context_parallel_algo == "hybrid_cp_algo":
        involved = ("context_parallel_size", "context_parallel_algo")
        yield from divides("--ulysses-degree-in-cp", ulysses_ranks(options), cp, "context-parallel ranks", *involved)
    made_of = f"tensor {tp} x context {cp} x pipeline {pp}"
    yield from divisible("processes", world_size, model, made_of, *RANKS, instead="lower a degree")
    if world_size % model:
        return
    data = world_size // model
    option = "--expert-model-parallel-size"
    yield from divides("--num-distributed-optimizer-instances", instances, data, "data-parallel ranks", *RANKS)
    yield from divides(option, ep, data * cp, f"ranks, {data} data-parallel x {cp} context-parallel,", *RANKS)
    if options.zero_stage != 0 and data * cp % ep == 0 and data % instances == 0:
        copies = data // instances * cp
        if copies % ep and ep % copies:
            why = f"each copy of the parameters is over {copies} ranks, of which it is neither divisor nor multiple"
            involved = (*RANKS, "num_distributed_optimizer_instances", "zero_stage")
            yield Problem(option, ep, why, f"give a divisor of {copies}", "divides", involved, copies)
