"""An objective brings everything that is its own, and trains alike under every layout."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from cordee.config.schema import TrainConfig
from cordee.errors import ProblemError
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.train import objectives
from cordee.train.plan import plan_run
from tests.train import tiny
from tests.train.pairs import PairConfig, Pairs, Preference, plain_loss

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
    base = tiny.config(folder, stage="pairs", train_iters=STEPS, save_interval=2, eval_iters=1, eval_interval=2, **options)
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
    names = ("loss", "grad_norm", "right")
    read = {name: [found[step][name] for step in sorted(found)] for name in names}
    return read | {"validation": [held_out[step]["loss"] for step in sorted(held_out)]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> PairConfig:
    config = given(tmp_path_factory.mktemp("alone"))
    train(0, 1, config)
    return config


def test_is_what_a_plain_computation_gives(alone: PairConfig):
    """Loss and gradient norm of the first step, where the model is the reference and every loss is ln 2, and the loss
    and gradient norm of the second."""
    found = figures(alone)
    with registered():
        spec = plan_run(alone, 1).spec
    models = []
    for _ in range(2):
        models.append(GPTModel(spec.config))
        initialise(models[-1], alone.seed)
    model, reference = models
    pairs = Pairs(alone, tiny.VOCAB)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(alone.adam_beta1, alone.adam_beta2), eps=alone.adam_eps, weight_decay=0.0)
    for step in range(2):
        loss = plain_loss(model, reference, [pairs[step * tiny.BATCH + n] for n in range(tiny.BATCH)])
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        assert found["loss"][step] == pytest.approx(loss.item(), rel=1e-5)
        assert found["grad_norm"][step] == pytest.approx(norm.item(), rel=1e-5)
        optimizer.zero_grad()
    assert found["loss"][0] == pytest.approx(math.log(2), rel=1e-6) and found["grad_norm"][0] > 0.1


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_loss_under_every_layout(pool, alone: PairConfig, tmp_path: Path, name: str):
    ranks, options = LAYOUTS[name]
    config = given(tmp_path, **options)
    pool.run(train, ranks, config)
    expected, found = figures(alone), figures(config)
    assert len(found["loss"]) == STEPS and len(found["validation"]) == 2
    for figure, values in expected.items():
        assert found[figure] == pytest.approx(values, rel=1e-5), figure
