"""Initial values: a function of seed, name and global position, whatever holds them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from cordee.model import init
from cordee.model.init import fill, initialise
from cordee.model.parameter import local_shard
from cordee.model.specs import ParameterSpec
from cordee.ops.dropout import stream_key
from tests.model import tiny

SHAPES = [(60, 24), (2, 30, 24), (3, 5, 8, 24), (97,), (1, 7, 5), (13, 1)]


def spec(shape: tuple[int, ...], **kind) -> ParameterSpec:
    return ParameterSpec(shape, ("embed",) * len(shape), **(kind or {"std": 0.5}))


def whole(shape: tuple[int, ...], key: int = 7) -> torch.Tensor:
    values = torch.empty(shape)
    fill(values, spec(shape), (0,) * len(shape), key)
    return values


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_part_is_that_part_of_the_whole(shape):
    values = whole(shape)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        bounds = [sorted(torch.randint(0, size + 1, (2,), generator=generator).tolist()) for size in shape]
        part = torch.empty([stop - start for start, stop in bounds])
        fill(part, spec(shape), tuple(start for start, _ in bounds), 7)
        assert torch.equal(part, values[tuple(slice(*bound) for bound in bounds)])


@pytest.mark.parametrize("block", [1, 5, 64, 1000])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_do_not_show(shape, block, monkeypatch):
    expected = whole(shape)
    monkeypatch.setattr(init, "BLOCK", block)
    assert torch.equal(whole(shape), expected)


def test_values_are_normal_and_independent():
    values = whole((1000, 1000), stream_key(0, "a")) / 0.5
    assert values.mean().abs() < 4e-3
    assert (values.std() - 1).abs() < 4e-3
    assert (values.pow(3).mean()).abs() < 0.02
    assert (values.pow(4).mean() - 3).abs() < 0.05
    assert 4.5 < values.abs().max() < 6.5
    within = [torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1] for a, b in neighbours(values)]
    others = [whole((1000, 1000), stream_key(seed, name)) for seed, name in ((0, "b"), (1, "a"), (0, "a."))]
    across = [torch.corrcoef(torch.stack((values.flatten(), other.flatten())))[0, 1] for other in others]
    assert max(abs(float(r)) for r in (*within, *across)) < 5e-3


def neighbours(values: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(values[:, :-1], values[:, 1:]), (values[:-1], values[1:]), (values[:-7, :-3], values[7:, 3:])]


def by_hand(position: int, key: int) -> float:
    """SplitMix64 (Steele, Lea & Flood 2014) at two counters, and Box-Muller of the two, in Python's own numbers."""

    def uniform(counter: int) -> float:
        x = counter * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (((x ^ x >> 31) >> 40) + 0.5) / 2**24

    counter = (2 * position + key) % 2**64
    return math.sqrt(-2 * math.log(uniform(counter))) * math.cos(2 * math.pi * uniform(counter + 1))


@pytest.mark.parametrize("key", [0, 7, 2**63 - 1, stream_key(1234, "embedding.weight")])
def test_values_by_hand(key):
    """Runs begin from them: another version of this program must not change them."""
    values = whole((30, 20), key).flatten()
    for position in (0, 1, 19, 20, 333, 599):
        assert values[position].item() == pytest.approx(0.5 * by_hand(position, key), rel=1e-4, abs=1e-6)


def test_positions_may_be_large():
    part = torch.empty(2, 3)
    fill(part, spec((1 << 33, 1 << 10)), ((1 << 33) - 2, (1 << 10) - 3), 7)
    expected = [by_hand((((1 << 33) - 2 + i) << 10) + (1 << 10) - 3 + j, 7) for i in range(2) for j in range(3)]
    assert part.flatten().tolist() == pytest.approx([0.5 * value for value in expected], rel=1e-4, abs=1e-6)


def test_constants():
    for kind, value in (({"fill": 1.0}, 1.0), ({}, 0.0)):
        values = torch.empty(3, 4)
        fill(values, ParameterSpec((3, 4), ("embed", "embed"), **kind), (0, 0), 7)
        assert torch.equal(values, torch.full((3, 4), value))


def test_low_precision_is_the_rounded_value():
    values = torch.empty(60, 24, dtype=torch.bfloat16)
    fill(values, spec((60, 24)), (0, 0), 7)
    assert torch.equal(values, whole((60, 24)).bfloat16())


@pytest.mark.parametrize("shape", [(1, 1, 40, 50), (1, 3, 700), (2000,), (2000, 1)], ids=str)
def test_memory_is_bounded(shape, monkeypatch):
    """Whatever dims are long: one group, as of multi-query attention, leaves nothing to cut in the first."""
    sizes, normal_at = [], init.normal_at
    monkeypatch.setattr(init, "BLOCK", 64)
    monkeypatch.setattr(
        init, "normal_at", lambda position, key: sizes.append(position.numel()) or normal_at(position, key)
    )
    whole(shape)
    assert max(sizes) <= 64
    assert sum(sizes) == math.prod(shape)


def test_a_model_takes_the_seed_and_names_of_its_parameters():
    a, b, c = (tiny.model(tiny.config(), seed) for seed in (0, 0, 1))
    for name, value in a.named_parameters():
        assert torch.equal(value, b.get_parameter(name))
        if value.std() > 0:
            assert not torch.equal(value, c.get_parameter(name))
    first, second = (a.get_parameter(f"layers.{i}.mlp.gate_up.weight") for i in (0, 1))
    assert not torch.equal(first, second)


# ---- shards of several ranks -----------------------------------------------------------------------------------------


def shards_are_slices(rank: int, world_size: int) -> int:
    """Every parameter sharded over each of its dims, also where ranks do not divide it; returns how many were seen."""
    config = tiny.config(hidden_size=20)
    plain, sharded = tiny.model(config), tiny.model(config, seed=1)
    mesh = init_device_mesh("cpu", (world_size,))
    seen = 0
    for dim in range(4):
        for module in sharded.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if dim < parameter.ndim:
                    full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter.data
                    shard = distribute_tensor(full.detach(), mesh, [Shard(dim)])
                    setattr(module, name, torch.nn.Parameter(shard))
                    seen += 1
        initialise(sharded, 0)
        for name, parameter in sharded.named_parameters():
            full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            assert torch.equal(full, plain.get_parameter(name)), (name, dim)
    return seen


@pytest.mark.parametrize("world_size", [2, 4])
def test_shards_are_slices_of_the_whole(pool, world_size):
    assert min(pool.run(shards_are_slices, world_size)) > 30


def two_meshes_are_one_model(rank: int, world_size: int) -> None:
    """One dim sharded by one axis of the mesh, and the same or another by FSDP2 on top."""
    plain, model = tiny.model(tiny.config()), tiny.model(tiny.config(), seed=1)
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("data", "tensor"))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            shard = distribute_tensor(parameter.detach(), mesh["tensor"], [Shard(0)])
            setattr(module, name, torch.nn.Parameter(shard))
    for layer, dim in ((model.layers["0"], 0), (model.layers["1"], -1)):
        fully_shard(layer, mesh=mesh["data"], shard_placement_fn=lambda p, dim=dim: Shard(dim % p.ndim))
    initialise(model, 0)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), plain.get_parameter(name)), name


def test_two_ways_of_sharding_at_once(pool):
    pool.run(two_meshes_are_one_model, 4)


def test_a_plain_tensor_is_a_shard_that_begins_at_zero():
    tensor = torch.empty(3, 4)
    local, offset = local_shard(tensor)
    assert local is tensor
    assert offset == (0, 0)
    assert math.prod(local.shape) == 12
