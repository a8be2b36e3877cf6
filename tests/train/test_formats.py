"""Training that starts from a model in any format is the training that starts from Hugging Face's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from cordee.convert import job as convert_job
from cordee.convert.options import ConvertConfig
from cordee.errors import Problem
from cordee.families.registry import spec_from_options
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.tokenizer import load_tokenizer
from cordee.tokenizer.options import TokenizerOptions
from cordee.train import job
from cordee.train.plan import check_run
from cordee.weights import hf
from cordee.weights.load import save_from
from tests.generate.folders import write_tokenizer
from tests.train import tiny

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FORMATS = {
    "gguf": {"save_model_type": "gguf"},
    "megatron": {"save_model_type": "mg", "use_mcore_models": True, "target_tensor_parallel_size": 2},
    "dcp": {"save_model_type": "dcp"},
}


@pytest.fixture
def given(tmp_path: Path):
    """Three steps from a model of Hugging Face's form, `hf`."""
    config = tiny.config(tmp_path, train_iters=3, save_interval=3, max_position_embeddings=64, vocab_size=320)
    spec = spec_from_options(config)
    model = GPTModel(spec.config)
    initialise(model, 99)
    with hf.write(tmp_path / "hf", spec) as sink:
        save_from(model, sink)
    write_tokenizer(tmp_path / "hf")
    return replace(config, load=str(tmp_path / "hf"))


def losses_from(given, path: Path, ranks: int = 1, pool=None) -> list[float]:
    config = replace(given, load=str(path), save=f"{given.save}-{path.name}-{ranks}", nproc_per_node=ranks)
    if ranks == 1:
        assert job.run(config) == 0
    else:
        pool.run(tiny.train_rank, ranks, config)
    return tiny.losses(config)


@pytest.mark.parametrize("form", FORMATS)
def test_losses_are_those_of_hugging_face(given, tmp_path, form):
    options = ConvertConfig(load_dir=given.load, save_dir=str(tmp_path / form), **FORMATS[form])
    assert convert_job.run(options) == 0
    expected = losses_from(given, tmp_path / "hf")
    assert len(expected) == 3
    assert losses_from(given, tmp_path / form) == expected
    if form == "gguf":
        assert losses_from(given, tmp_path / form / "model.gguf") == expected


def test_the_tokenizer_of_a_gguf_file_goes_along(given, tmp_path):
    options = ConvertConfig(load_dir=given.load, save_dir=str(tmp_path / "out"), save_model_type="gguf")
    assert convert_job.run(options) == 0
    losses_from(given, tmp_path / "out" / "model.gguf")
    first, second = (load_tokenizer(TokenizerOptions(), at) for at in (given.load, f"{given.save}-model.gguf-1"))
    for text in ("Once upon a time", "She loved 12 cafés"):
        assert second.encode(text) == first.encode(text)


def test_each_rank_reads_its_part_of_a_gguf_file(given, tmp_path, pool):
    options = ConvertConfig(load_dir=given.load, save_dir=str(tmp_path / "out"), save_model_type="gguf")
    assert convert_job.run(options) == 0
    expected = losses_from(given, tmp_path / "hf")
    found = losses_from(given, tmp_path / "out" / "model.gguf", 2, pool)
    assert found == pytest.approx(expected, rel=1e-5)


def turned(weight: Tensor, heads: int) -> Tensor:
    """Rows of a head as llama.cpp has them: the two halves that rotate together next to each other."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def test_a_file_of_the_gguf_library(given, tmp_path):
    """Written by hand, by the names of llama.cpp."""
    source = hf.read(given.load)
    tensors = {name: file.read(name, ()) for name, file in source.files.items()}
    writer = gguf.GGUFWriter(tmp_path / "by-hand.gguf", "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(source.spec.config.final_norm.eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(8)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for n in range(2):
        for ours, theirs in {
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
            "input_layernorm": "attn_norm",
            "post_attention_layernorm": "ffn_norm",
        }.items():
            names[f"model.layers.{n}.{ours}"] = f"blk.{n}.{theirs}"
    for name, tensor in tensors.items():
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        data = turned(tensor, heads) if heads else tensor
        writer.add_tensor(f"{names[name.removesuffix('.weight')]}.weight", data.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert losses_from(given, tmp_path / "by-hand.gguf") == losses_from(given, tmp_path / "hf")


def problems_of(given, path: Path) -> list[Problem]:
    return check_run(replace(given, load=str(path)))


def test_files_that_are_none(given, tmp_path):
    options = ConvertConfig(load_dir=given.load, save_dir=str(tmp_path / "out"), save_model_type="gguf")
    assert convert_job.run(options) == 0
    whole = (tmp_path / "out" / "model.gguf").read_bytes()
    for length in (0, 20, len(whole) // 2):
        (tmp_path / "cut.gguf").write_bytes(whole[:length])
        assert any("cut.gguf" in problem.option for problem in problems_of(given, tmp_path / "cut.gguf"))
    (tmp_path / "text.gguf").write_text("no model at all")
    assert any("text.gguf" in problem.option for problem in problems_of(given, tmp_path / "text.gguf"))
    (tmp_path / "notes.txt").write_text("no model either")
    for name, kind in (("absent.gguf", "missing"), ("notes.txt", "format")):
        found = problems_of(given, tmp_path / name)
        assert ("--load", str(tmp_path / name), kind) in [(each.option, each.value, each.kind) for each in found]


def test_what_only_conversion_can_read_is_to_be_converted(given, tmp_path):
    options = ConvertConfig(load_dir=given.load, save_dir=str(tmp_path / "mg"), **FORMATS["megatron"])
    assert convert_job.run(options) == 0
    for file in (tmp_path / "mg").rglob("*.pt"):
        content = torch.load(file, weights_only=False)  # the test has written it
        content["model"]["extra"] = torch.ones(1)
        torch.save(content, file)
    found = problems_of(given, tmp_path / "mg")
    assert any(problem.kind == "unclear" and "cordee convert" in problem.fix for problem in found)


def test_an_iteration_is_chosen_where_there_are_some(given, tmp_path):
    options = ConvertConfig(load_dir=given.load, save_dir=str(tmp_path / "mg"), **FORMATS["megatron"])
    assert convert_job.run(options) == 0
    megatron = replace(given, load=str(tmp_path / "mg"))
    assert check_run(replace(megatron, ckpt_step=1)) == []
    for config, kind in ((replace(megatron, ckpt_step=2), "missing"), (replace(given, ckpt_step=1), "requires")):
        found = [(problem.option, problem.value, problem.kind) for problem in check_run(config)]
        assert found == [("--ckpt-step", config.ckpt_step, kind)]


def test_other_problems_are_found_beside_broken_weights(given, tmp_path):
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"not a header")
    found = check_run(replace(given, seq_length=128, load=str(tmp_path / "hf")))
    assert [(problem.subject, problem.limit) for problem in found if problem.subject == "seq_length"] == [
        ("seq_length", 64)
    ]
    assert any(problem.option.endswith("model.safetensors") for problem in found)


def test_another_shape_is_refused(given, tmp_path):
    options = ConvertConfig(load_dir=given.load, save_dir=str(tmp_path / "out"), save_model_type="gguf")
    assert convert_job.run(options) == 0
    (problem,) = check_run(replace(given, load=str(tmp_path / "out"), num_layers=3))
    assert (problem.option, problem.kind) == ("--load", "model")
