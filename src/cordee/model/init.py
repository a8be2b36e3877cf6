"""Initial values that no layout can change.

Owns the function: each value follows from (seed, canonical parameter name, global position), so a shard fills itself
without its neighbours and every layout starts from the same model. The source of randomness is a counter hashed by
the finaliser of SplitMix64 (Steele, Lea & Flood 2014), turned normal by the Box-Muller transform."""

import math
from collections.abc import Callable, Collection
from functools import partial

import torch
from torch import Tensor, nn

from cordee.model.parameter import ORIGINS, local_shard, of_origins, parameter_specs
from cordee.model.specs import Origin, ParameterSpec
from cordee.ops.dropout import stream_key

Shape = tuple[int, ...]
BLOCK = 1 << 18  # elements filled at once: the int64 counters and what becomes of them stay in the caches, 2 MiB each


@torch.no_grad()
def initialise(model: nn.Module, seed: int, origins: Collection[Origin] = ORIGINS) -> None:
    """Fill every parameter of `model` of these origins: plain tensors, and the local shards of DTensors."""
    specs = parameter_specs(model)
    for name, parameter in of_origins(model, origins).items():
        local, offset = local_shard(parameter)
        fill(local, specs[name], offset, stream_key(seed, name))


def fill(local: Tensor, spec: ParameterSpec, offset: tuple[int, ...], key: int) -> None:
    """Fill `local`, the shard of a parameter that begins at `offset` of its global shape."""
    if not spec.std:
        local.fill_(spec.fill)
        return
    if local.numel():
        _fill_drawn(local, spec.shape, offset, spec.std, partial(_uniform_at if spec.uniform else normal_at, key=key))


def _fill_drawn(
    local: Tensor, shape: Shape, offset: Shape, std: float, drawn: Callable[[Tensor], Tensor], base: int = 0
) -> None:
    """Fill the part of a tensor of `shape` that begins at `offset`; `base` is the tensor's own first position."""
    stride = math.prod(shape[1:])
    if local[0].numel() > BLOCK:
        for index, part in enumerate(local, start=offset[0]):
            _fill_drawn(part, shape[1:], offset[1:], std, drawn, base + index * stride)
        return
    inner = _positions(local.shape[1:], shape[1:], offset[1:], local.device)
    step = max(1, BLOCK // inner.numel())
    for start in range(0, local.shape[0], step):
        block = local[start : start + step]
        outer = torch.arange(block.shape[0], device=local.device) * stride + (base + (offset[0] + start) * stride)
        block.copy_((drawn(outer[:, None] + inner) * std).view_as(block))


def _positions(local: Shape, shape: Shape, offset: Shape, device: torch.device) -> Tensor:
    """Flat positions in a tensor of `shape` of its part of sizes `local` that begins at `offset`, in order."""
    positions = torch.zeros((), dtype=torch.int64, device=device)
    for dim, (start, size) in enumerate(zip(offset, local, strict=True)):
        index = torch.arange(start, start + size, device=device)
        positions = positions[..., None] + index * math.prod(shape[dim + 1 :])
    return positions.reshape(-1)


def normal_at(position: Tensor, key: int) -> Tensor:
    """Standard normal float32 values for the int64 counters `position`, of the same shape."""
    counter = position * 2 + key
    radius = (-2.0 * torch.log(_uniform(counter))).sqrt_()
    return radius * torch.cos(2.0 * math.pi * _uniform(counter + 1))


def _uniform_at(position: Tensor, key: int) -> Tensor:
    """Uniform float32 values with mean 0 and variance 1, as `normal_at`."""
    return (_uniform(position * 2 + key) - 0.5) * math.sqrt(12.0)


def _uniform(counter: Tensor) -> Tensor:
    """Uniform float32 values in (0, 1) from 24 bits of the hashed counter."""
    return (_shift(_mix(counter), 40).float() + 0.5) * 2.0**-24


def _mix(counter: Tensor) -> Tensor:
    x = counter * -7046029254386353131  # the golden gamma 0x9E3779B97F4A7C15; int64 products wrap as in the original
    x = (x ^ _shift(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch shifts int64 arithmetically, so the copies of the sign are masked off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
