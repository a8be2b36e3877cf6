"""The arithmetic of Megatron's layouts, and the rows that fill vocabularies up."""

from __future__ import annotations

import pytest
import torch

from cordee.errors import ProblemError
from cordee.families.registry import spec_from_hf
from cordee.tensors.views import Leaf
from cordee.weights.megatron.layout import Layout, Rank, Wanted, chunks_of, even_chunks, rank_files
from cordee.weights.megatron.padding import Crop, Pad, padded_rows
from tests.weights.models import MODELS


def where(chunks) -> dict[tuple[int, int], list[int]]:
    """Layers by stage and chunk of the stage."""
    return {(chunk.pipeline, chunk.virtual): list(chunk.layers) for chunk in chunks}


def test_layers_of_stages():
    assert where(even_chunks(6, 3)) == {(0, 0): [0, 1], (1, 0): [2, 3], (2, 0): [4, 5]}
    assert where(chunks_of([1, 3, 2], 3)) == {(0, 0): [0], (1, 0): [1, 2, 3], (2, 0): [4, 5]}


def test_layers_of_virtual_stages():
    """Chunk v of stage p holds layers v * (stages * k) + p * k and the k - 1 after it."""
    stages, k, layers = 2, 2, 12
    expected = {
        (p, v): list(range(v * stages * k + p * k, v * stages * k + p * k + k)) for p in range(2) for v in range(3)
    }
    assert where(even_chunks(layers, stages, k)) == expected


@pytest.mark.parametrize(
    ("pipeline", "expert", "name"),
    [(1, 1, "mp_rank_03"), (2, 1, "mp_rank_03_001"), (1, 4, "mp_rank_03_002"), (2, 4, "mp_rank_03_001_002")],
)
def test_folders(tmp_path, pipeline, expert, name):
    layout = Layout(tensor=4, expert=expert, chunks=even_chunks(4, pipeline))
    rank = Rank(3, 1 if pipeline > 1 else 0, 2 if expert > 1 else 0)
    assert layout.folder(rank) == name
    (tmp_path / name).mkdir()
    assert list(rank_files(tmp_path)) == [tuple(int(part) for part in name.split("_")[2:])]
    assert len({layout.folder(rank) for rank in layout.ranks()}) == 4 * pipeline * expert


def test_all_problems_at_once():
    config = spec_from_hf(MODELS["mixtral"]).config
    with pytest.raises(ProblemError) as caught:
        Wanted(tensor=3, pipeline=2, expert=3, layer_list=(4, 4)).layout(config)
    assert {problem.option for problem in caught.value.problems} == {
        "--target-tensor-parallel-size",
        "--target-expert-parallel-size",
        "--num-layer-list",
    }


@pytest.mark.parametrize("tail", [False, True])
def test_filling_rows(tail):
    rows = torch.arange(10.0).view(5, 2)
    padded = torch.cat([rows, rows[-3:] if tail else rows[-1:].expand(3, 2)])
    (view,) = Pad(5, 8, tail).apply([Leaf((5, 2), lambda index: rows[index])])
    for start in range(9):
        for stop in range(start, 9):
            index = (slice(start, stop), slice(1, 2))
            assert torch.equal(view.read(index), padded[index])
    (back,) = Crop(5, 8, tail).apply([view])
    assert torch.equal(back.read((slice(1, 5), slice(0, 2))), rows[1:])
    assert (padded_rows(61, 128), padded_rows(128, 128), padded_rows(61, 1)) == (128, 128, 61)
