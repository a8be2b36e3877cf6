"""What a technique puts on the model of a run: adapters and wrappers, through checkpoints too."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cordee.checkpoint import directory, files
from cordee.checkpoint.storage import location_of
from cordee.errors import ProblemError
from cordee.model.config import LowRankConfig
from cordee.parallel.wrapper import Wrapper
from cordee.train import job, techniques
from cordee.train.plan import check_run
from cordee.train.techniques import Technique
from tests.problems import facts
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS = {"train_iters": 4, "micro_batch_size": 8, "lr_warmup_iters": 0}


class Adapters(Technique):
    """Adapters and a prefix are trained, and nothing else; the calls of every layer are counted."""

    def __init__(self, **changes: Any):
        self.changes = {"targets": ("q", "down"), "rank": 2, "scale": 1.0, **changes}
        self.calls: Counter[int] = Counter()

    def adapt(self, spec, options):
        return replace(spec.config, low_rank=(LowRankConfig(**self.changes),), num_prefix_tokens=1)

    def trains(self, model, options):
        return {"adapter"}

    def wrappers(self, options):
        def around(call):
            def counted(forward, *inputs, **options):
                self.calls["layer"] += 1
                return call(forward, *inputs, **options)

            return counted

        return [Wrapper(name="count", around=around)]


def kept(path: str | None, iteration: int) -> dict[str, torch.Tensor]:
    """Every parameter of a checkpoint."""
    folder = directory.folder_of(location_of(path or ""), iteration)
    metadata = files.read_metadata(folder)
    names = [name for name in files.tensors(metadata) if name.startswith("model.")]
    return {name: files.read_tensor(folder, metadata, name) for name in names}


def put_on(patch: pytest.MonkeyPatch, *put: Technique) -> None:
    patch.setattr(techniques, "TECHNIQUES", put)


def train_with_adapters(rank: int, world_size: int, given) -> None:
    with pytest.MonkeyPatch.context() as patch:
        put_on(patch, Adapters())
        tiny.train_rank(rank, world_size, given)


def test_adapters_over_a_base_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pool):
    """A base checkpoint has none: they are initialised, and trained alone. A run resumes with its own."""
    base = tiny.config(tmp_path, **STEPS)
    job.run(base)
    adapters = Adapters()
    put_on(monkeypatch, adapters)
    whole = replace(base, load=base.save, finetune=True, save=str(tmp_path / "whole"))
    job.run(whole)
    assert adapters.calls["layer"] == 2 * 4  # layers, steps
    before, after = kept(base.save, 4), kept(whole.save, 4)
    added = after.keys() - before.keys()
    assert before.keys() < after.keys() and any("adapters" in name for name in added)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(torch.equal(after[name], kept(whole.save, 2)[name]) for name in added)

    parts = replace(whole, save=str(tmp_path / "parts"), exit_interval=2)
    job.run(parts)
    pool.run(train_with_adapters, 2, tiny.resumed(parts, finetune=False, micro_batch_size=4))
    assert tiny.losses(parts) == pytest.approx(tiny.losses(whole), rel=1e-5)
    again = replace(whole, load=whole.save, save=str(tmp_path / "again"))  # a start from weights that have adapters
    job.run(again)
    assert tiny.losses(again)[0] != pytest.approx(tiny.losses(whole)[0], rel=1e-5)


def test_a_resume_demands_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = tiny.config(tmp_path, **STEPS, exit_interval=2)
    job.run(base)
    put_on(monkeypatch, Adapters())
    with pytest.raises(ProblemError) as caught:
        job.run(tiny.resumed(base))
    assert {(option, kind) for option, _, kind in facts(caught)} == {("--load", "shape")}


def test_what_does_not_fit_is_a_problem_of_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    put_on(monkeypatch, Adapters(targets=("nowhere",)))
    (problem,) = check_run(tiny.config(tmp_path))
    assert (problem.option, problem.value) == ("low_rank: targets", "nowhere")
