"""The parts of the benchmark of conversion, on a tiny model. Its figures are not tested."""

from __future__ import annotations

import sys

import pytest

from cordee.bench import convert
from cordee.bench.contest import Results, Turn
from cordee.bench.options import BenchConfig
from cordee.checkpoint import formats
from cordee.errors import ProblemError
from cordee.families.registry import spec_from_hf
from tests.weights import models

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc, and holes are Linux's")


class OneTurn:
    def __init__(self):
        self.turns = []

    def take(self):
        return True

    def give(self, seconds, **figures):
        self.turns.append(Turn(list(seconds), figures))


@pytest.fixture
def hf(tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "SHARD", 50_000)
    convert.write_sparse(tmp_path / "hf", spec_from_hf(models.MODELS["llama"]))
    return tmp_path / "hf"


def test_zeros_that_are_a_model(hf):
    source = formats.read(hf)
    assert not any(source.tensor(name).any() for name in source.names())
    total, largest = convert._bytes(hf)
    assert total == sum(2 * source.tensor(name).numel() for name in source.names())
    assert largest == 2 * 61 * 32  # of the embedding
    assert len(list(hf.glob("*.safetensors"))) == 2


def test_the_turns_of_a_round(hf, tmp_path):
    baton = OneTurn()
    flags = ("--save-model-type", "mg", "--use-mcore-models", "--target-tensor-parallel-size", "2")
    convert.play_copy(baton, hf, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {file.name for file in hf.iterdir()}
    convert.play_convert(baton, hf, tmp_path / "megatron", flags)
    convert.play_convert(baton, tmp_path / "megatron", tmp_path / "back", ())
    assert formats.format_of(tmp_path / "back").name == "hf"
    assert all(turn.median > 0 for turn in baton.turns) and len(baton.turns) == 3
    turns = dict(zip((convert.COPIES[convert.THERE], convert.THERE, convert.BACK), baton.turns, strict=True))
    turns[convert.COPIES[convert.BACK]] = baton.turns[0]
    results = Results({name: [turn] for name, turn in turns.items()})
    report = convert._report(BenchConfig(suite="convert", rounds=1), "tiny", 2, *convert._bytes(hf), results)
    assert f"{convert.BACK}: by cp" in report.figures and "| HF to Megatron" in report.to_markdown()


def test_discarding_keeps_files_as_they_are(hf, tmp_path, monkeypatch):
    monkeypatch.setattr(convert, "HEADER", 8192)
    convert.play_copy(OneTurn(), hf, tmp_path / "out")
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()}
    blocks = sum(file.stat().st_blocks for file in (tmp_path / "out").iterdir())
    convert.discard(tmp_path / "out")
    assert {file.name: file.stat().st_size for file in (tmp_path / "out").iterdir()} == sizes
    assert sum(file.stat().st_blocks for file in (tmp_path / "out").iterdir()) < blocks
    source = formats.read(tmp_path / "out")
    assert not any(source.tensor(name).any() for name in source.names())


def test_copies_are_removed_one_after_the_other(hf, tmp_path):
    baton = OneTurn()
    convert.play_copy(baton, hf, tmp_path / "out", discarding=True)
    assert len(baton.turns) == 1 and baton.turns[0].median > 0
    assert not (tmp_path / "out").exists() and len(list(hf.glob("*.safetensors"))) == 2


def test_too_little_room(tmp_path):
    with pytest.raises(ProblemError, match="--discard"):
        convert._check_room(str(tmp_path), 2**60, discarding=False)
    convert._check_room(str(tmp_path), 2**60, discarding=True)
