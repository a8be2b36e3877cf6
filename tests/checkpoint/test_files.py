"""Reading data files by slices, as a source of weights, and without trusting them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch

from cordee import sealed
from cordee.checkpoint import files, source
from cordee.checkpoint.storage import location_of
from cordee.checkpoint.store import CheckpointStore
from cordee.convert import job as convert
from cordee.convert.options import ConvertConfig
from cordee.errors import ProblemError
from cordee.families.registry import spec_from_preset
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.model.options import ModelOptions
from cordee.weights import hf
from tests.checkpoint import toy
from tests.problems import facts

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def save_sharded(rank: int, world_size: int, root: Path, dim: int) -> torch.Tensor:
    model, _ = toy.build(world_size, dim=dim)
    store = CheckpointStore(location_of(root), group=toy.background())
    store.save(1, model, None, {})
    store.close()
    return toy.values(model)["0.weight"]


@pytest.mark.slow
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(
    "index", [None, (slice(2, 9),), (slice(None), slice(1, 2)), (slice(3, 12), slice(2, 7)), (slice(4, 4), slice(0, 8))]
)
def test_slices_over_shards(tmp_path: Path, pool, dim: int, index):
    expected = pool.run(save_sharded, 4, tmp_path, dim)[0]
    path = tmp_path / "iter_0000001"
    metadata = files.read_metadata(location_of(path))
    assert len(files.tensors(metadata)["model.0.weight"].chunks) == 4
    found = files.read_tensor(location_of(path), metadata, "model.0.weight", index)
    assert torch.equal(found, expected if index is None else expected[index])


def test_missing_bytes(tmp_path: Path):
    store = CheckpointStore(location_of(tmp_path))
    store.save(1, toy.build()[0], None, {})
    store.close()
    path = tmp_path / "iter_0000001"
    metadata = files.read_metadata(location_of(path))
    assert files.missing_bytes(location_of(path), metadata) is None
    del metadata.state_dict_metadata["model.0.weight"].chunks[:]
    assert files.missing_bytes(location_of(path), metadata) is not None
    (path / "__0_0.distcp").write_bytes(b"short")
    with pytest.raises(ValueError):
        files.read_metadata(location_of(path))


class Evil:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_metadata_cannot_run_code(tmp_path: Path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil(tmp_path / "touched")))
    with pytest.raises(ValueError):
        files.read_metadata(location_of(tmp_path))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps({"a": 1})])
def test_metadata_that_is_none(tmp_path: Path, content: bytes):
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(ValueError):
        files.read_metadata(location_of(tmp_path))


SMALL = ModelOptions(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    vocab_size=61,
    make_vocab_size_divisible_by=1,
    max_position_embeddings=32,
)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, GPTModel]:
    """A checkpoint of a small model, saved twice."""
    spec = spec_from_preset("llama2-7b").with_options(SMALL)
    model = GPTModel(spec.config)
    store = CheckpointStore(location_of(tmp_path / "run"))
    for seed in (1, 2):
        initialise(model, seed)
        store.save(seed, model, None, {"model": spec.to_dict(), "config": {}})
    store.close()
    return tmp_path / "run", model


def test_source(saved):
    root, model = saved
    for path, iteration in ((root, None), (root / "iter_0000002", None), (root, 2)):
        weights = source.read(path, iteration)
        assert weights.spec.family.name == "llama"
        assert weights.names() == list(dict(model.named_parameters()))
        for name, parameter in model.named_parameters():
            assert weights.shape(name) == tuple(parameter.shape)
            assert weights.dtype(name) == torch.float32
            assert torch.equal(weights.tensor(name), parameter)
        part = (slice(1, 2), slice(5, 40))
        assert torch.equal(
            weights.tensor("layers.1.mlp.gate_up.weight", part), model.layers["1"].mlp.gate_up.weight[part]
        )
    initialise(model, 1)
    assert torch.equal(source.read(root, 1).tensor("embedding.weight"), model.embedding.weight)


def test_export(saved, tmp_path: Path):
    root, model = saved
    assert convert.run(ConvertConfig(load_dir=str(root), save_dir=str(tmp_path / "hf"))) == 0
    exported = hf.read(tmp_path / "hf")
    for name, parameter in model.named_parameters():
        assert torch.equal(exported.tensor(name), parameter)


def test_damaged_source(saved):
    root, _ = saved
    (root / "iter_0000002" / "__0_0.distcp").unlink()
    weights = source.read(root)
    assert weights.path.name == "iter_0000001"
    assert "iter_0000002" in weights.notes[0]
    for place, kind in ((root / "iter_0000002", "corrupt"), (root.parent, "missing")):
        with pytest.raises(ProblemError) as caught:
            source.read(place)
        assert facts(caught) == [("checkpoint", str(place), kind)]


def test_checkpoint_of_another_model_than_it_says(saved):
    root, _ = saved
    manifest = root / "iter_0000002" / "cordee.json"
    changed = json.loads(manifest.read_text().replace('"intermediate_size": 48', '"intermediate_size": 64'))
    manifest.write_text(sealed.seal({key: value for key, value in changed.items() if key != sealed.CHECKSUM}))
    with pytest.raises(ProblemError) as caught:
        source.read(root)
    assert [problem.kind for problem in caught.value.problems] == ["shape"] * 4
    assert all("mlp" in str(problem.limit) for problem in caught.value.problems)
