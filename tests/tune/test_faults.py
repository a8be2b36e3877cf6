"""What is wrong with adapters that are loaded, or with their base, is found and said."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cordee.checkpoint import directory, formats
from cordee.errors import ProblemError
from cordee.train import job
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from tests.problems import facts
from tests.train import tiny
from tests.tune import adapters

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

LORA = {"lora_target_modules": ("q", "down"), "lora_r": 4}


@pytest.fixture
def trained(tmp_path: Path) -> TrainConfig:
    load = adapters.base(tmp_path, "llama")
    config = adapters.config(tmp_path, load, train_iters=4, save_interval=2, **LORA)
    job.run(config)
    return config


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_damaged_checkpoint_is_passed_over(trained: TrainConfig, file: str):
    newest = Path(str(trained.save)) / "iter_0000004" / file
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    whole = tiny.losses(trained)
    job.run(tiny.resumed(trained, lora_target_modules=None, lora_r=None))
    assert tiny.losses(trained) == pytest.approx(whole, rel=1e-6)
    assert directory.damage(formats.location_of(newest.parent), contents=[file]) is None  # written anew


def test_rslora_over_what_is_loaded(trained: TrainConfig):
    resumed = replace(trained, load=trained.save, save=None, save_interval=None, use_rslora=True)
    assert [(each.option, each.kind) for each in check_run(resumed)] == [("--use-rslora", "stated")]
    assert check_run(replace(resumed, use_rslora=False)) == []


def test_numbers_that_are_none_are_not_merged(trained: TrainConfig, tmp_path: Path):
    out = adapters.convert(trained.save, tmp_path / "out", "--save-model-type", "peft")
    tensors = adapters.factors(out)
    (name,) = (name for name in tensors if "layers.1" in name and "q_proj.lora_B" in name)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, out / "adapter_model.safetensors")
    with pytest.raises(ProblemError) as caught:
        adapters.convert(trained.load, tmp_path / "merged", "--lora-load", out)
    assert facts(caught) == [("layers.1.attention.qkv.weight", None, "finite")]
    assert not (tmp_path / "merged").exists()


def test_a_rank_above_the_sizes_of_matrices_is_noted(trained: TrainConfig):
    alone = replace(trained, save=None, save_interval=None)
    assert not [note for note in plan_run(alone, 1).notes if "--lora-r" in note]
    (note,) = (note for note in plan_run(replace(alone, lora_r=33), 1).notes if "--lora-r" in note)
    assert "4 matrices" in note


def test_a_base_that_has_moved(trained: TrainConfig, tmp_path: Path):
    shutil.move(str(trained.load), tmp_path / "elsewhere")
    with pytest.raises(ProblemError) as caught:
        formats.read(str(trained.save))
    assert facts(caught) == [("base", str(trained.load), "base")]
    assert f"{trained.save} as --lora-load" in str(caught.value)
    resumed = replace(trained, load=trained.save, save=None, save_interval=None)
    assert [(each.option, each.kind) for each in check_run(resumed)] == [("--load", "base")]
    elsewhere = replace(resumed, load=str(tmp_path / "elsewhere"), lora_load=(str(trained.save),))
    assert check_run(elsewhere) == []
