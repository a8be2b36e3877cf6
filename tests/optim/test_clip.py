"""The global norm over plain and sharded gradients, each element counted once."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cordee.optim.clip import clip_factor, count_zeros, global_norm, scale_


def gradients() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(4, 8), torch.randn(8), torch.randn(3, 5), torch.zeros(2, 2)]


def expected() -> float:
    return torch.cat([g.flatten() for g in gradients()]).norm().item()


def test_norm_and_clip():
    grads = gradients()
    norm = global_norm(grads)
    assert norm.item() == pytest.approx(expected(), rel=1e-6)
    factor = clip_factor(norm.item(), 1.0)
    scale_(grads, factor)
    assert global_norm(grads).item() == pytest.approx(1.0, rel=1e-5)
    assert count_zeros(grads).item() == 4


@pytest.mark.parametrize(
    ("norm", "limit", "factor"), [(0.5, 1.0, 1.0), (4.0, 0.0, 1.0), (4.0, 2.0, 2.0 / (4.0 + 1e-6))]
)
def test_factor(norm, limit, factor):
    assert clip_factor(norm, limit) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_not_finite(bad):
    grads = gradients()
    grads[1][3] = bad
    assert not math.isfinite(global_norm(grads).item())


def mixed(rank: int, world_size: int) -> tuple[float, int, float]:
    """Gradients on two meshes and on none, sharded, replicated and both, then scaled to half."""
    line = init_device_mesh("cpu", (world_size,), mesh_dim_names=("shard",))
    plane = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
    plain = gradients()
    placed = [
        distribute_tensor(plain[0], line, [Shard(1)]),
        distribute_tensor(plain[1], plane, [Replicate(), Shard(0)]),
        plain[2],
        distribute_tensor(plain[3], line, [Replicate()]),
    ]
    norm, zeros = global_norm(placed).item(), int(count_zeros(placed).item())
    scale_(placed, 0.5)
    return norm, zeros, global_norm(placed).item()


def test_mixed_meshes(pool):
    for norm, zeros, half in pool.run(mixed, 4):
        assert norm == pytest.approx(expected(), rel=1e-6)
        assert half == pytest.approx(expected() / 2, rel=1e-6)
        assert zeros == 4
