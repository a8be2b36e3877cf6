"""Converted weights in megatron-core, and megatron-core's weights converted."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from cordee.checkpoint import formats
from cordee.families.registry import spec_from_hf
from cordee.model.gpt import GPTModel
from cordee.weights.load import load_into
from tests.convert import megatron_oracle
from tests.convert.test_megatron import CORE, TP, convert
from tests.weights import models, tiny

pytest.importorskip("megatron.core", reason="needs megatron-core, of the extra `test`")

EXACT = {"rms_norm_eps": 1e-6}  # in latent attention megatron-core has one epsilon for all norms
KINDS = {
    "llama": models.MODELS["llama tied"] | {"tie_word_embeddings": False},
    "llama tied": models.MODELS["llama tied"],
    "qwen2": models.MODELS["qwen2"],
    "qwen3": models.MODELS["qwen3"],
    "gpt2": models.MODELS["gpt2"] | {"tie_word_embeddings": True},
    "mixtral": models.MODELS["mixtral"],
    "deepseek_v2 lite": models.MODELS["deepseek_v2 lite"] | EXACT,
    "deepseek_v2": models.MODELS["deepseek_v2"] | EXACT,
}
IDS = torch.arange(24).view(2, 12) * 5 % 61


def our_logits(path: Path) -> torch.Tensor:
    source = formats.read(path)
    model = GPTModel(source.spec.config, device="meta").eval()
    load_into(model, source)
    with torch.no_grad():
        return model(IDS)


@pytest.fixture
def hf(request, tmp_path) -> Path:
    config = KINDS[request.param]
    tensors = tiny.tensors_of(spec_from_hf(config))
    scaled = {
        name: 1 + tensor * 0.1 if tensor.ndim == 1 and "norm" in name else tensor * 0.2
        for name, tensor in tensors.items()
    }
    tiny.save(tmp_path / "hf", config, scaled)
    return tmp_path / "hf"


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("hf", KINDS, indirect=True)
def test_megatron_takes_our_weights(hf, tmp_path, pool, tensor):
    convert(hf, tmp_path / "mg", *CORE, TP, str(tensor))
    expected = our_logits(hf)
    for found in pool.run(megatron_oracle.loaded_logits, tensor, tmp_path / "mg", IDS):
        found = found[..., : expected.shape[-1]]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("hf", KINDS, indirect=True)
def test_we_take_megatrons_weights(hf, tmp_path, pool, tensor, request):
    """transformers computes with them what megatron-core does; of those it can tell, Megatron's settings alone tell
    which model it is.
    """
    import transformers

    convert(hf, tmp_path / "mg", *CORE, TP, str(tensor))
    with torch.serialization.safe_globals([argparse.Namespace]):
        file = tmp_path / "mg" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
        args = torch.load(file, weights_only=True)["args"]
    expected = pool.run(megatron_oracle.save, tensor, tmp_path / "own", args, IDS)[0]
    told = request.node.callspec.params["hf"] in ("llama", "qwen2", "gpt2")
    convert(tmp_path / "own", tmp_path / "back", *(() if told else ("--model", str(hf))))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32)
    with torch.no_grad():
        found = model(IDS).logits
    expected = expected[..., : found.shape[-1]]  # without filling rows, where it is known that there are some
    assert found.std() > 0.1  # else everything would agree
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
