"""GGUF: round trips, what other programs read in our files, what we read in theirs, and bad input."""

from __future__ import annotations

import json
import os
import sys

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cordee.api import GPTModel
from cordee.checkpoint import formats
from cordee.convert import job
from cordee.convert.options import ConvertConfig
from cordee.errors import Problem, ProblemError
from cordee.families.registry import spec_from_hf
from cordee.weights.gguf.file import GGUFFile
from tests.problems import facts
from tests.weights import tiny

_COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_TANH = "gelu_pytorch_tanh"
_GEMMA = {"head_dim": 16, "hidden_act": _TANH, "hidden_activation": _TANH, "tie_word_embeddings": True}


def _hf(name: str, model_type: str, **more: object) -> dict:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": model_type, **_COMMON, **more}


MODELS = {
    "llama": _hf("Llama", "llama"),
    "llama tied": _hf("Llama", "llama", tie_word_embeddings=True, rope_theta=5e5),
    "llama biases": _hf("Llama", "llama", attention_bias=True, mlp_bias=True),
    "llama wide heads": _hf("Llama", "llama", head_dim=16),
    "llama linear": _hf("Llama", "llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
    "llama 3.1": _hf("Llama", "llama", rope_scaling={**_LLAMA3, "original_max_position_embeddings": 64}),
    "mistral": _hf("Mistral", "mistral", sliding_window=None),
    "mixtral": _hf("Mixtral", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2": _hf("Qwen2", "qwen2", rms_norm_eps=1e-6),
    "qwen2 yarn": _hf(
        "Qwen2", "qwen2", rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
    ),
    "qwen3": _hf("Qwen3", "qwen3", head_dim=128),  # transformers reads no other of this file
    "qwen2moe": _hf("Qwen2Moe", "qwen2_moe", **_SPARSE, shared_expert_intermediate_size=16),
    "qwen3moe": _hf("Qwen3Moe", "qwen3_moe", **_SPARSE, head_dim=16, norm_topk_prob=True),
    "gemma": _hf("Gemma", "gemma", **_GEMMA),
    "gemma2": _hf("Gemma2", "gemma2", **_GEMMA, query_pre_attn_scalar=16, sliding_window=8),
}
TRANSFORMERS_READS = ("llama", "llama tied", "qwen2", "qwen3")


def convert(a, b, **options) -> None:
    assert job.run(ConvertConfig(load_dir=str(a), save_dir=str(b), **options)) == 0


def save(path, hf: dict) -> dict[str, torch.Tensor]:
    """A model whose norms survive that GGUF holds them from zero: a float32 has room for 1 + n / 1024."""
    tensors = {
        name: (tensor * 1024).round() / 1024 if "norm" in name else tensor
        for name, tensor in tiny.tensors_of(spec_from_hf(hf)).items()
    }
    return tiny.save(path, hf, tensors)


def problem_of(read, *arguments) -> Problem:
    with pytest.raises(ProblemError) as caught:
        read(*arguments)
    (problem,) = caught.value.problems
    return problem


# ---- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_every_bit_is_the_same(name, tmp_path):
    tensors = save(tmp_path / "a", MODELS[name])
    convert(tmp_path / "a", tmp_path / "gguf", save_model_type="gguf", verify=True)
    assert [file.name for file in (tmp_path / "gguf").iterdir()] == ["model.gguf"]
    convert(tmp_path / "gguf", tmp_path / "b", verify=True)
    back = load_file(tmp_path / "b" / "model.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in back.items())
    ids = torch.arange(24)[None] * 5 % 61
    with torch.no_grad():
        before, after = (GPTModel.from_pretrained(tmp_path / side)(ids) for side in "ab")
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", TRANSFORMERS_READS)
def test_transformers_computes_the_same_from_our_file(name, tmp_path):
    save(tmp_path / "a", MODELS[name])
    convert(tmp_path / "a", tmp_path / "b", save_model_type="gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "b", gguf_file="model.gguf", dtype=torch.float32).eval()
    ids = torch.arange(24)[None] * 5 % 61
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, GPTModel.from_pretrained(tmp_path / "a")(ids), atol=1e-4, rtol=0)


def test_what_stands_in_the_file(tmp_path):
    """Read by the library, and compared with what is to be there by hand."""
    tensors = save(tmp_path / "a", MODELS["llama"])
    convert(tmp_path / "a", tmp_path / "b", save_model_type="gguf", params_dtype="bfloat16")
    reader = gguf.GGUFReader(tmp_path / "b" / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    assert values["general.architecture"] == "llama" and values["general.file_type"] == 32
    assert values["llama.attention.head_count_kv"] == 2 and values["llama.rope.dimension_count"] == 8
    assert values["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    held = {tensor.name: tensor for tensor in reader.tensors}
    assert held["token_embd.weight"].tensor_type.name == "BF16" and held["token_embd.weight"].shape.tolist() == [32, 61]
    norm = held["blk.1.ffn_norm.weight"]  # vectors stay in float32
    assert norm.tensor_type.name == "F32"
    np.testing.assert_array_equal(norm.data, tensors["model.layers.1.post_attention_layernorm.weight"].numpy())
    rows = torch.from_numpy(gguf.dequantize(held["blk.0.attn_q.weight"].data, held["blk.0.attn_q.weight"].tensor_type))
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # of a head's rows: j and j + half become neighbours
    expected = tensors["model.layers.0.self_attn.q_proj.weight"].bfloat16().float()
    assert torch.equal(rows[:8], expected[:8][order]) and torch.equal(rows[24:], expected[24:][order])


def test_a_type_for_the_weights_and_its_way_back(tmp_path):
    tensors = save(tmp_path / "a", MODELS["mixtral"])
    convert(tmp_path / "a", tmp_path / "b", save_model_type="gguf", params_dtype="float16", verify=True)
    convert(tmp_path / "b" / "model.gguf", tmp_path / "c")
    for name, tensor in load_file(tmp_path / "c" / "model.safetensors").items():
        stays = tensor.ndim == 1 or name.endswith("block_sparse_moe.gate.weight")
        assert tensor.dtype == (torch.float32 if stays else torch.float16)
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


def test_what_is_only_beyond_a_length_shortens_the_context(tmp_path, caplog):
    save(tmp_path / "a", _hf("Mistral", "mistral", sliding_window=12))
    convert(tmp_path / "a", tmp_path / "b", save_model_type="gguf", verify=True)
    assert formats.read(tmp_path / "b").spec.config.max_position_embeddings == 12
    assert "context is 12 tokens" in caplog.text


def test_a_plan_says_the_bytes_and_writes_nothing(tmp_path, capsys):
    save(tmp_path / "a", MODELS["llama"])
    convert(tmp_path / "a", tmp_path / "b", save_model_type="gguf", dry_run=True)
    assert "model.gguf" in capsys.readouterr().out and not (tmp_path / "b").exists()


def test_models_that_cannot_be_expressed(tmp_path):
    tiny.save(tmp_path / "gpt2", tiny.GPT2)
    windows = _hf("Gemma2", "gemma2", **_GEMMA, query_pre_attn_scalar=32)
    save(tmp_path / "gemma2", windows)
    scaling = {**_LLAMA3, "low_freq_factor": 2.0, "original_max_position_embeddings": 64}
    save(tmp_path / "llama", _hf("Llama", "llama", rope_scaling=scaling))
    for name, place in (
        ("gpt2", "position_embedding.weight"),
        ("gemma2", "--query-pre-attn-scalar"),
        ("llama", "layers.attention.rope.scaling.low_freq_factor"),
    ):
        options = ConvertConfig(load_dir=str(tmp_path / name), save_dir=str(tmp_path / "out"), save_model_type="gguf")
        problem = problem_of(job.run, options)
        assert problem.kind == "inexpressible" and place in problem.limit
        assert not (tmp_path / "out").exists()


def test_options_for_what_is_split_have_no_meaning(tmp_path):
    save(tmp_path / "a", MODELS["llama"])
    options = {"load_dir": str(tmp_path / "a"), "save_dir": str(tmp_path / "b"), "save_model_type": "gguf"}
    problem = problem_of(job.run, ConvertConfig(**options, target_tensor_parallel_size=2))
    assert (problem.option, problem.kind) == ("--target-tensor-parallel-size", "requires")


def test_nothing_is_left_of_a_file_that_fails(tmp_path, monkeypatch):
    save(tmp_path / "a", MODELS["llama"])

    def broken(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", broken)
    options = ConvertConfig(load_dir=str(tmp_path / "a"), save_dir=str(tmp_path / "b"), save_model_type="gguf")
    assert problem_of(job.run, options).kind == "unwritable"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_another_model_is_overwritten(tmp_path):
    save(tmp_path / "a", MODELS["llama"])
    convert(tmp_path / "a", tmp_path / "b", save_model_type="gguf")
    options = {"load_dir": str(tmp_path / "a"), "save_dir": str(tmp_path / "b"), "save_model_type": "gguf"}
    assert problem_of(job.run, ConvertConfig(**options)).kind == "not empty"
    convert(tmp_path / "a", tmp_path / "b", save_model_type="gguf", overwrite=True)


# ---- files of others -------------------------------------------------------------------------------------------------


def _written(path, tensors: dict[str, tuple[np.ndarray, gguf.GGMLQuantizationType | None]], **values) -> None:
    writer = gguf.GGUFWriter(path, values.pop("architecture", "llama"))
    for name, value in values.items():
        writer.add_uint32(name, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


PACKED = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K TQ1_0 TQ2_0 IQ4_NL IQ4_XS".split()


@pytest.mark.parametrize("kind", PACKED)
def test_packed_tensors_are_unpacked_by_slices(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("cordee.weights.gguf.file.CHUNK", 1000)  # several pieces, the last one smaller
    kind = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[kind]
    size = 512 // block
    data = np.random.default_rng(0).integers(0, 60, (3, 7, size * nbytes), dtype=np.uint8)
    _written(tmp_path / "a.gguf", {"experts": (data, kind), "vector": (data[0, 0], kind)})
    file = GGUFFile(tmp_path / "a.gguf")
    expected = torch.from_numpy(gguf.dequantize(data, kind))
    assert file.tensors["experts"].shape == (3, 7, 512) and file.tensors["experts"].dtype == torch.float32
    for index in ((slice(0, 3), slice(0, 7), slice(0, 512)), (slice(1, 2), slice(2, 6), slice(5, 77))):
        torch.testing.assert_close(file.read("experts", index), expected[index], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(
        file.read("vector", (slice(3, 40),)), expected[0, 0, 3:40], rtol=0, atol=0, equal_nan=True
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bytes of a whole file, and of one without its last tensor's name."""
    path = tmp_path_factory.mktemp("gguf")
    save(path / "a", MODELS["llama"])
    convert(path / "a", path / "b", save_model_type="gguf")
    return (path / "b" / "model.gguf").read_bytes()


def _problems(tmp_path, content: bytes) -> list[tuple[str, object, str]]:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ProblemError) as caught:
        job.run(ConvertConfig(load_dir=str(tmp_path / "x.gguf"), save_dir=str(tmp_path / "out")))
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]  # nothing is written
    return [(option.rpartition("/")[2], value, kind) for option, value, kind in facts(caught)]


@pytest.mark.parametrize("length", [0, 3, 20, 300, 2000, -40])
def test_files_that_are_cut_off(length, exported, tmp_path):
    assert _problems(tmp_path, exported[:length]) == [("x.gguf", None, "unreadable")]


def test_files_that_are_something_else(exported, tmp_path):
    assert _problems(tmp_path, b"GGML" + exported[4:]) == [("x.gguf", None, "unreadable")]
    assert _problems(tmp_path, exported[:4] + b"\x09" + exported[5:]) == [("x.gguf", None, "unreadable")]
    (tmp_path / "x").write_bytes(b"something else")
    assert problem_of(formats.read, tmp_path / "x").value == tmp_path / "x"


def test_files_of_other_models(exported, tmp_path):
    (other,) = _problems(tmp_path, exported.replace(b"llama", b"llamb"))
    assert other == ("x.gguf: general.architecture", "llamb", "unknown")
    names = _problems(tmp_path, exported.replace(b"blk.1.ffn_down", b"blk.7.ffn_down"))
    assert names == [("x.gguf", None, "missing"), ("x.gguf", None, "unknown")]
    layers, *_ = _problems(tmp_path, exported.replace(b"block_count", b"block_counx"))
    assert layers[0] == "x.gguf: num_hidden_layers"
    _written(tmp_path / "x.gguf", {"token_embd.weight": (np.zeros((4, 4), np.int32), None)})
    problem = problem_of(formats.read, tmp_path / "x.gguf")
    assert problem.option.endswith(": token_embd.weight") and (problem.kind, problem.limit) == ("dtype", "I32")
    _written(tmp_path / "x.gguf", {"a": (np.zeros(4, np.float32), None)}, **{"split.count": 3})
    problem = problem_of(formats.read, tmp_path / "x.gguf")
    assert (problem.kind, problem.limit) == ("part", 3)


def test_factors_that_are_not_llama_3s(tmp_path):
    save(tmp_path / "a", MODELS["llama 3.1"])
    convert(tmp_path / "a", tmp_path / "b", save_model_type="gguf")
    content = (tmp_path / "b" / "model.gguf").read_bytes()
    place = next(t for t in gguf.GGUFReader(tmp_path / "b" / "model.gguf").tensors if t.name == "rope_freqs.weight")
    start = int(place.data_offset) + 4
    other = content[:start] + np.float32(1.5).tobytes() + content[start + 4 :]
    (tmp_path / "b" / "model.gguf").write_bytes(other)
    assert problem_of(formats.read, tmp_path / "b").option.endswith("model.gguf: rope_freqs.weight")


def test_which_file_of_a_directory(exported, tmp_path):
    (tmp_path / "q4.gguf").write_bytes(exported)
    assert formats.format_of(tmp_path).name == formats.format_of(tmp_path / "q4.gguf").name == "gguf"
    (tmp_path / "f16.gguf").write_bytes(exported)
    problem = problem_of(formats.read, tmp_path)
    assert (problem.kind, problem.limit) == ("several", [tmp_path / "f16.gguf", tmp_path / "q4.gguf"])
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llama"]))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert formats.format_of(tmp_path).name == "hf"


def test_without_the_library(exported, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(exported)
    monkeypatch.setitem(sys.modules, "gguf", None)
    problem = problem_of(formats.read, tmp_path)
    assert (problem.option, problem.kind) == ("gguf", "requires")


@pytest.mark.parametrize("given", [3, [3], [3, 5], [3, 5, 7]])
def test_every_token_that_ends_a_text(tmp_path, given):
    """llama.cpp stops at eos, and at what it calls the ends of a turn (eot) and of a message (eom)."""
    save(tmp_path / "hf", {**MODELS["llama"], "eos_token_id": given})
    words = {f"<{i}>": i for i in range(61)}
    backend = Tokenizer(models.BPE(words, [], byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<3>").save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "gguf", save_model_type="gguf")
    fields = gguf.GGUFReader(tmp_path / "gguf" / "model.gguf").fields
    ends = [
        fields[f"tokenizer.ggml.{role}_token_id"]
        for role in ("eos", "eot", "eom")
        if f"tokenizer.ggml.{role}_token_id" in fields
    ]
    assert [field.contents() for field in ends] == (given if isinstance(given, list) else [given])
    convert(tmp_path / "gguf", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == (3 if given == [3] else given)


def test_more_ends_than_a_file_has_places_for(tmp_path, caplog):
    save(tmp_path / "hf", {**MODELS["llama"], "eos_token_id": [3, 5, 7, 9]})
    convert(tmp_path / "hf", tmp_path / "gguf", save_model_type="gguf")
    assert "left out: [7, 9]" in caplog.text
