"""Products of groups of rows with a matrix for each group, as MoE experts need them.

Owns the grouped product and the loop that defines it. Knows nothing of routing: rows come sorted by group."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cordee.device import KINDS
from cordee.log import info_once

ALIGNMENT = 16  # bytes: what grouped kernels ask of the distance between rows


def reference_grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x W_g^T for every row x of group g, one group after the other.

    `rows` `[rows, in]` hold counts[0] rows of group 0, then counts[1] of group 1 and so on; `counts` int64 `[groups]`
    sums to the number of rows; `weight` is `[groups, out, in]`. Gives `[rows, out]`."""
    groups = rows.split(counts.tolist())
    return torch.cat([F.linear(group, matrix) for group, matrix in zip(groups, weight.unbind(), strict=True)])


def grouped_matmul(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """As `reference_grouped_matmul`, in one kernel where device, type and shape allow; differentiable once."""
    if torch.compiler.is_compiling():
        return _uncompiled(rows, weight, counts)
    if not has_kernel(rows, weight):
        what = tuple(weight.shape[1:]), _name(rows.dtype)
        info_once("No grouped kernel takes experts of %s in %s: they run one after the other", *what)
        return reference_grouped_matmul(rows, weight, counts)
    return _GroupedMatmul.apply(rows, weight, counts.cumsum(0).to(torch.int32))


# torch 2.13 traces grouped products in bfloat16 only. Its public `compiler.disable` would import the compiler here.
_uncompiled = torch._disable_dynamo(grouped_matmul)


def has_kernel(rows: Tensor, weight: Tensor) -> bool:
    """Whether the grouped kernel takes these operands: a known type, and rows of all matrices aligned to 16 bytes."""
    aligned = all(size * rows.element_size() % ALIGNMENT == 0 for size in weight.shape[1:])
    return aligned and _name(rows.dtype) in KINDS[rows.device.type].grouped_matmul


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class _GroupedMatmul(Function):
    """Written out because torch's own backward refuses gradients that are not laid out row by row."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return F.grouped_mm(rows.contiguous(), weight.transpose(1, 2), offs=ends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, weight, ends = ctx.saved_tensors
        need_rows, need_weight = ctx.needs_input_grad[:2]
        grad = grad.contiguous()
        rows_grad = F.grouped_mm(grad, weight, offs=ends) if need_rows else None
        weight_grad = F.grouped_mm(grad.t(), rows.contiguous(), offs=ends) if need_weight else None
        return rows_grad, weight_grad, None
