"""A layout as text; ranks count tp first, then cp, shard, replicate, and pp last."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch.distributed as dist

from cordee.parallel.degrees import Degrees, degrees
from cordee.parallel.describe import describe_layout, group
from cordee.parallel.layout import Layout
from cordee.train.options import TrainConfig


def test_alone():
    assert describe_layout(Degrees()) == "1 process"
    assert describe_layout(Degrees(), [1234]) == "1 process\n  rank 0: 1,234 parameters between steps"


def test_every_axis():
    assert describe_layout(Degrees(pp=2, shard=2, tp=4, ep=2), [1_000_000] * 8 + [900_000] * 7 + [800_000]) == (
        "16 processes = pp 2 x dp 2 x cp 1 x tp 4, ep 2\n"
        "  pp       2  layers                               ranks 0 8 | 1 9 | 2 10 | ... | 7 15\n"
        "  shard    2  samples                              ranks 0 4 | 1 5 | 2 6 | ... | 11 15\n"
        "  ep       2  experts                              ranks 0 4 | 1 5 | 2 6 | ... | 11 15\n"
        "  tp       4  heads, width of the MLP, vocabulary  ranks 0-3 | 4-7 | 8-11 | 12-15\n"
        "  a parameter is kept in 2 shards x 1 copy, one of experts in 1 shard x 1 copy\n"
        "  ranks 0-7 each: 1,000,000 parameters between steps\n"
        "  ranks 8-14 each: 900,000 parameters between steps\n"
        "  rank 15: 800,000 parameters between steps"
    )


def test_hybrid_and_context():
    assert describe_layout(Degrees(replicate=2, shard=2, cp=2)) == (
        "8 processes = pp 1 x dp 4 (replicate 2 x shard 2) x cp 2 x tp 1\n"
        "  replicate    2  samples               ranks 0 4 | 1 5 | 2 6 | 3 7\n"
        "  shard        2  samples               ranks 0 2 | 1 3 | 4 6 | 5 7\n"
        "  cp           2  tokens of a sequence  ranks 0 1 | 2 3 | 4 5 | 6 7\n"
        "  a parameter is kept in 4 shards x 2 copies"
    )


def test_replicated():
    assert describe_layout(Degrees(replicate=6, unsharded=True)) == (
        "6 processes = pp 1 x dp 6 x cp 1 x tp 1\n"
        "  replicate    6  samples  ranks 0-5\n"
        "  a parameter is kept in 1 shard x 6 copies"
    )


def own_groups(rank: int, world_size: int, given: dict) -> dict[str, list[int]]:
    layout = Layout(degrees(TrainConfig(seq_length=8, lr=1.0, **given), world_size))
    axes = ("pp", "replicate", "shard", "cp", "ep", "tp")
    return {axis: dist.get_process_group_ranks(group) for axis in axes if (group := layout.group(axis)) is not None}


@pytest.mark.parametrize(
    "given",
    [
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {"pipeline_model_parallel_size": 2, "zero_stage": 0},
        {"context_parallel_size": 2, "expert_model_parallel_size": 4},
        {"num_distributed_optimizer_instances": 2},
    ],
)
def test_groups_are_those_of_the_meshes(pool, given: dict):
    shape = degrees(TrainConfig(seq_length=8, lr=1.0, **given), 4)
    found = pool.run(own_groups, 4, given)
    for rank, own in enumerate(found):
        assert own
        for axis, ranks in own.items():
            found = [group(shape, axis, number) for number in range(shape.world_size // len(ranks))]
            assert [list(one) for one in found if rank in one] == [ranks]


def test_needs_no_torch():
    code = "import sys, cordee.parallel.describe, cordee.parallel.cost; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
