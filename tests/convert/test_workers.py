"""What is written does not hang on how many threads write it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cordee.checkpoint import formats
from cordee.convert import job
from cordee.families.registry import spec_from_hf
from cordee.weights import codec, hf
from tests.convert.test_megatron import ASCEND, CORE, EP, LEGACY, MINDFORMERS, PP, TP, convert
from tests.weights import models, tiny

TARGETS = {
    "hf": (),
    "hf of another type": ("--params-dtype", "fp16"),
    "mindformers": MINDFORMERS,
    "dcp": ("--save-model-type", "dcp"),
    "gguf": ("--save-model-type", "gguf", "--params-dtype", "fp32"),
    "core": (*CORE, TP, "2", PP, "2"),
    "legacy": LEGACY,
    "ascendspeed": (*ASCEND, "--deepspeed", TP, "2"),
}
EXPERTS = {"hf": (), "dcp": ("--save-model-type", "dcp"), "core": (*CORE, TP, "4", EP, "2")}


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """So that tensors of some kilobytes are written in many slices."""
    monkeypatch.setattr(codec, "SLICE", 256)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("kind", "flags"),
    [("llama", flags) for flags in TARGETS.values()] + [("mixtral", flags) for flags in EXPERTS.values()],
    ids=[*TARGETS, *(f"mixtral {name}" for name in EXPERTS)],
)
def test_threads_write_the_same(tmp_path, kind, flags):
    config = {**models.MODELS[kind], "attention_bias": False}
    tiny.save(tmp_path / "a", config, tiny.tensors_of(spec_from_hf(config), torch.bfloat16))
    (tmp_path / "a" / "generation_config.json").write_text("{}")
    convert(tmp_path / "a", tmp_path / "one", *flags)
    convert(tmp_path / "a", tmp_path / "four", *flags, "--workers", "4", "--verify")
    assert contents(tmp_path / "one") == contents(tmp_path / "four")


def test_threads_write_the_same_shards(tmp_path):
    """Tensors of one parameter that lie in two shards, too."""
    tensors = tiny.save(tmp_path / "a", models.MODELS["mixtral"])
    source = formats.read(tmp_path / "a")
    for name, workers in (("one", 1), ("four", 4)):
        with hf.write(tmp_path / name, source.spec, max_shard_size=8000, workers=workers) as sink:
            job.copy(source, sink)
    found = contents(tmp_path / "one")
    assert found == contents(tmp_path / "four")
    shards = sorted(name for name in found if name.endswith(".safetensors"))
    assert len(shards) > 10
    assert all(len(found[shard]) < 8000 + 8192 for shard in shards[1:])  # the rest of a file is its header
    written = {name: tensor for shard in shards for name, tensor in load_file(tmp_path / "one" / shard).items()}
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in tensors.items())
