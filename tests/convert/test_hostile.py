"""Checkpoints of strangers, whose settings and names claim what cannot be."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from cordee.errors import ProblemError
from cordee.weights.megatron import source

EMBEDDING = {"embedding.word_embeddings.weight": torch.ones(8, 4)}


def problems(root: Path) -> str:
    with pytest.raises(ProblemError) as caught:
        source.read(root)
    return str(caught.value)


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
    assert "args.tensor_model_parallel_size" in problems(tmp_path)


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
    assert "by its settings" in problems(tmp_path)
