"""A part of `cordee bench resume`: what is saved on a few layouts goes on on others."""

from __future__ import annotations

from pathlib import Path

import pytest

from cordee.bench import resume, tiny
from cordee.bench.layouts import ALONE, cases
from cordee.bench.tiny import TOLERANCE

PAIRS = {
    "dense": (("tp2", "dp2·zero1"), ("pp2·zbv", "one process")),
    "MoE": (("dp2·zero3 · ep2·allgather", "pp2·interleaved"),),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", PAIRS)
def test_a_run_goes_on_on_another_layout(pool, folder: Path, model: str):
    whole = tiny.trained(pool, folder, model, ALONE, **resume.GIVEN)
    known = {case.name: case for case in (ALONE, *cases(model == "MoE"))}
    for first, second in PAIRS[model]:
        found = resume.resumed(pool, folder, model, known[first], known[second])
        assert len(found["loss"]) == 3
        loss, norm = tiny.distance(found, resume.rest(whole))
        assert max(loss, norm) <= TOLERANCE, f"{first} to {second}: loss {loss:g}, gradient norm {norm:g}"
    assert resume.other_samples(pool, folder, model, whole) > 100 * TOLERANCE


def test_every_technique_is_saved_and_goes_on_on_more_and_fewer_processes():
    found = [pair for model in resume.ROUNDS for pair in resume.pairs(model)]
    assert len(found) >= 24
    assert all(first.name != second.name for first, second in found)
    for technique in ("tp", "sp", "1f1b", "interleaved", "zbv", "cp", "ep", "hsdp", *(f"zero{n}" for n in range(4))):
        for side in (0, 1):
            assert any(technique in pair[side].name for pair in found), technique
    assert {case.ranks for pair in found for case in pair} == {1, 2, 4, 8}
    assert any(first.ranks < second.ranks for first, second in found)
    assert any(first.ranks > second.ranks for first, second in found)
