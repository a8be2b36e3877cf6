"""Weights into models and out of them: whole, sharded, without memory, partial."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cordee.errors import ProblemError
from cordee.families.registry import spec_from_hf
from cordee.model.gpt import GPTModel, Span
from cordee.model.init import initialise
from cordee.weights import hf
from cordee.weights.load import load_into, materialise, save_from
from tests.weights import tiny


@pytest.fixture(params=list(tiny.MODELS))
def saved(request, tmp_path):
    """A directory with a tiny model, and its canonical tensors."""
    config = tiny.MODELS[request.param]
    tensors = tiny.save(tmp_path, config)
    return tmp_path, tiny.canonical_of(spec_from_hf(config), tensors)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_parameter_is_filled(saved, device):
    directory, expected = saved
    source = hf.read(directory)
    model = GPTModel(source.spec.config, device=device)
    report = load_into(model, source)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (report.parameters, report.elements) == (len(expected), sum(t.numel() for t in expected.values()))
    assert f"{report.elements:,} parameters" in str(report)


def test_values_are_converted_to_the_type_of_the_model(saved):
    directory, expected = saved
    source = hf.read(directory)
    for model, dtype in (
        (GPTModel(source.spec.config, dtype=torch.bfloat16), None),
        (GPTModel(source.spec.config, device="meta"), torch.bfloat16),
    ):
        load_into(model, source, dtype)
        found = dict(model.named_parameters())
        assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in expected.items())


def test_a_span_takes_its_own_layers(saved):
    directory, expected = saved
    source = hf.read(directory)
    model = GPTModel(source.spec.config, spans=[Span(1, 2, embedding=False, head=False)], device="meta")
    load_into(model, source)
    found = dict(model.named_parameters())
    assert found and all(name.startswith("layers.1.") for name in found)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_tied_head_stays_tied(tmp_path):
    tiny.save(tmp_path, tiny.MODELS["llama tied"])
    source = hf.read(tmp_path)
    model = GPTModel(source.spec.config, device="meta")
    load_into(model, source)
    assert model.head.weight is model.embedding.weight


def test_memory_is_given_to_what_has_none():
    config = spec_from_hf(tiny.LLAMA).config
    model = GPTModel(config, device="meta")
    kept = torch.nn.Parameter(torch.ones(config.hidden_size))
    model.final_norm.weight = kept
    materialise(model, torch.bfloat16)
    assert model.final_norm.weight is kept
    assert model.embedding.weight.dtype == torch.bfloat16 and not model.embedding.weight.is_meta


def test_a_model_of_another_shape_is_refused_before_anything_is_loaded(tmp_path):
    tiny.save(tmp_path, tiny.LLAMA)
    other = {**tiny.LLAMA, "num_hidden_layers": 3, "vocab_size": 64, "mlp_bias": True}
    model = GPTModel(spec_from_hf(other).config)
    initialise(model, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ProblemError) as caught:
        load_into(model, hf.read(tmp_path))
    options = {problem.option for problem in caught.value.problems}
    assert {"embedding.weight", "head.weight", "layers.0.mlp.down.bias", "layers.2.mlp.down.weight"} <= options
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_is_saved_as_it_was_loaded(saved, tmp_path):
    directory, _ = saved
    source = hf.read(directory)
    model = GPTModel(source.spec.config, device="meta")
    load_into(model, source)
    with hf.write(tmp_path / "out", source.spec) as sink:
        save_from(model, sink)
    again = hf.read(tmp_path / "out")
    assert all(torch.equal(again.tensor(name), source.tensor(name)) for name in source.names())


# ---- sharded models --------------------------------------------------------------------------------------------------


def shard_tensor_parallel(model: GPTModel, mesh) -> None:
    """Shards groups of heads, ffn and vocabulary, as tensor parallelism does; 61 rows do not divide evenly."""
    dims = {"attention.qkv": 0, "attention.out": 1, "mlp.gate_up": 1, "mlp.up": 0, "mlp.down": 1, "embedding": 0}
    for name, module in model.named_modules():
        dim = next((dim for suffix, dim in dims.items() if name.endswith(suffix)), None)
        if dim is not None:
            shard = distribute_tensor(module.weight.detach(), mesh, [Shard(dim)])
            module.weight = torch.nn.Parameter(shard)
    if model.config.tie_word_embeddings:
        model.head.weight = model.embedding.weight


def sharded_model(config, layout: dict[str, int]) -> GPTModel:
    """A model without memory on a mesh of `layout`: the axes "dp" (FSDP over the last dim) and "tp"."""
    mesh = init_device_mesh("cpu", tuple(layout.values()), mesh_dim_names=tuple(layout))
    model = GPTModel(config, device="meta")
    if "tp" in layout:
        shard_tensor_parallel(model, mesh["tp"])
    if "dp" in layout:

        def placement(parameter):
            return Shard(parameter.ndim - 1 if parameter.shape[-1] % layout["dp"] == 0 else 0)

        for layer in model.layers.values():
            fully_shard(layer, mesh=mesh["dp"], shard_placement_fn=placement)
        fully_shard(model, mesh=mesh["dp"], shard_placement_fn=placement)
    return model


class CountingFile:
    """A file that counts the elements of matrices read from it."""

    def __init__(self, file):
        self.file, self.path, self.tensors, self.count = file, file.path, file.tensors, 0

    def read(self, name, index):
        part = self.file.read(name, index)
        self.count += part.numel() if part.ndim > 1 else 0
        return part


def load_sharded(rank: int, world_size: int, directory: Path, layout: dict[str, int]) -> tuple[bool, int, int]:
    """Whether the shards of this rank are right, and how many elements of matrices it holds and has read."""
    whole = hf.read(directory)
    source = hf.read(directory)
    counting = CountingFile(next(iter(source.files.values())))
    source.files = dict.fromkeys(source.files, counting)
    model = sharded_model(source.spec.config, layout)
    load_into(model, source)
    held, right = 0, True
    for name, parameter in model.named_parameters():
        full, local = parameter.detach(), parameter.detach()
        if isinstance(parameter, DTensor):
            full, local = full.full_tensor(), local.to_local()
        held += local.numel() if name.endswith(".weight") and "norm" not in name else 0
        right &= torch.equal(full, whole.tensor(name))
    return right, held, counting.count


LAYOUTS = [{"dp": 2}, {"tp": 2}, {"dp": 2, "tp": 2}, {"dp": 4}]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_shards_read_their_own_part_and_no_more(pool, tmp_path, layout, model):
    tiny.save(tmp_path, tiny.MODELS[model])
    world_size = 1
    for degree in layout.values():
        world_size *= degree
    for right, held, read in pool.run(load_sharded, world_size, tmp_path, layout):
        assert right and read == held


def save_sharded(rank: int, world_size: int, directory: Path, output: Path) -> None:
    source = hf.read(directory)
    model = sharded_model(source.spec.config, {"dp": world_size})
    load_into(model, source)
    if rank == 0:
        with hf.write(output, source.spec) as sink:
            save_from(model, sink)
    else:
        save_from(model, None)


def test_a_sharded_model_is_saved_whole(pool, saved, tmp_path):
    directory, _ = saved
    pool.run(save_sharded, 2, directory, tmp_path / "out")
    original, written = hf.read(directory), hf.read(tmp_path / "out")
    assert all(torch.equal(written.tensor(name), original.tensor(name)) for name in original.names())
