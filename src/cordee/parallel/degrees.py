"""How many ways a run is divided along each axis, worked out without torch.

Owns the axes, their order and the law that joins them. `layout.py` turns degrees into meshes; nothing here knows a
device or a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cordee.config.check import model_ranks
from cordee.config.schema import ParallelOptions
from cordee.errors import Problem, raise_all

AXES = ("pp", "replicate", "shard", "cp", "tp")
DATA_AXES = ("replicate", "shard")
TOKEN_AXES = (*DATA_AXES, "cp")  # along which ranks hold different tokens
SUM_AXES = ("pp", *TOKEN_AXES)  # along which each rank has a part of the loss, or none


@dataclass(frozen=True, kw_only=True)
class Degrees:
    """Sizes of the mesh axes in the order of ranks, the slowest first: rank = tp + tp_size * (cp + cp_size * (...)).

    pp: pipeline stages. replicate x shard: data parallel, whose ranks see different samples; optimizer state and
    parameters are shared out over shard and repeated over replicate. cp: parts of a sequence. tp: parts of a matrix.

    Of the cp ranks, `ulysses` neighbours exchange heads for tokens, and each of them is in a ring with its like.

    ep: parts of the experts. It is no axis of its own, but folds over the ranks that hold different tokens
    (replicate, shard and cp together), neighbours first, so that ep divides their number. `whole`: parameters are
    repeated on all of those (ZeRO stage 0).
    """

    pp: int = 1
    replicate: int = 1
    shard: int = 1
    cp: int = 1
    ulysses: int = 1
    tp: int = 1
    ep: int = 1
    whole: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def world_size(self) -> int:
        return self.pp * self.token_ranks * self.tp

    @property
    def ring(self) -> int:
        """Context-parallel ranks that hand keys and values on to each other."""
        return self.cp // self.ulysses

    @property
    def data(self) -> int:
        """Ranks that see different samples."""
        return self.replicate * self.shard

    @property
    def token_ranks(self) -> int:
        """Ranks that hold different tokens: what parameters may be shared out over."""
        return self.data * self.cp

    @property
    def storage(self) -> tuple[int, int]:
        """How often a parameter is repeated over the token ranks, and into how many shards each copy is divided."""
        if self.whole:
            return self.token_ranks, 1
        return self.replicate, self.shard * self.cp

    @property
    def expert_storage(self) -> tuple[int, int]:
        """As `storage`, of the experts, each of which has 1 / ep of the token ranks."""
        copies = self.token_ranks // self.ep
        if self.whole:
            return copies, 1
        shards = max(1, self.storage[1] // self.ep)
        return copies // shards, shards


def degrees(options: ParallelOptions, world_size: int) -> Degrees:
    """Degrees of a run over `world_size` processes: whatever no other axis takes is data parallel.

    ProblemError if they do not fit each other.
    """
    raise_all(_problems(options, world_size))
    tp, cp, pp = options.tensor_model_parallel_size, options.context_parallel_size, options.pipeline_model_parallel_size
    data = world_size // model_ranks(options)
    replicate = data if options.zero_stage == 0 else options.num_distributed_optimizer_instances
    return Degrees(
        pp=pp,
        replicate=replicate,
        shard=data // replicate,
        cp=cp,
        ulysses=_ulysses(options),
        tp=tp,
        ep=options.expert_model_parallel_size,
        whole=options.zero_stage == 0,
    )


def _ulysses(options: ParallelOptions) -> int:
    if options.context_parallel_algo == "hybrid_cp_algo":
        return options.ulysses_degree_in_cp or 1
    return options.context_parallel_size if options.context_parallel_algo == "ulysses_cp_algo" else 1


def _problems(options: ParallelOptions, world_size: int) -> Iterator[Problem]:
    tp, cp, pp = options.tensor_model_parallel_size, options.context_parallel_size, options.pipeline_model_parallel_size
    model = model_ranks(options)
    if world_size % model:
        why = f"tensor {tp} x context {cp} x pipeline {pp} = {model} does not divide them"
        fix = f"start a multiple of {model}, or lower a degree"
        yield Problem("processes", world_size, why, fix)
        return
    if cp % _ulysses(options):
        why = f"it does not divide the {cp} context-parallel ranks"
        yield Problem("--ulysses-degree-in-cp", _ulysses(options), why, f"give a divisor of {cp}")
    data = world_size // model
    instances, ep = options.num_distributed_optimizer_instances, options.expert_model_parallel_size
    if data % instances:
        why = f"it does not divide the {data} data-parallel ranks"
        yield Problem("--num-distributed-optimizer-instances", instances, why, f"give a divisor of {data}")
    if options.zero_stage == 0 and instances > 1:
        why = "--zero-stage 0 shares nothing out that could be repeated"
        yield Problem("--num-distributed-optimizer-instances", instances, why, "leave it out, or give a ZeRO stage")
    if data * cp % ep:
        why = f"it does not divide the {data} data-parallel x {cp} context-parallel ranks that share the experts out"
        yield Problem("--expert-model-parallel-size", ep, why, f"give a divisor of {data * cp}")
    elif options.zero_stage != 0 and data % instances == 0:
        shards = data // instances * cp
        if shards % ep and ep % shards:
            why = f"each copy of the parameters is over {shards} ranks, of which it is neither divisor nor multiple"
            yield Problem("--expert-model-parallel-size", ep, why, f"give a divisor of {shards}")
