"""The partition of layers over stages, and its laws."""

from __future__ import annotations

from typing import Any

import pytest

from cordee.config import laws
from cordee.errors import Problem, ProblemError
from cordee.model.config import ModelConfig
from cordee.parallel.degrees import degrees
from cordee.parallel.laws import PlacedRun
from cordee.parallel.pipeline import check
from cordee.parallel.pipeline.split import partition_layers
from cordee.train.options import TrainConfig
from tests.model import tiny


def model(num_layers: int, **changes: Any) -> ModelConfig:
    return tiny.config(*(tiny.layer(),) * num_layers, **{"vocab_size": 10, **changes})


def options(ranks: int, **given: Any) -> TrainConfig:
    return TrainConfig(seq_length=16, lr=1e-2, pipeline_model_parallel_size=ranks, **given)


def ends(ranks: int, config: ModelConfig, **given: Any) -> list[int]:
    return [span.stop for span in partition_layers(options(ranks, **given), config, 16).spans]


def test_equal_layers_are_sharded_evenly():
    assert ends(4, model(8)) == [2, 4, 6, 8]
    assert sorted(b - a for a, b in zip([0, 3, 5], [3, 5, 8], strict=True)) == [2, 3, 3]
    assert ends(2, model(8), pipeline_schedule="zbv") == [2, 4, 6, 8]


def test_a_large_head_counts_as_layers():
    heavy = ends(2, model(8, vocab_size=1000))
    assert heavy[0] > 4 and heavy[1] == 8


def test_no_partition_is_better():
    """Against trying all of them: the slowest stage, the head included, costs the least."""
    from itertools import combinations

    from cordee.families.count import head_flops, layer_flops

    wide = tiny.layer(mlp=tiny.MLPConfig(ffn_hidden_size=200, activation="silu", gated=True))
    config = tiny.config(tiny.layer(), wide, tiny.layer(), wide, tiny.layer(), tiny.layer(), vocab_size=200)
    costs = [layer_flops(layer, config, 16) for layer in config.layers]

    def slowest(cuts: list[int]) -> int:
        parts = [sum(costs[a:b]) for a, b in zip([0, *cuts[:-1]], cuts, strict=True)]
        return max([*parts[:-1], parts[-1] + head_flops(config)])

    best = min(slowest([*cut, 6]) for cut in combinations(range(1, 7), 2))
    assert slowest(ends(3, config)) == best


def test_lists_placeholders_and_virtual_stages():
    assert ends(3, model(8), num_layer_list="1,4,3") == [1, 5, 8]
    assert ends(2, model(6), noop_layers="0,7") == [3, 6]
    assert ends(4, model(6), noop_layers="0,7") == [1, 3, 5, 6]
    assert ends(2, model(8), num_layers_per_virtual_pipeline_stage=2) == [2, 4, 6, 8]
    assert ends(2, model(6), num_layers_per_virtual_pipeline_stage=2, noop_layers="0,7") == [1, 3, 5, 6]


def test_ranks_and_ends_of_the_model():
    looped = partition_layers(options(2, num_layers_per_virtual_pipeline_stage=1), model(4), 16)
    assert (looped.schedule, looped.stages_of(0), looped.stages_of(1)) == ("interleaved", [0, 2], [1, 3])
    assert str(looped) == "interleaved over 2 ranks: embedding, layer 0, layer 2 | layer 1, layer 3, head"
    vee = partition_layers(options(2, pipeline_schedule="zbv"), model(4), 16)
    assert (vee.stages_of(0), vee.stages_of(1)) == ([0, 3], [1, 2])
    assert [(span.embedding, span.head) for span in vee.spans] == [
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]
    assert [span.stop for span in vee.spans_of(0)] == [1, 4]


@pytest.mark.parametrize(
    ("given", "option", "kind"),
    [
        ({"num_layer_list": "3,4"}, "--num-layer-list", "sum"),
        ({"num_layer_list": "3,4,1"}, "--num-layer-list", "length"),
        ({"num_layer_list": "a,4"}, "--num-layer-list", "list"),
        ({"noop_layers": "a"}, "--noop-layers", "list"),
        ({"num_layer_list": "4,4", "pipeline_schedule": "zbv"}, "--num-layer-list", "excludes"),
        ({"noop_layers": "0,10"}, "--noop-layers", "at most"),
        ({"noop_layers": "1,1"}, "--noop-layers", "unique"),
        ({"noop_layers": "1"}, "--noop-layers", "divisible"),
        ({"num_layers_per_virtual_pipeline_stage": 3}, "--num-layers-per-virtual-pipeline-stage", "divides"),
        ({"num_layers_per_virtual_pipeline_stage": 4}, "--num-layers-per-virtual-pipeline-stage", "at most"),
    ],
)
def test_what_cannot_be_divided(given: dict, option: str, kind: str):
    with pytest.raises(ProblemError) as caught:
        partition_layers(options(2, **given), model(8), 16)
    assert (option, kind) in [(problem.option, problem.kind) for problem in caught.value.problems]


def test_a_rank_with_nothing_is_refused():
    with pytest.raises(ProblemError) as caught:
        partition_layers(options(3, num_layer_list="4,0,4"), model(8), 16)
    (problem,) = caught.value.problems
    assert (problem.option, problem.kind, problem.limit) == ("--num-layer-list", "idle", 1)
    assert ends(3, model(8), num_layer_list="0,8,0") == [0, 8, 8]


def broken(chosen: TrainConfig, ranks: int) -> list[Problem]:
    run = PlacedRun(model=model(8), degrees=degrees(chosen, ranks), options=chosen, micro_batches=[2])
    return [*laws.problems(chosen), *check.check(run)]


@pytest.mark.parametrize(
    ("given", "option", "kind", "limit"),
    [
        ({"pipeline_schedule": "zbv", "zero_stage": 3}, "--pipeline-schedule", "excludes", "--zero-stage"),
        ({"pipeline_schedule": "dualpipev", "compile": "blocks"}, "--pipeline-schedule", "excludes", "--compile"),
        ({"pipeline_schedule": "interleaved"}, "--pipeline-schedule", "stages", "at least 2"),
        ({"pipeline_schedule": "dualpipev"}, "--pipeline-schedule", "micro-batches", 4),
        ({"fold_mode": "aiao"}, "--fold-mode", "requires", "--num-layers-per-virtual-pipeline-stage"),
        ({"fold_mode": "fifo", "pipeline_schedule": "1f1b"}, "--fold-mode", "excludes", "--pipeline-schedule"),
        ({"optimized_pipeline": True}, "--optimized-pipeline", "requires", "--manual-mbs"),
        ({"manual_mbs": "1,1"}, "--manual-mbs", "requires", "--optimized-pipeline"),
        ({"use_manual_layer_allocation": True}, "--use-manual-layer-allocation", "requires", "--num-layer-list"),
        ({"optimized_pipeline": True, "manual_mbs": "1,3"}, "--manual-mbs", "sum", 2),
        (
            {"optimized_pipeline": True, "manual_mbs": "1,1", "pipeline_schedule": "gpipe"},
            "--optimized-pipeline",
            "requires",
            None,
        ),
        (
            {"num_layer_list": "4,4", "num_layers_per_virtual_pipeline_stage": 2},
            "--num-layer-list",
            "excludes",
            "--num-layers-per-virtual-pipeline-stage",
        ),
    ],
)
def test_what_cannot_run(given: dict, option: str, kind: str, limit: object):
    found = broken(options(2, global_batch_size=2, **given), 2)
    assert (option, kind, limit) in [(problem.option, problem.kind, problem.limit) for problem in found]


def test_options_of_a_pipeline_need_one():
    chosen = options(1, num_layer_list="4", pipeline_schedule="zbv", fold_mode="aiao", noop_layers="0")
    assert {
        problem.option for problem in broken(chosen, 1) if problem.limit == "--pipeline-model-parallel-size 2 or more"
    } == {"--num-layer-list", "--pipeline-schedule", "--fold-mode", "--noop-layers"}


def test_a_large_bubble_is_reported():
    partition = partition_layers(options(4), model(8), 16)
    assert "43%" in next(check.notes(partition, [16, 4]))
    assert not list(check.notes(partition, [16]))
    assert not list(check.notes(partition_layers(options(4, pipeline_schedule="zbv"), model(8), 16), [4]))
