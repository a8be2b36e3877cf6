"""A part of `cordee bench parity`: what it measures, on a few layouts of each technique and their combinations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from cordee.bench import layouts, tiny
from cordee.bench.layouts import ALONE

LAYOUTS = {
    "dense": ("tp2·sp · dp2·zero1", "pp2·interleaved", "cp2·ring · pp2·1f1b", "tp2·sp · cp2·ulysses · pp2·1f1b"),
    "MoE": ("ep2·alltoall", "dp2·zero1 · ep2·allgather", "cp2·ulysses · pp2·1f1b · ep2·alltoall"),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", LAYOUTS)
def test_layouts_equal_one_process(pool, folder: Path, model: str):
    known = {case.name: case for case in layouts.cases(model == "MoE")}
    for name in LAYOUTS[model]:
        alone = tiny.trained(pool, folder, model, ALONE, micro_batch_size=tiny.micro_batch_size(known[name]))
        loss, norm, verdict = tiny.compare(lambda name=name: tiny.trained(pool, folder, model, known[name]), alone)
        assert verdict == "equal", f"{name}: loss {loss:g}, gradient norm {norm:g}"


def test_every_technique_alone_and_with_every_other():
    dense, moe = layouts.cases(False), layouts.cases(True)
    assert len(dense) >= 80 and len(moe) >= 80
    assert all(case.ranks <= 8 for case in moe)
    assert len({case.name for case in moe}) == len(moe)
    for first, second in (("tp2", "dp2·zero1"), ("tp2·sp", "cp2·ring"), ("dp2·zero1", "pp2·1f1b")):
        assert any(first in case.name and second in case.name for case in dense)
    samples = {"loss": [2.0], "grad_norm": [1.0], "consumed_samples": [8]}
    assert tiny.compare(lambda: samples | {"consumed_samples": [4]}, samples)[-1] == "OTHER SAMPLES"
    assert tiny.compare(lambda: samples | {"loss": [2.1]}, samples)[-1] == "DIFFERENT"
    assert tiny.compare(lambda: samples | {"loss": [math.nan]}, samples)[-1] == "DIFFERENT"
    assert tiny.distance({"loss": [2.0], "grad_norm": [1.0]}, {"loss": [4.0], "grad_norm": [1.0]}) == (0.5, 0.0)
