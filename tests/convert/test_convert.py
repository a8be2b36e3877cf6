"""`cordee convert` between formats."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from cordee.checkpoint import formats
from cordee.checkpoint.storage import location_of
from cordee.checkpoint.store import CheckpointStore
from cordee.convert import job
from cordee.convert.options import ConvertConfig
from cordee.errors import Problem, ProblemError
from cordee.model.gpt import GPTModel
from cordee.weights.load import load_into
from tests.weights import tiny


def test_another_type(tmp_path, caplog):
    tensors = tiny.save(tmp_path / "a", tiny.LLAMA)
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    options = ConvertConfig(load_dir=str(tmp_path / "a"), save_dir=str(tmp_path / "b"), params_dtype="bfloat16")
    with caplog.at_level("INFO", "cordee"):
        assert job.run(options) == 0
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name].bfloat16()) for name, tensor in written.items())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    assert str(tmp_path / "b") in caplog.text


def test_files_of_torch_become_safetensors(tmp_path, caplog):
    tensors = tiny.save(tmp_path / "a", tiny.GPT2)
    (tmp_path / "a" / "model.safetensors").unlink()
    masks = {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    tiny.shard(tmp_path / "a", {**tensors, **masks}, suffix="bin")
    with caplog.at_level("INFO", "cordee"):
        job.run(ConvertConfig(load_dir=str(tmp_path / "a"), save_dir=str(tmp_path / "b")))
    written = load_file(tmp_path / "b" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in written.items())
    assert "attn.bias" in caplog.text  # what was left out is told


def problem_of(**options) -> Problem:
    with pytest.raises(ProblemError) as caught:
        job.run(ConvertConfig(**options))
    (problem,) = caught.value.problems
    return problem


def test_nothing_is_overwritten_unless_asked(tmp_path):
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    tiny.save(tmp_path / "a", tiny.LLAMA)
    job.run(ConvertConfig(load_dir=a, save_dir=b))
    before = (tmp_path / "b" / "model.safetensors").read_bytes()
    assert problem_of(load_dir=a, save_dir=b, params_dtype="float16").kind == "not empty"
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == before
    job.run(ConvertConfig(load_dir=a, save_dir=b, params_dtype="float16", overwrite=True))
    assert (tmp_path / "b" / "model.safetensors").read_bytes() != before
    problem = problem_of(load_dir=a, save_dir=str(tmp_path / "x" / ".." / "a"), overwrite=True)
    assert (problem.option, problem.kind, problem.involves) == ("--save-dir", "excludes", ("load_dir",))


def test_a_checkpoint_becomes_a_model_with_its_tokenizer(tmp_path, caplog):
    tensors = tiny.save(tmp_path / "origin", tiny.LLAMA)
    source = formats.read(tmp_path / "origin")
    model = GPTModel(source.spec.config, device="meta")
    load_into(model, source)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "tokenizer.json").write_text("a file of the user's that only the checkpoint names")
    config = dict.fromkeys(("tokenizer_name_or_path", "load"), str(tmp_path / "secrets"))
    state = {"model": source.spec.to_dict(), "config": config}
    store = CheckpointStore(location_of(tmp_path / "run"))
    store.save(10, model, None, state)
    store.close()
    assert formats.format_of(tmp_path / "run").name == "cordee"
    job.run(ConvertConfig(load_dir=str(tmp_path / "run"), save_dir=str(tmp_path / "alone")))
    assert not list((tmp_path / "alone").glob("tokenizer*"))
    (tmp_path / "run" / "tokenizer.json").write_text("{}")  # as training puts it there
    with caplog.at_level("INFO", "cordee"):
        job.run(ConvertConfig(load_dir=str(tmp_path / "run"), save_dir=str(tmp_path / "out")))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in written.items())
    assert (tmp_path / "out" / "tokenizer.json").is_file() and "tokenizer.json" in caplog.text


def test_formats_are_told_apart(tmp_path):
    tiny.save(tmp_path / "a", tiny.LLAMA)
    assert formats.format_of(tmp_path / "a").name == "hf"
    assert formats.read(tmp_path / "a").names()[0] == "embedding.weight"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        problem = problem_of(load_dir=str(tmp_path / name), save_dir=str(tmp_path / "b"))
        assert (problem.option, problem.value) == ("model directory", tmp_path / name)
