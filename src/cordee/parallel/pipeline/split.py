"""Which layers each stage of a pipeline has, and which rank has the stage.

Owns the partition of a model's layers: balanced by what layers cost, or set by `--num-layer-list`, `--noop-layers` and
virtual stages; and the laws of these options. Knows neither torch nor time."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from cordee.config.values import whole_numbers
from cordee.errors import Problem, Problems, raise_all
from cordee.families.count import head_flops, layer_flops
from cordee.model import shards
from cordee.model.config import ModelConfig
from cordee.model.span import Span
from cordee.parallel.options import ParallelOptions
from cordee.parallel.pipeline.schedules import V_SHAPED, rank_of


@dataclass(frozen=True, kw_only=True)
class StagePartition:
    """A model over the ranks of a pipeline: the span of each stage, in the order of the model."""

    schedule: str
    num_ranks: int
    spans: tuple[Span, ...]

    @property
    def num_stages(self) -> int:
        return len(self.spans)

    @property
    def stages_per_rank(self) -> int:
        return self.num_stages // self.num_ranks

    def rank_of(self, stage: int) -> int:
        """The rank that has a stage."""
        return rank_of(self.schedule, stage, self.num_ranks)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank."""
        return [stage for stage in range(self.num_stages) if self.rank_of(stage) == rank]

    def __str__(self) -> str:
        """For people: "1f1b over 2 ranks: embedding, layers 0 to 3 | layers 4 to 7, head"."""
        ranks = (", ".join(filter(None, map(_describe, self.spans_of(rank)))) for rank in range(self.num_ranks))
        return f"{self.schedule} over {self.num_ranks} ranks: {' | '.join(ranks)}"

    def spans_of(self, rank: int) -> list[Span]:
        """The spans of a rank."""
        return [self.spans[stage] for stage in self.stages_of(rank)]


def _describe(span: Span) -> str:
    layers = ""
    if span.layers:
        layers = f"layers {span.start} to {span.stop - 1}" if len(span.layers) > 1 else f"layer {span.start}"
    return ", ".join(filter(None, ("embedding" if span.embedding else "", layers, "head" if span.head else "")))


def schedule_of(options: ParallelOptions) -> str:
    """The schedule that the options ask for."""
    if options.fold_mode is not None:
        return f"fold_{options.fold_mode}"
    if options.pipeline_schedule is not None:
        return options.pipeline_schedule
    return "1f1b" if options.num_layers_per_virtual_pipeline_stage is None else "interleaved"


def partition_layers(options: ParallelOptions, model: ModelConfig, seq_length: int) -> StagePartition:
    """`model` over the stages that `options` ask for. ProblemError with all laws that are broken."""
    raise_all([*_list_problems(options, model), *_noop_problems(options, model), *_virtual_problems(options, model)])
    schedule, num_ranks = schedule_of(options), options.pipeline_model_parallel_size
    num_stages = num_ranks * _stages_per_rank(options, schedule, model)
    if options.num_layer_list is not None:
        ends = list(accumulate(whole_numbers(options.num_layer_list) or ()))
    elif options.num_layers_per_virtual_pipeline_stage is not None or options.noop_layers is not None:
        raise_all(_even_problems(options, model, num_stages))
        ends = _even_ends(model.num_layers, noop_layers(options) or (), num_stages)
    else:
        raise_all(_few_problems(model, num_stages, schedule, num_ranks))
        ends = _ends_by_cost(model, seq_length, num_stages)
    partition = StagePartition(schedule=schedule, num_ranks=num_ranks, spans=_spans(ends))
    raise_all(_idle_problems(options, partition))
    return partition


def by_cost(model: ModelConfig, num_stages: int) -> tuple[Span, ...]:
    """Spans of stages that generate text, a token at a time: balanced by cost."""
    return _spans(_ends_by_cost(model, 1, num_stages))


def _spans(ends: Sequence[int]) -> tuple[Span, ...]:
    """Of stages that end at these layers."""
    last = len(ends) - 1
    bounds = enumerate(pairwise([0, *ends]))
    return tuple(Span(start, stop, embedding=i == 0, head=i == last) for i, (start, stop) in bounds)


def _stages_per_rank(options: ParallelOptions, schedule: str, model: ModelConfig) -> int:
    if options.num_layers_per_virtual_pipeline_stage is not None:
        stages = _num_layers(options, model) // options.num_layers_per_virtual_pipeline_stage
        return stages // options.pipeline_model_parallel_size
    return 2 if schedule in V_SHAPED else 1


def _even_ends(num_layers: int, noop: Sequence[int], num_stages: int) -> list[int]:
    """Where stages of equal size end, if placeholders count as layers."""
    total = num_layers + len(noop)
    real = [0, *accumulate(int(index not in noop) for index in range(total))]
    size = total // num_stages
    return real[size::size]


def _ends_by_cost(model: ModelConfig, seq_length: int, num_stages: int) -> list[int]:
    """Where stages end so that the slowest costs least, and all others are as equal as that allows.

    Costs are FLOPs of the forward; the last stage has those of the head too, the embedding costs nothing. All stages
    but the first and the last have a layer."""
    costs = [layer_flops(layer, model, seq_length) for layer in model.layers]
    scale = max(costs)  # small numbers, whose squares are exact enough
    sums = [0.0, *accumulate(cost / scale for cost in costs)]
    head = head_flops(model) / scale
    best: _Best = [(0.0, 0.0, [])] + [None] * model.num_layers
    for stage in range(num_stages):
        last = stage == num_stages - 1
        extra, least = (head if last else 0.0), int(stage > 0 and not last)
        best = [_best_end(best, stop, sums, extra, least) for stop in range(model.num_layers + 1)]
    found = best[-1]
    assert found is not None, "there is a layer for every stage between the ends"
    return found[2]


# For every number of layers their best partition: the largest cost, the sum of squares, the ends of stages.
_Best = list[tuple[float, float, list[int]] | None]


def _best_end(before: _Best, stop: int, sums: Sequence[float], extra: float, least: int) -> Any:
    """The best way to let one more stage end at `stop`, of `least` layers at least and with `extra` cost."""
    found = []
    for start in range(stop - least + 1):
        if (whole := before[start]) is not None:
            cost = sums[stop] - sums[start] + extra
            found.append((round(max(whole[0], cost), 9), round(whole[1] + cost * cost, 9), [*whole[2], stop]))
    return min(found, default=None)


RANKS, LIST, NOOP = "--pipeline-model-parallel-size", "--num-layer-list", "--noop-layers"
VIRTUAL = "--num-layers-per-virtual-pipeline-stage"
_LAYERS = ("pipeline_model_parallel_size", "num_layers", "model", "load")
_STAGES = (*_LAYERS, "pipeline_schedule", "fold_mode")


def noop_layers(options: ParallelOptions) -> tuple[int, ...] | None:
    """The indices of placeholder layers; None if the option cannot be read."""
    return whole_numbers(options.noop_layers) if options.noop_layers is not None else ()


def _num_layers(options: ParallelOptions, model: ModelConfig) -> int:
    """With placeholders."""
    return model.num_layers + len(noop_layers(options) or ())


def _list_problems(options: ParallelOptions, model: ModelConfig) -> Problems:
    text, num_ranks = options.num_layer_list, options.pipeline_model_parallel_size
    if text is None:
        return
    if (schedule := schedule_of(options)) in V_SHAPED:
        why, fix = f"{schedule} has two stages on each rank", "leave it out: layers are divided by their cost"
        yield Problem(LIST, text, why, fix, "excludes", ("pipeline_schedule",), schedule)
    counts = whole_numbers(text)
    if counts is None:
        fix = "give the layers of each stage, such as 7,8,8,9"
        yield Problem(LIST, text, "the text is not a list of numbers", fix, "list")
        return
    yield from shards.layer_list_problems(LIST, counts, num_ranks, model.num_layers, *_LAYERS)


def _noop_problems(options: ParallelOptions, model: ModelConfig) -> Problems:
    text, noop = options.noop_layers, noop_layers(options)
    if noop is None:
        fix = "give indices of layers, counted from 0: 0,127"
        yield Problem(NOOP, text, "the text is not a list of numbers", fix, "list")
        return
    total = _num_layers(options, model)
    if outside := [index for index in noop if index >= total]:
        why = f"{outside[0]} is no index of {total} layers, with the {len(noop)} placeholders"
        yield Problem(NOOP, text, why, f"give numbers from 0 to {total - 1}", "at most", _LAYERS, total - 1)
    if len(set(noop)) < len(noop):
        yield Problem(NOOP, text, "an index is given twice", "give each index once", "unique")


def _virtual_problems(options: ParallelOptions, model: ModelConfig) -> Problems:
    size, num_ranks = options.num_layers_per_virtual_pipeline_stage, options.pipeline_model_parallel_size
    if size is None:
        return
    layers, involved = _num_layers(options, model), (*_LAYERS, "noop_layers")
    yield from shards.virtual_stage_problems(VIRTUAL, size, num_ranks, layers, *involved)
    if layers == size * num_ranks:
        why = f"each of {num_ranks} ranks would have one stage of {size} layers, and nothing to interleave"
        yield Problem(VIRTUAL, size, why, "give fewer layers, or leave it out", "at most", involved, layers)


def _even_problems(options: ParallelOptions, model: ModelConfig, num_stages: int) -> Problems:
    layers = _num_layers(options, model)
    if layers % num_stages:
        why = f"with placeholders {layers} layers are not divisible by {num_stages} stages"
        fix, involved = f"let there be a multiple of {num_stages}", (*_STAGES, "num_layers_per_virtual_pipeline_stage")
        yield Problem(NOOP, options.noop_layers, why, fix, "divisible", involved, num_stages)


def _few_problems(model: ModelConfig, num_stages: int, schedule: str, num_ranks: int) -> Problems:
    if model.num_layers < num_stages - 2:
        why = f"its {num_stages} stages ({schedule}) are more than {model.num_layers} layers, embedding and head"
        yield Problem(RANKS, num_ranks, why, f"give at most {model.num_layers}", "at most", _STAGES, model.num_layers)


def _idle_problems(options: ParallelOptions, partition: StagePartition) -> Problems:
    option, value = (LIST, options.num_layer_list) if options.num_layer_list else (NOOP, options.noop_layers)
    for rank in range(partition.num_ranks):
        if not any(span.layers or span.embedding or span.head for span in partition.spans_of(rank)):
            why = f"rank {rank} of the pipeline would have nothing to compute"
            yield Problem(option, value, why, "give it a layer", "idle", _STAGES, rank)
