"""Checkpoints of strangers, whose settings and names claim what cannot be."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from cordee.errors import Problem, ProblemError
from cordee.weights import mindformers
from cordee.weights.megatron import source
from cordee.weights.megatron.layout import is_megatron
from tests.convert.test_megatron import CORE, convert
from tests.weights import tiny

EMBEDDING = {"embedding.word_embeddings.weight": torch.ones(8, 4)}


def found(root: Path) -> list[Problem]:
    with pytest.raises(ProblemError) as caught:
        source.read(root)
    return caught.value.problems


def problems(root: Path) -> str:
    """In words: what is shown of values without end."""
    return "\n".join(map(str, found(root)))


def rank(root: Path, folder: str, args: Namespace | None, model: dict[str, torch.Tensor]) -> None:
    path = root / "iter_0000001" / folder
    path.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("1")
    torch.save({"args": args, "model": model, "iteration": 1}, path / "model_optim_rng.pt")


@pytest.mark.parametrize("size", [10**4, 2**20])
def test_ranks_without_number(tmp_path, size):
    """Of 10^4 times 10^4 ranks one is there; the first that are not are told."""
    degrees = {"tensor_model_parallel_size": size, "pipeline_model_parallel_size": size}
    rank(tmp_path, "mp_rank_00_000", Namespace(**degrees), EMBEDDING)
    text = problems(tmp_path)
    assert f"tensor 0 pipeline 20 expert 0 and {size * size - 21} more" in text and len(text) < 2000


@pytest.mark.parametrize("size", [10**9, -1, 2.0, "2", True, [2]])
def test_degrees_that_are_none(tmp_path, size):
    rank(tmp_path, "mp_rank_00", Namespace(tensor_model_parallel_size=size), EMBEDDING)
    assert [problem.option for problem in found(tmp_path)] == ["args.tensor_model_parallel_size"]


def test_names_of_ranks_without_number(tmp_path):
    rank(tmp_path, "mp_rank_99", None, EMBEDDING)
    assert "and 79 more" in problems(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"hidden_size": "x"},
        {"num_layers": 2.5},
        {"num_attention_heads": "many"},
        {"norm_epsilon": "small"},
        {"normalization": 7},
        {"position_embedding_type": "rope", "rotary_base": "high", "rotary_percent": "x"},
        {"group_query_attention": True, "num_query_groups": "x"},
        {"rope_scaling_type": "llama3", "position_embedding_type": "rope", "rope_scaling_factor": "x"},
        {"swiglu": 3, "num_layers": 10**400},
    ],
)
def test_settings_of_another_type(tmp_path, settings):
    usual = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "ffn_hidden_size": 8, "seq_length": 8}
    model = {**EMBEDDING, "decoder.layers.0.mlp.linear_fc2.weight": torch.ones(4, 8)}
    rank(tmp_path, "mp_rank_00", Namespace(**{**usual, "max_position_embeddings": 8, **settings}), model)
    assert {problem.kind for problem in found(tmp_path)} == {"unclear"}


def endless() -> list:
    """Few bytes in a file, and 2^40 texts if it is written out."""
    value: list = ["x"]
    for _ in range(40):
        value = [value, value]
    return value


def test_settings_that_hold_one_another(tmp_path):
    """Objects are compared and told by their type."""
    for number, value in enumerate((endless(), 8)):
        path = tmp_path / "iter_0000001" / f"mp_rank_0{number}"
        path.mkdir(parents=True)
        args = Namespace(tensor_model_parallel_size=2, num_layers=value, hidden_size=endless())
        torch.save({"args": args, "model": EMBEDDING, "iteration": value}, path / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    text = problems(tmp_path)
    assert "num_layers: 8, an object of type list" in text and "iteration: 8, an object of type list" in text
    rank(tmp_path / "other", "mp_rank_00", Namespace(pipeline_model_parallel_size=endless()), EMBEDDING)
    assert "an object of type list" in problems(tmp_path / "other")


@pytest.mark.parametrize("value", [10**5000, -(10**5000), "x" * 10**6], ids=["large", "small", "long"])
@pytest.mark.parametrize("name", ["hidden_size", "num_layers", "tensor_model_parallel_size", "rope_scaling_factor"])
def test_settings_without_end(tmp_path, name, value):
    model = {**EMBEDDING, "decoder.layers.0.mlp.linear_fc2.weight": torch.ones(4, 8)}
    usual = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1, "ffn_hidden_size": 8, "seq_length": 8}
    rank(tmp_path, "mp_rank_00", Namespace(**{**usual, name: value}), model)
    assert len(problems(tmp_path)) < 2000


def test_more_layers_by_the_settings_than_memory_holds(tmp_path):
    model = {**EMBEDDING, "decoder.layers.0.mlp.linear_fc2.weight": torch.ones(4, 8)}
    rank(tmp_path, "mp_rank_00", Namespace(num_layers=10**12), model)
    assert "1000000000000 layers, but its ranks hold 1" in problems(tmp_path)


@pytest.mark.parametrize("number", ["1", "99999999999", "9" * 20, "9" * 5000], ids=len)
def test_numbers_of_layers_and_chunks(tmp_path, number):
    layer = {f"decoder.layers.{number}.mlp.linear_fc2.weight": torch.ones(4, 8)}
    rank(tmp_path / "layer", "mp_rank_00", None, {**EMBEDDING, **layer})
    assert "layers are missing" in problems(tmp_path / "layer")
    rank(tmp_path / "chunk", "mp_rank_00", None, EMBEDDING)
    content = {"args": None, "iteration": 1, f"model{number}": EMBEDDING}
    torch.save(content, tmp_path / "chunk" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt")
    assert "of its chunks" in (text := problems(tmp_path / "chunk")) or "cannot be read" in text


def test_files_that_hold_other_things(tmp_path):
    rank(tmp_path, "mp_rank_00", None, EMBEDDING)
    file = tmp_path / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    for content in (torch.ones(2), [1], None):
        torch.save(content, file)
        assert "nothing by name" in problems(tmp_path)
    torch.save({"model": EMBEDDING, "model0": EMBEDDING}, file)
    assert "twice" in problems(tmp_path)
    rank(tmp_path, "mp_rank_00_000", None, EMBEDDING)
    torch.save({"model": EMBEDDING}, file)
    assert "several files are of tensor 0" in problems(tmp_path)


def test_an_embedding_that_is_one_number(tmp_path):
    rank(tmp_path, "mp_rank_00", None, {"embedding.word_embeddings.weight": torch.tensor(1.0)})
    with pytest.raises(ProblemError) as caught:
        source.read(tmp_path)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.limit) == ("missing", "embedding.word_embeddings.weight")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_types_that_are_none_of_weights(tmp_path, dtype):
    tiny.save(tmp_path / "hf", tiny.LLAMA)
    convert(tmp_path / "hf", tmp_path / "mg", *CORE)
    (file,) = (tmp_path / "mg").rglob("model_optim_rng.pt")
    content = torch.load(file, weights_only=False)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    content["model"][name] = content["model"][name].to(dtype)
    torch.save(content, file)
    assert f"{name} of {dtype}" in problems(tmp_path / "mg")


def test_trackers_that_are_none(tmp_path):
    for name in ("latest_checkpointed_iteration.txt", "latest"):
        for content in (b"1" * 101, b"9" * 10**5, b"9" * 100, b"\xff" * 100, b"\0", b""):
            (tmp_path / name).write_bytes(content)
            assert not is_megatron(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.skipif(not Path("/proc/self/mem").is_file(), reason="needs a file of which reading fails")
def test_files_of_which_reading_fails(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for name in ("latest_checkpointed_iteration.txt", "latest", "model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).symlink_to("/proc/self/mem")
        assert not is_megatron(tmp_path) and not mindformers.recognises(tmp_path)
        (tmp_path / name).unlink()
