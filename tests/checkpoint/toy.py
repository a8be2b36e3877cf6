"""A small model and optimizer that checkpoints are tested with, plain or sharded."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard


def build(shards: int = 1, seed: int = 0, dim: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Parameters drawn from `seed`, one optimizer step done; over `shards` ranks if that is more than one."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4))
    if shards > 1:
        mesh = init_device_mesh("cpu", (shards,))
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(min(dim, p.ndim - 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.randn(3, 8, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def values(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, torch.Tensor]:
    """Everything in plain tensors, by name."""
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = full(parameter.detach())
        for kind, value in (optimizer.state.get(parameter, {}) if optimizer else {}).items():
            found[f"{name}/{kind}"] = full(value)
    return found


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def background() -> dist.ProcessGroup:
    return dist.new_group(backend="gloo")
