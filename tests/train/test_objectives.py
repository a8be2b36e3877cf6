"""An objective brings everything that is its own, and trains alike under every layout."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cordee import GPTModel
from cordee.checkpoint import directory
from cordee.checkpoint.storage import location_of
from cordee.model import gpt
from cordee.model.init import initialise
from cordee.model.options import ModelOptions
from cordee.parallel.degrees import Degrees
from cordee.parallel.execution import Criterion, Frozen, LocalExecutor, StepBatches
from cordee.parallel.layout import Layout
from cordee.train import job, objectives
from cordee.train.objectives import FurtherModel, Run
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.train import tiny
from tests.train.pairs import PairBatch, PairConfig, Pairs, Preference, plain_loss

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

STEPS = 4
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sequence": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2 ring": (2, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}),
    "cp2 ulysses": (2, {"context_parallel_size": 2, "context_parallel_algo": "ulysses_cp_algo"}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "dp2 zero3": (2, {"zero_stage": 3}),
    "pp2 cp2 zero3": (4, {"pipeline_model_parallel_size": 2, "context_parallel_size": 2, "zero_stage": 3}),
}


def given(folder: Path, **options: Any) -> PairConfig:
    often = {"save_interval": 2, "eval_iters": 1, "eval_interval": 2}
    base = tiny.config(folder, **{"stage": "pairs", "train_iters": STEPS, **often, **options})
    return PairConfig(**{each.name: getattr(base, each.name) for each in fields(TrainConfig)})


@contextmanager
def registered() -> Iterator[None]:
    objectives.registry()["pairs"] = Preference()
    try:
        yield
    finally:
        del objectives.registry()["pairs"]


def train(rank: int, world_size: int, config: PairConfig) -> None:
    with registered():
        tiny.train_rank(rank, world_size, config)


def figures(config: PairConfig) -> dict[str, list[float]]:
    found = tiny.records(config)
    held_out = tiny.records(config, "validation")
    read = {name: [found[step][name] for step in sorted(found)] for name in ("loss", "grad_norm")}
    read["right"] = [found[step]["metrics"]["right"] for step in sorted(found)]
    return read | {"validation": [held_out[step]["loss"] for step in sorted(held_out)]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> PairConfig:
    config = given(tmp_path_factory.mktemp("alone"))
    train(0, 1, config)
    return config


def test_is_what_a_plain_computation_gives(alone: PairConfig):
    """Of the first step, where the model is the reference and every loss ln 2, and of the third, from the checkpoint
    before it."""
    found, pairs = figures(alone), Pairs(alone, tiny.VOCAB)
    second = Path(alone.save) / "iter_0000002"
    reference, first, third = (GPTModel.from_pretrained(second) for _ in range(3))
    initialise(reference, alone.seed)
    initialise(first, alone.seed)
    for step, model in ((0, first), (2, third)):
        loss = plain_loss(model, reference, [pairs[step * tiny.BATCH + n] for n in range(tiny.BATCH)])
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert found["loss"][step] == pytest.approx(loss.item(), rel=1e-5)
        assert found["grad_norm"][step] == pytest.approx(norm.item(), rel=1e-5)
    assert found["loss"][0] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(found["loss"][2] - math.log(2)) > 1e-3
    held_out = plain_loss(third, reference, [pairs[n] for n in range(tiny.BATCH)])
    assert found["validation"][0] == pytest.approx(held_out.item(), rel=1e-5)


def test_gradients_are_those_of_a_plain_computation(alone: PairConfig):
    """Far from the reference, over two micro-batches."""
    with registered():
        config = plan_run(replace(alone, save=None, save_interval=None), 1).spec.config
    models = [gpt.GPTModel(config) for _ in range(3)]
    for each, seed in zip(models, (1, 1, 2), strict=True):
        initialise(each, seed)
    model, plain, reference = models
    objective, cpu = Preference(), torch.device("cpu")
    criterion = Criterion(objective, Layout(Degrees()))
    frozen = Frozen(reference, LocalExecutor(reference, alone, cpu, criterion), Layout(Degrees()))
    samples = [Pairs(alone, tiny.VOCAB)[n] for n in range(6)]
    parts = [PairBatch.of(part, tiny.LENGTH) for part in (samples[:2], samples[2:])]
    weights = [objective.weight(part) for part in parts]
    batches = objective.prepare(parts, {"reference": frozen})
    work = StepBatches(batches=batches, weights=weights, weight=sum(weights), scale=1.0)
    sums = LocalExecutor(model, alone, cpu, criterion).train(work)
    expected = plain_loss(plain, reference, samples)
    expected.backward()
    assert sums[""].item() / work.weight == pytest.approx(expected.item(), rel=1e-5)
    assert abs(expected.item() - math.log(2)) > 1e-2
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert all(p.grad is None for p in reference.parameters())


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_loss_under_every_layout(pool, alone: PairConfig, tmp_path: Path, name: str):
    ranks, options = LAYOUTS[name]
    config = given(tmp_path, **options)
    pool.run(train, ranks, config)
    expected, found = figures(alone), figures(config)
    assert len(found["loss"]) == STEPS and len(found["validation"]) == 2
    for figure, values in expected.items():
        assert found[figure] == pytest.approx(values, rel=1e-5), figure


def test_resumes_among_its_own_data(pool, alone: PairConfig, tmp_path: Path):
    """On other ranks, from the middle of the run; the reference is what it was."""
    shutil.copytree(alone.save, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "iter_0000004")
    save = str(tmp_path / "run")
    config = replace(alone, save=save, load=save, context_parallel_size=2, context_parallel_algo="megatron_cp_algo")
    pool.run(train, 2, config)
    assert figures(config)["loss"] == pytest.approx(figures(alone)["loss"], rel=1e-5)
    manifest = directory.read_manifest(location_of(Path(save) / "iter_0000004"))
    assert manifest["data"] == {"pairs": alone.num_pairs, "seed": alone.seed}
    assert manifest["trainer"]["consumed_tokens"] == 2 * STEPS * tiny.BATCH * tiny.LENGTH


def test_another_stage_starts_anew_from_the_weights(alone: PairConfig, tmp_path: Path):
    other = tiny.config(tmp_path, load=alone.save, save=None, save_interval=None, train_iters=STEPS)
    assert [problem.option for problem in check_run(other)] == ["--stage"]
    assert check_run(replace(other, finetune=True)) == []


class OfAnother(Preference):
    """Its reference is another model than the one that is trained, with `changes`."""

    def __init__(self, **changes: Any):
        self.changes = changes

    def models(self, run: Run) -> dict[str, FurtherModel]:
        spec = super().models(run)["reference"].spec
        return {"reference": FurtherModel(spec=spec.with_options(ModelOptions(**self.changes)))}


@pytest.mark.parametrize(
    ("changes", "options", "expected"),
    [
        ({"max_position_embeddings": 8}, {}, ["--seq-length"]),
        ({"ffn_hidden_size": 49}, {"tensor_model_parallel_size": 2}, ["--tensor-model-parallel-size"]),
        ({"num_layers": 3}, {"pipeline_model_parallel_size": 2, "num_layer_list": "1,1"}, ["--num-layer-list"]),
        ({"ffn_hidden_size": 50}, {"tensor_model_parallel_size": 2}, []),
    ],
)
def test_a_further_model_is_checked_as_the_trained_one(tmp_path: Path, monkeypatch, changes, options, expected):
    monkeypatch.setitem(objectives.registry(), "pairs", OfAnother(**changes))
    found = check_run(given(tmp_path, nproc_per_node=2, **options))
    assert [problem.option for problem in found] == expected


def test_ranks_have_the_same_further_models(tmp_path: Path):
    def identity(**changes: Any) -> dict[str, Any]:
        objectives.registry()["pairs"] = OfAnother(**changes)
        return job._identity(plan_run(given(tmp_path), 1))

    with registered():
        one, other = identity(), identity(ffn_hidden_size=64)
    assert [name for name in one if one[name] != other[name]] == ["further models"]
