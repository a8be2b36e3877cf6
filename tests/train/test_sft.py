"""Tuning on dialogues: one loss under every layout, weighted by trained tokens, from files or from records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cordee import GPTModel
from cordee.data.messages import IGNORED
from cordee.data.tuning import Packer
from cordee.data.tuning_dataset import TuningDataset
from cordee.model.init import initialise
from cordee.train.options import TrainConfig
from cordee.train.plan import plan_run
from tests.data.test_tuning import columns_of, make_samples, write
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2 sequence": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "cp2 ring": (2, {"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}),
    "cp2 ulysses": (2, {"context_parallel_size": 2, "context_parallel_algo": "ulysses_cp_algo"}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "micro_batch_size": 2}),
    "dp2 zero3": (2, {"zero_stage": 3}),
}
KINDS = {"packed": {}, "variable": {"variable_seq_lengths": True, "pad_to_multiple_of": 2}}


def given(folder: Path, kind: str, **options: Any) -> TrainConfig:
    prefix = str(folder / kind)
    if not list(folder.glob(f"{kind}_packed*")):
        columns = columns_of(make_samples(60, 20))
        if kind == "packed":
            packer = Packer(tiny.LENGTH, pad=0, numbered=True)
            columns = columns_of(make_samples(60, 12))
            packer.add(columns)
            columns = packer.flush()
        write(Path(prefix), columns)
    common = {"stage": "sft", "data_path": (prefix,), "train_iters": 4, "eval_iters": 1, "eval_interval": 2}
    return tiny.config(folder, **common, **KINDS[kind], **options)


def figures(config: TrainConfig) -> dict[str, list[float]]:
    found, held_out = tiny.records(config), tiny.records(config, "validation")
    read = {name: [found[step][name] for step in sorted(found)] for name in ("loss", "grad_norm")}
    return read | {"validation": [held_out[step]["loss"] for step in sorted(held_out)]}


@pytest.fixture(scope="module", params=KINDS)
def alone(request, tmp_path_factory) -> tuple[str, TrainConfig]:
    config = given(tmp_path_factory.mktemp("alone"), request.param)
    train(0, 1, config)
    return request.param, config


def test_the_loss_is_the_mean_over_all_trained_tokens_of_a_step(alone):
    """Of the first step: every sample alone, without padding, through torch's own cross entropy."""
    _, config = alone
    dataset = plan_run(replace(ready(config), save=None, save_interval=None), 1).data.open(verified=False)["train"]
    assert isinstance(dataset, TuningDataset)
    model = GPTModel.from_pretrained(Path(config.save or "") / "iter_0000002")
    initialise(model, config.seed)
    total, weight = torch.zeros(()), 0
    for index in range(tiny.BATCH):
        ids, mask, labels = (
            torch.from_numpy(dataset[index][name]) for name in ("input_ids", "attention_mask", "labels")
        )
        for number in mask.unique():
            own, target = ids[mask == number], labels[mask == number][1:]
            if number == 0 or len(own) < 2:
                continue
            total = total + F.cross_entropy(model(own[None])[0, :-1], target, ignore_index=IGNORED, reduction="sum")
            weight += int((target != IGNORED).sum())
    (total / weight).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert figures(config)["loss"][0] == pytest.approx(total.item() / weight, rel=1e-5)
    assert figures(config)["grad_norm"][0] == pytest.approx(norm.item(), rel=1e-5)


def ready(config: TrainConfig) -> TrainConfig:
    from cordee.train import objectives

    return objectives.named(config.stage).ready(config)


def train(rank: int, world_size: int, config: TrainConfig) -> None:
    tiny.train_rank(rank, world_size, ready(config))


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_loss_under_every_layout(pool, alone, tmp_path: Path, name: str):
    kind, reference = alone
    ranks, options = LAYOUTS[name]
    config = given(tmp_path, kind, **options)
    pool.run(train, ranks, config)
    expected, found = figures(reference), figures(config)
    for figure, values in expected.items():
        assert found[figure] == pytest.approx(values, rel=1e-5), figure


def test_resumes_with_the_same_samples(pool, alone, tmp_path: Path):
    """On two ranks, what one rank began; and for longer."""
    kind, reference = alone
    first = given(tmp_path, kind, exit_interval=2)
    train(0, 1, first)
    pool.run(train, 2, tiny.resumed(first, zero_stage=1, train_iters=4))
    assert figures(first)["loss"] == pytest.approx(figures(reference)["loss"], rel=1e-5)
