"""Prefix tuning against the PEFT library: logits, steps, files both ways; alone and beside LoRA, under layouts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cordee import api
from cordee.checkpoint import adapter, formats
from cordee.checkpoint.source import read as read_checkpoint
from cordee.errors import ProblemError
from cordee.generate.decoder import CachedDecoder, PlainDecoder
from cordee.generate.loading import load_model
from cordee.generate.options import GenerateConfig
from cordee.model.gpt import GPTModel
from cordee.train import job
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run
from cordee.weights.load import load_into
from tests.problems import facts
from tests.train import tiny
from tests.tune import adapters
from tests.tune.test_lora import figures, logits, of_model, stored, train, trained_by_peft

peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

TOKENS = 5
LORA = {"lora_target_modules": ("q", "down"), "lora_r": 2}


@pytest.mark.parametrize("name", ["llama", "gpt2", "glm"])  # query groups; learned positions; rotary pairs
def test_five_steps_are_those_of_peft(tmp_path: Path, name: str):
    """From PEFT's files, through training, into files that PEFT reads; real tokens have positions behind the prefix."""
    load = adapters.base(tmp_path, name)
    torch.manual_seed(1)
    theirs = adapters.peft_model(load, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    theirs.save_pretrained(tmp_path / "start")
    begun = adapter.read(str(load), GenerateConfig(load=str(load)), str(tmp_path / "start"))
    torch.testing.assert_close(logits(load_model(begun)), logits(theirs), rtol=1e-5, atol=1e-5)

    config = adapters.config(tmp_path, load, lora_load=(str(tmp_path / "start"),), train_iters=5)
    job.run(config)
    losses, norms = trained_by_peft(theirs, config)
    assert figures(config) == {"loss": pytest.approx(losses, rel=1e-5), "grad_norm": pytest.approx(norms, rel=1e-4)}
    assert len(set(losses)) == 5
    out = adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    again = adapters.peft_model(load, adapter=out).eval()
    torch.testing.assert_close(logits(again), logits(theirs.eval()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_model(config), logits(again), rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    ((key, value),), expected = adapters.factors(out).items(), adapters.factors(tmp_path / "theirs")
    torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)


# ---- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "zero3": {"zero_stage": 3},
}


def both(folder: Path, load: str, **options: Any) -> TrainConfig:
    """A prefix and LoRA, four steps."""
    given = {"micro_batch_size": 1, "train_iters": 4, "save_interval": 2, "num_prefix_tokens": TOKENS, **LORA}
    return adapters.config(folder, Path(load), **{**given, **options})


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> TrainConfig:
    """Such a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    config = both(folder, str(adapters.base(folder, "llama")))
    train(0, 1, config)
    return config


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_loss_under_every_layout(pool, alone: TrainConfig, tmp_path: Path, layout: str):
    """Half of the steps on one rank, from the checkpoint of the layout."""
    config = both(tmp_path, str(alone.load), **LAYOUTS[layout])
    pool.run(train, 2, replace(config, exit_interval=2))
    train(0, 1, both(tmp_path, str(config.save), num_prefix_tokens=None, lora_target_modules=None, lora_r=None))
    for figure, values in figures(alone).items():
        assert figures(config)[figure] == pytest.approx(values, rel=1e-5), figure
    found, expected = stored(config), stored(alone)
    assert found.keys() == expected.keys() and {"prefix", "a", "b"} == {key.rpartition(".")[2] for key in found}
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=2e-4, msg=key)


def test_the_model_that_generates_is_the_one_that_was_trained(alone: TrainConfig):
    """LoRA is merged, the prefix stays; a cache changes nothing."""
    source = read_checkpoint(str(alone.save))
    model = GPTModel(source.spec.config)
    load_into(model, formats.read(str(alone.load)), origins={"base"})
    load_into(model, source, origins={"adapter"})
    generating = load_model(formats.read(str(alone.save)))
    torch.testing.assert_close(logits(generating), logits(model.eval()), rtol=1e-5, atol=1e-5)
    beside = adapter.read(str(alone.load), GenerateConfig(load=str(alone.load)), str(alone.save))
    assert torch.equal(logits(load_model(beside)), logits(generating))
    assert not torch.allclose(logits(generating), logits(load_model(formats.read(str(alone.load)))), atol=1e-3)
    for decoder in (CachedDecoder(generating, 12), PlainDecoder(generating)):
        with torch.no_grad():
            grown = [decoder.begin([[1, 2, 3], [4, 5, 6, 7]]), *(decoder.extend(torch.tensor([t, t])) for t in (8, 9))]
        whole = generating(torch.tensor([[4, 5, 6, 7, 8, 9]]))[0, 3:]
        torch.testing.assert_close(torch.stack([row[1] for row in grown]), whole, rtol=1e-5, atol=1e-5)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_no_other_format_has_a_prefix(alone: TrainConfig, tmp_path: Path):
    """Weights alone would be another model; PEFT has no file of a prefix with LoRA beside it, nor of ALiBi's."""
    for flag, found in {"hf": ("num_prefix_tokens", TOKENS), "peft": ("--save-model-type", "peft")}.items():
        with pytest.raises(ProblemError) as caught:
            adapters.convert(alone.save, tmp_path / "out", "--save-model-type", flag)
        assert facts(caught) == [(*found, "unsupported")]
    with pytest.raises(ProblemError) as caught:
        api.GPTModel.from_pretrained(str(alone.save)).save_pretrained(tmp_path / "out")
    assert facts(caught) == [("num_prefix_tokens", TOKENS, "unsupported")]
    config = adapters.config(tmp_path, Path(str(alone.load)), num_prefix_tokens=2, train_iters=1)
    job.run(config)
    out = adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    with pytest.raises(ProblemError) as caught:  # over one that the model has
        adapter.read(str(alone.save), GenerateConfig(load=str(alone.save), lora_r=2), str(out))
    assert {problem.kind for problem in caught.value.problems} == {"requires"} and len(caught.value.problems) == 2
    shutil.rmtree(out)
    shutil.rmtree(str(config.save))
    config = adapters.config(tmp_path, adapters.base(tmp_path, "bloom"), num_prefix_tokens=2, train_iters=1)
    job.run(config)
    with pytest.raises(ProblemError) as caught:
        adapters.convert(config.save, tmp_path / "out", "--save-model-type", "peft")
    assert facts(caught) == [("--save-model-type", "peft", "unsupported")]


def test_what_is_loaded_keeps_its_form(alone: TrainConfig, tmp_path: Path):
    found = {
        name: (problem.subject, problem.kind)
        for name, options in {"as stored": {"num_prefix_tokens": TOKENS}, "another": {"num_prefix_tokens": 3}}.items()
        for problem in check_run(replace(alone, load=alone.save, save=None, save_interval=None, **options))
    }
    assert found == {"another": ("num_prefix_tokens", "stated")}
    only = adapters.config(tmp_path, Path(str(alone.load)), num_prefix_tokens=2, train_iters=1)
    job.run(only)
    found = check_run(replace(only, load=only.save, num_prefix_tokens=None, save=None, save_interval=None, **LORA))
    assert [(each.subject, each.kind) for each in found] == [("lora_r", "stated"), ("lora_target_modules", "stated")]
    long = replace(only, num_prefix_tokens=32 - tiny.LENGTH + 1, save=None, save_interval=None)
    assert [(each.option, each.kind) for each in check_run(long)] == [("--seq-length", "at most")]
    of_ranks = replace(only, context_parallel_size=2, nproc_per_node=2, save=None, save_interval=None)
    assert "num_prefix_tokens" in {name for each in check_run(of_ranks) for name in each.names}
