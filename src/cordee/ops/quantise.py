"""Frozen weights in few bits: 4-bit NormalFloat with double quantisation (QLoRA, Dettmers et al. 2023), or int8.

Owns the codes and what they stand for, in torch's own operators. Knows no module. Blocks lie along rows, and logarithms
of their absmaxes, which an outlier does not coarsen, are quantised again down columns: shards of whole blocks have the
codes of the whole."""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK, GROUP = 64, 256  # weights of a row with one absmax; of these, one below the other, with one mean and one scale
_RANGE = 2.0**16  # between absmaxes that are told apart
_BELOW = "-1 -0.696192801 -0.525073051 -0.394917488 -0.284441382 -0.184773430 -0.0910500363 0"  # Appendix E
_ABOVE = "0.0795802996 0.160930201 0.246112302 0.337915242 0.440709829 0.562617004 0.722956836 1"


@dataclass(eq=False)
class Quantised:
    """A weight `[*out_shape, in]` as codes and scales, `tensors`, of "nf4" or "int8"; none before `fill`."""

    kind: str
    shape: tuple[int, ...] = ()
    tensors: tuple[Tensor, ...] = ()

    def fill(self, weight: Tensor) -> None:
        encode = _to_nf4 if self.kind == "nf4" else _to_int8
        matrices = weight.float().reshape(-1, *weight.shape[-2:])  # heads, gate and up, experts: each by itself
        parts = [encode(rows) for matrix in matrices for rows in matrix.split(GROUP)]
        self.shape, self.tensors = weight.shape, tuple(torch.cat(each) for each in zip(*parts, strict=True))

    def dequantised(self) -> Tensor:
        """The weight, float32."""
        rows = _of_nf4(self.shape[-2], *self.tensors) if self.kind == "nf4" else torch.mul(*self.tensors)
        return rows[:, : self.shape[-1]].reshape(self.shape)


def _to_nf4(rows: Tensor) -> tuple[Tensor, ...]:
    """Codes, two a byte, of GROUP rows at most; int8 log2 of absmax `[rows, blocks]`, scale and mean `[1, blocks]`."""
    blocks = F.pad(rows, (0, -rows.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    absmax, levels = blocks.abs().amax(-1), _pairs(rows.device)[:16, 1]
    nearest = torch.bucketize(blocks / absmax.clamp(min=1e-37)[..., None], (levels[1:] + levels[:-1]) / 2)
    first, second = nearest.byte().flatten(1).unflatten(1, (-1, 2)).unbind(-1)
    # A block of zeros asks nothing of its absmax; tiny ones are bounded, or their logarithms would coarsen all others.
    largest = absmax.amax(0, keepdim=True)
    logs = absmax.where(absmax > 0, largest).maximum(largest / _RANGE).clamp(min=1e-37).log2()
    mean = logs.mean(0, keepdim=True).bfloat16()
    logs, scale = _to_int8(logs - mean, 0)
    return first * 16 + second, logs, scale, mean


def _of_nf4(height: int, codes: Tensor, logs: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    groups = torch.arange(len(scale), device=scale.device).view(-1, -(-height // GROUP))
    group = groups.repeat_interleave(GROUP, 1)[:, :height].flatten()  # of each row, matrices of `height` of them
    values = _pairs(codes.device)[codes.int()].view(*logs.shape, BLOCK)
    return (values * torch.exp2(logs * scale.float()[group] + mean.float()[group])[..., None]).flatten(1)


@functools.cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels of every byte, `[256, 2]`."""
    levels = torch.tensor([float(level) for level in f"{_BELOW} {_ABOVE}".split()], device=device)
    return torch.cartesian_prod(levels, levels)


def _to_int8(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Codes of a matrix, and what they are multiplied by: the absmax over a dim / 127, of logarithms in bfloat16."""
    scale = (x.abs().amax(dim, keepdim=True) / 127).to(torch.bfloat16 if dim == 0 else torch.float32)
    return (x / scale.float().clamp(min=1e-37)).round().clamp(-127, 127).to(torch.int8), scale
