"""DoRA under layouts, merged, and what has none; `test_lora.py` compares its steps and files with PEFT's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cordee.checkpoint import adapter, formats
from cordee.checkpoint.source import read as read_checkpoint
from cordee.errors import ProblemError
from cordee.generate.loading import load_model
from cordee.generate.options import GenerateConfig
from cordee.model.gpt import GPTModel
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run
from cordee.weights.load import load_into
from tests.problems import facts
from tests.tune import adapters
from tests.tune.test_lora import figures, logits, of_model, stored, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

DORA = {"lora_target_modules": ("q", "v", "out", "gate_up", "down"), "lora_r": 4, "use_dora": True}


def run(folder: Path, load: object, **options: Any) -> TrainConfig:
    given = {"micro_batch_size": 1, "train_iters": 4, "save_interval": 2, **DORA}
    return adapters.config(folder, Path(str(load)), **{**given, **options})


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("alone")
    config = run(folder, adapters.base(folder, "llama"))
    train(0, 1, config)
    return config


@pytest.mark.parametrize("layout", adapters.LAYOUTS.values(), ids=adapters.LAYOUTS)
def test_one_loss_under_every_layout(pool, alone: TrainConfig, tmp_path: Path, layout: dict[str, Any]):
    """Rows that are sharded have one length; half of the steps on one rank, from the checkpoint of the layout."""
    config = run(tmp_path, alone.load, **layout)
    pool.run(train, 2, replace(config, exit_interval=2))
    train(0, 1, run(tmp_path, config.save, lora_target_modules=None))
    for figure, values in figures(alone).items():
        assert figures(config)[figure] == pytest.approx(values, rel=1e-5), figure
    for key, value in stored(config).items():
        torch.testing.assert_close(value, stored(alone)[key], rtol=1e-4, atol=2e-4, msg=key)


def test_the_merged_model_is_the_one_that_was_trained(alone: TrainConfig, tmp_path: Path):
    """By slices too, of the checkpoint and of PEFT's files."""
    source = read_checkpoint(str(alone.save))
    model = GPTModel(source.spec.config)
    load_into(model, formats.read(str(alone.load)), origins={"base"})
    load_into(model, source, origins={"adapter"})
    torch.testing.assert_close(of_model(alone), logits(model.eval()), rtol=1e-5, atol=1e-5)
    out = adapters.convert(alone.save, tmp_path / "out", "--save-model-type", "peft")
    merged = formats.read(str(alone.save))
    beside = adapter.read(str(alone.load), GenerateConfig(load=str(alone.load)), str(out))
    torch.testing.assert_close(logits(load_model(beside)), of_model(alone), rtol=1e-5, atol=1e-5)
    for name in ("layers.0.attention.qkv.weight", "layers.1.mlp.down.weight"):
        whole = merged.tensor(name)
        part = tuple(slice(size // 3, size) for size in whole.shape)
        for each in (merged, beside):
            torch.testing.assert_close(each.tensor(name, part), whole[part], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mixtral", {"lora_target_modules": ("experts.down",)}, ("low_rank: dora", True, "invalid")),
        ("llama", {"lora_target_modules": ("head",)}, ("low_rank: dora", True, "invalid")),
        ("llama", {"lora_dropout": 0.1}, ("low_rank: dropout", 0.1, "invalid")),
        ("llama", {"lora_target_modules": None}, ("--use-dora", True, "requires")),
    ],
)
def test_what_has_no_dora(tmp_path: Path, name: str, options: dict[str, Any], expected: tuple[str, object, str]):
    config = run(tmp_path, adapters.base(tmp_path, name), **{"save": None, "save_interval": None, **options})
    assert expected in [(each.option, each.value, each.kind) for each in check_run(config)]


def test_peft_has_no_dora_of_some_rows(tmp_path: Path):
    """Of the q of a fused module, and of one module among others without."""
    config = run(tmp_path, adapters.base(tmp_path, "gpt2"), lora_target_modules=("q",), train_iters=1)
    train(0, 1, config)
    with pytest.raises(ProblemError) as caught:
        adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    assert facts(caught) == [("--save-model-type", "peft", "unsupported")]
