"""The layouts that `cordee bench parity` compares.

Owns the techniques in every form, and which of them are combined. Trains nothing."""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Case:
    """A layout by the options that ask for it."""

    name: str
    ranks: int
    options: Mapping[str, Any]

    def degree(self, axis: str) -> int:
        """Its ranks along "tensor_model", "pipeline_model", "context" or "expert_model"."""
        return self.options.get(f"{axis}_parallel_size", 1)

    @property
    def data_ranks(self) -> int:
        return self.ranks // math.prod(map(self.degree, ("tensor_model", "pipeline_model", "context")))


ALONE = Case("one process", 1, {})


@dataclass(frozen=True)
class _Way:
    """One technique: its ranks, the axis they are along, and its options. `moe`: only for MoE models."""

    name: str
    axis: str
    ranks: int
    options: Mapping[str, Any]
    moe: bool = False


def _ways() -> Iterator[_Way]:
    """Every technique in every form. Experts (axis "ep") have no ranks of their own, but are shared out over others."""
    yield from _tensor()
    yield from _data()
    yield from _context()
    yield from _pipeline()
    yield from _experts()


def _tensor() -> Iterator[_Way]:
    for size in (2, 4):
        yield _Way(f"tp{size}", "tp", size, {"tensor_model_parallel_size": size})
        yield _Way(f"tp{size}·sp", "tp", size, {"tensor_model_parallel_size": size, "sequence_parallel": True})
    yield _Way("tp8", "tp", 8, {"tensor_model_parallel_size": 8})  # twice as many as key and value heads
    overlap = {"tensor_model_parallel_size": 2, "tp_comm_overlap": True}
    yield _Way("tp2·overlap", "tp", 2, overlap)
    yield _Way("tp2·sp·overlap", "tp", 2, {**overlap, "sequence_parallel": True})


def _data() -> Iterator[_Way]:
    for stage in range(4):
        yield _Way(f"dp2·zero{stage}", "dp", 2, {"zero_stage": stage})
    yield _Way("dp4·zero0", "dp", 4, {"zero_stage": 0})
    yield _Way("dp4·zero3", "dp", 4, {"zero_stage": 3})
    yield _Way("dp8·zero1", "dp", 8, {"zero_stage": 1})
    yield _Way("dp4·hsdp2", "dp", 4, {"zero_stage": 2, "num_distributed_optimizer_instances": 2})
    overlap = {"zero_stage": 3, "overlap_grad_reduce": True, "overlap_param_gather": True}
    yield _Way("dp2·zero3·overlap", "dp", 2, overlap)


def _context() -> Iterator[_Way]:
    ring, hybrid = {"context_parallel_algo": "megatron_cp_algo"}, {"context_parallel_algo": "hybrid_cp_algo"}
    for size in (2, 4):
        yield _Way(f"cp{size}·ulysses", "cp", size, {"context_parallel_size": size})
        yield _Way(f"cp{size}·ring", "cp", size, {"context_parallel_size": size, **ring})
    yield _Way("cp2·ring·overlap", "cp", 2, {"context_parallel_size": 2, **ring, "use_cp_send_recv_overlap": True})
    yield _Way("cp4·double ring", "cp", 4, {"context_parallel_size": 4, **ring, "cp_window_size": 2})
    yield _Way("cp4·hybrid", "cp", 4, {"context_parallel_size": 4, **hybrid, "ulysses_degree_in_cp": 2})


def _pipeline() -> Iterator[_Way]:
    two = {"pipeline_model_parallel_size": 2}
    for schedule in ("1f1b", "gpipe"):
        yield _Way(f"pp2·{schedule}", "pp", 2, {**two, "pipeline_schedule": schedule})
    virtual = {"num_layers_per_virtual_pipeline_stage": 1}
    for schedule in ("interleaved", "interleaved_zero_bubble"):
        yield _Way(f"pp2·{schedule.replace('_', ' ')}", "pp", 2, {**two, **virtual, "pipeline_schedule": schedule})
    for schedule in ("zbv", "dualpipev"):
        yield _Way(f"pp2·{schedule}", "pp", 2, {**two, "pipeline_schedule": schedule})
    for mode in ("aiao", "fifo"):
        yield _Way(f"pp2·fold {mode}", "pp", 2, {**two, **virtual, "fold_mode": mode})
    yield _Way("pp2·uneven", "pp", 2, {**two, "num_layer_list": "1,3"})
    four = {"pipeline_model_parallel_size": 4}
    yield _Way("pp4·1f1b", "pp", 4, four)
    placeholders = {"num_layers": 8, "noop_layers": "1,3,4,6"}  # of 8 stages of a layer each, four do nothing
    yield _Way("pp4·interleaved", "pp", 4, {**four, "num_layers_per_virtual_pipeline_stage": 1, **placeholders})


def _experts() -> Iterator[_Way]:
    for size in (2, 4):
        for kind in ("alltoall", "allgather"):
            options = {"expert_model_parallel_size": size, "moe_token_dispatcher_type": kind}
            yield _Way(f"ep{size}·{kind}", "ep", 1, options, moe=True)
    options = {"expert_model_parallel_size": 2, "moe_permutation_async_comm": True}
    yield _Way("ep2·overlap", "ep", 1, options, moe=True)


# What every pair and the triples are made of: a form or two of each technique, lest there be thousands.
PAIRED = {
    *("tp2", "tp2·sp", "tp4·sp", "dp2·zero0", "dp2·zero1", "dp2·zero2", "dp2·zero3", "dp4·hsdp2", "cp2·ulysses"),
    *("cp2·ring", "cp4·hybrid", "pp2·1f1b", "pp2·interleaved", "pp2·zbv", "pp4·1f1b", "ep2·alltoall", "ep2·allgather"),
}
TRIPLED = {
    *("tp2·sp", "dp2·zero1", "dp2·zero2", "cp2·ulysses", "cp2·ring", "pp2·1f1b", "pp2·interleaved", "ep2·alltoall")
}


def cases(moe: bool, most: int = 8) -> list[Case]:
    """Techniques alone, pairs and triples of different axes, on at most `most` ranks."""
    ways = [way for way in _ways() if moe or not way.moe]
    paired = [way for way in ways if way.name in PAIRED]
    tripled = [way for way in ways if way.name in TRIPLED]
    found: list[Case] = []
    for count, choice in ((1, ways), (2, paired), (3, tripled)):
        for chosen in itertools.combinations(choice, count):
            if (case := _case(chosen, most)) is not None:
                found.append(case)
    return found


def _case(chosen: tuple[_Way, ...], most: int) -> Case | None:
    """None where two techniques share an axis, ranks are too many, or too few for the experts."""
    ranks = math.prod(way.ranks for way in chosen)
    options = {name: value for way in chosen for name, value in way.options.items()}
    case = Case(" · ".join(way.name for way in chosen), ranks, options)
    if len({way.axis for way in chosen}) < len(chosen) or ranks > most:
        return None
    if case.data_ranks * case.degree("context") % case.degree("expert_model") == 0:
        return case
    # Experts alone are shared out over data-parallel ranks.
    return replace(case, ranks=case.degree("expert_model")) if len(chosen) == 1 else None
