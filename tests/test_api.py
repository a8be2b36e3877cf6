"""`import cordee`: the forms in which a program asks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import cordee
from cordee.config.load import config_from_dict
from cordee.data.indexed import IndexedDatasetBuilder
from cordee.errors import ProblemError
from cordee.train.options import TrainConfig
from tests.generate.conftest import gpt2, llama  # noqa: F401 (fixtures)
from tests.generate.folders import model_directory

IDS = torch.randint(0, 300, (2, 14), generator=torch.Generator().manual_seed(0))


def test_names_are_found_and_errors_can_be_caught_by_name():
    assert dir(cordee) == sorted(cordee.__all__)
    assert all(getattr(cordee, name) is not None for name in cordee.__all__)
    with pytest.raises(cordee.ProblemError):
        cordee.GPTModel.from_pretrained("no such directory")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_logits_equal_transformers(name, request):
    folder = request.getfixturevalue(name)
    model, peer = cordee.GPTModel.from_pretrained(folder.directory), folder.peer()
    assert isinstance(model, torch.nn.Module) and not model.training
    torch.testing.assert_close(model(IDS), peer(IDS).logits, rtol=1e-4, atol=1e-4)
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = peer(IDS, attention_mask=mask, position_ids=positions).logits
    for found in (model(IDS, mask), model(IDS, attention_mask=mask, position_ids=positions)):
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


def test_generation_answers_as_it_is_asked(llama):  # noqa: F811
    model = cordee.GPTModel.from_pretrained(str(llama.directory))
    text = model.generate("Once upon", max_new_tokens=5)
    texts = model.generate(["Once upon", "She"], max_new_tokens=5)
    assert isinstance(text, str) and isinstance(texts, list) and texts[0] == text
    assert model.generate(("Once upon", "She"), 5) == texts
    ids = model.tokenizer.encode("Once upon")
    tokens = model.generate(ids, max_new_tokens=5)
    assert all(isinstance(token, int) for token in tokens) and 0 < len(tokens) <= 5
    assert model.tokenizer.decode([*ids, *tokens], skip_special_tokens=True) == "Once upon" + text
    assert model.generate([ids, ids], 5) == [tokens, tokens]
    assert model.generate(torch.tensor(ids), 5) == tokens
    assert model.generate(torch.tensor([ids, ids]), 5) == [tokens, tokens]
    assert model.generate([], 5) == []


def test_options_of_generation(llama):  # noqa: F811
    model = cordee.GPTModel.from_pretrained(llama.directory)
    draw = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 3}
    assert model.generate("Once", 8, **draw) == model.generate("Once", 8, use_kv_cache=False, **draw)
    with pytest.raises(ProblemError) as caught:
        model.generate("Once", temprature=0.5, max_new_tokens=0)
    found = [(problem.option, problem.kind) for problem in caught.value.problems]
    assert found == [("max_new_tokens", "range"), ("temprature", "unknown")]
    with pytest.raises(ProblemError) as caught:
        model.generate("Once", temperature=0.5)
    assert [(p.option, p.kind, p.limit) for p in caught.value.problems] == [
        ("--temperature", "requires", "--do-sample")
    ]


def test_a_model_without_tokenizer_still_takes_ids(llama, tmp_path):  # noqa: F811
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(llama.directory / name)
    model = cordee.GPTModel.from_pretrained(tmp_path)
    assert model.generate([5, 6], 4) and model.generate([5, 6], 4) == model.generate([[5, 6]], 4)[0]
    with pytest.raises(ProblemError, match="no tokenizer"):
        model.generate("Once")
    model.tokenizer = cordee.GPTModel.from_pretrained(llama.directory).tokenizer
    assert isinstance(model.generate("Once", 3), str)


def test_a_tokenizer_may_have_more_tokens_than_the_model(tmp_path, caplog):
    folder = model_directory("Llama", tmp_path / "small", vocab_size=290)
    model = cordee.GPTModel.from_pretrained(folder.directory)
    assert isinstance(model.generate("Xyz", 3), str) and "290 to 299" in caplog.text
    with pytest.raises(ProblemError) as caught:
        model.generate([[5], [5, 290]], 3)
    assert [(problem.option, problem.kind, problem.limit) for problem in caught.value.problems] == [
        ("prompt 2", "range", 290)
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_is_saved_is_a_hugging_face_model(name, request, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = cordee.GPTModel.from_pretrained(request.getfixturevalue(name).directory)
    with torch.no_grad():
        model.final_norm.weight.mul_(2.0)
    model.save_pretrained(tmp_path / "saved")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(peer(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").decode(model.tokenizer.encode("red")).endswith("red")
    again = cordee.GPTModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS), model(IDS))
    assert again.spec.config == model.spec.config
    with pytest.raises(ProblemError, match="not empty"):
        model.save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "saved", overwrite=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", None])
def test_the_type_can_be_chosen(llama, dtype, tmp_path):  # noqa: F811
    model = cordee.GPTModel.from_pretrained(llama.directory, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype or "float32")}
    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert (config.get("dtype") or config.get("torch_dtype")) == (dtype or "float32")


def test_a_directory_without_a_model_is_a_problem(tmp_path):
    with pytest.raises(ProblemError, match="model directory"):
        cordee.GPTModel.from_pretrained(tmp_path)
    with pytest.raises(ProblemError, match="no such directory"):
        cordee.GPTModel.from_pretrained(tmp_path / "nothing")


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """Options of a tiny run over tokens that count up, for which a model needs few steps."""
    with IndexedDatasetBuilder(tmp_path / "data", np.uint16) as builder:
        for start in range(60):
            builder.add_sequence((np.arange(40) + start) % 20)
            builder.end_document()
    return {
        "num_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "add_bias_linear": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": 21,
        "make_vocab_size_divisible_by": 1,
        "data_path": [tmp_path / "data"],
        "split": "100,0,0",
        "seq_length": 16,
        "micro_batch_size": 8,
        "train_iters": 60,
        "lr": 0.02,
        "eval_iters": 0,
        "save": tmp_path / "run",
        "save_interval": 60,
    }


def test_what_is_trained_can_be_talked_to(run, tmp_path):
    assert cordee.train({**run, "nproc_per_node": 1}) == 0
    model = cordee.GPTModel.from_pretrained(tmp_path / "run")
    assert model.generate([3, 4, 5], max_new_tokens=6) == [6, 7, 8, 9, 10, 11]
    model.save_pretrained(tmp_path / "exported")
    again = cordee.GPTModel.from_pretrained(tmp_path / "exported")
    assert again.generate([[17, 18], [3]], max_new_tokens=3) == [[19, 0, 1], [4, 5, 6]]


def test_a_typed_configuration_trains_as_well(run):
    config = config_from_dict(TrainConfig, {**run, "train_iters": 1, "nproc_per_node": 1})
    assert cordee.train(config) == 0


@pytest.mark.slow
def test_training_on_two_processes(run, tmp_path):
    assert cordee.train({**run, "nproc_per_node": 2}) == 0
    model = cordee.GPTModel.from_pretrained(tmp_path / "run")
    assert model.generate([3, 4, 5], max_new_tokens=6) == [6, 7, 8, 9, 10, 11]


def test_every_problem_of_a_run_is_reported(run):
    with pytest.raises(ProblemError) as caught:
        cordee.train({**run, "nproc_per_node": 1, "lr": -1, "seq_lenght": 3})
    assert len(caught.value.problems) == 2
    with pytest.raises(ProblemError, match="--seq-length"):
        cordee.train({**run, "nproc_per_node": 1, "seq_length": 64})
