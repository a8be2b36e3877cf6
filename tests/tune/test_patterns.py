"""What is trained, and how fast, by names: against torch's optimizer over transformers' model, under layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from cordee.checkpoint import formats
from cordee.train import job, techniques
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.train import tiny
from tests.tune import adapters
from tests.tune.test_lora import figures, stored, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FROZEN = {"freeze": ("embedding", "layers.0.*"), "lr_scale": ("head=0.25", "layers.*.attention=2", "*.qkv=2")}
SCALED = {"lm_head": 0.25, "layers.1.self_attn.o_proj": 2.0, **{f"layers.1.self_attn.{x}_proj": 4.0 for x in "qkv"}}


def by_torch(config: TrainConfig) -> list[float]:
    """Losses of six steps, of which three leave the embedding and the first layer as they are."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(config.load, attn_implementation="eager")
    samples = plan_run(replace(config, save=None, save_interval=None), 1).data.open(verified=False)["train"]

    def groups(late: bool) -> list[dict[str, Any]]:
        return [
            {
                "params": [parameter],
                "weight_decay": config.weight_decay if parameter.ndim > 1 else 0.0,
                "lr": config.lr * next((rate for part, rate in SCALED.items() if part in name), 1.0),
            }
            for name, parameter in model.named_parameters()
            if ("embed_tokens" in name or "layers.0." in name) is late
        ]

    def optimizer_of(found: list[dict[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(found, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps)

    optimizers, losses = [optimizer_of(groups(False))], []
    for step in range(6):
        if step == 3:  # no longer frozen, and at the rate that all have
            optimizers.append(optimizer_of(groups(True)))
            for group in (group for each in optimizers for group in each.param_groups):
                group["lr"] = config.lr
        rows = [torch.from_numpy(samples[step * tiny.BATCH + row]["tokens"]) for row in range(tiny.BATCH)]
        tokens = torch.stack(rows)
        loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
        for each in optimizers:
            each.step()
        model.zero_grad()
    return losses


def steps(folder: Path, load: str, **options: Any) -> TrainConfig:
    return adapters.config(
        folder, Path(load), **{"train_iters": 6, "save_interval": 3, "micro_batch_size": 4, **options}
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("alone")
    config = steps(folder, str(adapters.base(folder, "llama")), **FROZEN)
    job.run(replace(config, exit_interval=3))
    return config


def test_frozen_and_scaled_steps_are_those_of_torch(alone: TrainConfig):
    """What is frozen keeps its bits, and has no state; it is trained once a run resumes without the patterns."""
    before, after = formats.read(str(alone.load)), stored(alone)
    same = {name for name, value in after.items() if torch.equal(value, before.tensor(name))}
    assert same == {name for name in after if name.startswith(("embedding", "layers.0."))}
    assert after.keys() == set(before.names())
    plan = plan_run(replace(alone, save=None, save_interval=None), 1)
    total = sum(value.numel() for value in after.values())
    own = total - sum(after[name].numel() for name in same)
    assert f"of which {own:,} are trained" in techniques.describe_parameters(plan.spec.config, alone)
    resumed = tiny.resumed(alone, freeze=(), lr_scale=())
    plan = plan_run(resumed, 1)
    assert [note for note in plan.notes if "those that were frozen begins anew" in note]
    job.run(resumed)
    assert tiny.losses(alone) == pytest.approx(by_torch(alone), rel=1e-5)


@pytest.mark.parametrize("layout", adapters.LAYOUTS.values(), ids=adapters.LAYOUTS)
def test_layouts_change_nothing(pool, alone: TrainConfig, tmp_path: Path, layout: dict[str, Any]):
    config = steps(tmp_path, str(alone.load), **FROZEN, train_iters=3, **layout)
    pool.run(train, 2, config)
    for figure, values in figures(alone).items():
        assert figures(config)[figure][:3] == pytest.approx(values[:3], rel=1e-5), figure
    before = formats.read(str(alone.load))
    kept = {name for name, value in stored(config).items() if torch.equal(value, before.tensor(name))}
    assert kept == {name for name in before.names() if name.startswith(("embedding", "layers.0."))}


def test_a_stage_may_have_nothing_to_train(pool, alone: TrainConfig, tmp_path: Path):
    options = {"train_only": ("layers.0.*",), "train_iters": 2, "clip_grad": 1e-3}
    for name in ("whole", "staged"):
        (tmp_path / name).mkdir()
    whole = steps(tmp_path / "whole", str(alone.load), **options)
    staged = steps(tmp_path / "staged", str(alone.load), **options, pipeline_model_parallel_size=2)
    job.run(whole)
    pool.run(train, 2, staged)
    for figure, values in figures(whole).items():
        assert figures(staged)[figure] == pytest.approx(values, rel=1e-5), figure


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"freeze": ("embeding",)}, ("--freeze", "embeding", "unknown")),
        ({"freeze": ("layers.7.*",)}, ("--freeze", "layers.7.*", "unknown")),
        ({"train_only": ("layers.*.mlp", "heat")}, ("--train-only", "heat", "unknown")),
        ({"lr_scale": ("heat=2",)}, ("--lr-scale", "heat", "unknown")),
        ({"lr_scale": ("head",)}, ("--lr-scale", "head", "form")),
        ({"lr_scale": ("head=nan",)}, ("--lr-scale", "head=nan", "form")),
        ({"lr_scale": ("head=0",)}, ("--lr-scale", "head=0", "form")),
        ({"freeze": ("*",)}, ("--freeze", "*", "empty")),
        ({"train_only": ("head",), "freeze": ("head",)}, ("--freeze", "head", "empty")),
        ({"train_only": ("head",), "lora_target_modules": ("q",)}, ("--train-only", "head", "empty")),
    ],
)
def test_patterns_of_nothing(tmp_path: Path, options: dict[str, Any], expected: tuple[str, str, str]):
    config = steps(tmp_path, str(adapters.base(tmp_path, "llama")), save=None, save_interval=None, **options)
    found = check_run(config)
    assert [(each.option, each.value, each.kind) for each in found] == [expected]
    assert "embedding" in str(found[0].limit) or expected[1] != "embeding"
