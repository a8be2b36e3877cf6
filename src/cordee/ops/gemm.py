"""Matrix products, in the faster of the two libraries that torch carries for them.

torch gives float32 products on a CPU to MKL. oneDNN, which it carries for other work, multiplies at twice MKL's rate
on processors where MKL keeps to AVX2; `cordee.device` knows which those are. `linear` and `matmul` use it there, and
are torch's own everywhere else or where `torch.backends.mkldnn.enabled` is off."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from cordee.device import prefers_onednn
from cordee.log import info_once

WORTHWHILE = 1 << 20  # multiply-adds of a product below which the start of oneDNN's kernel costs more than it gains
PART_BYTES = 1 << 24  # of a product that is added to a sum
Before = Callable[[Tensor], Tensor]  # a cheap function of the input alone


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, before: Before | None = None) -> Tensor:
    """x W^T + b as F.linear: x `[..., in]`, weight `[out, in]`, bias `[out]`; in oneDNN differentiable once.

    With a cheap function `before` of x alone it is before(x) W^T + b, differentiable once; autograd then keeps x and
    not before(x), which is made again for the backward."""
    if before is not None and torch.compiler.is_compiling():
        x, before = before(x), None  # compiled, it costs no memory
    fast = before is not None or in_onednn(x, weight, x.numel() * weight.shape[0])
    if fast and torch.is_grad_enabled():
        return _Linear.apply(x, weight, bias, before)
    return _product(x if before is None else before(x), weight, bias)


def fixed_linear(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor], Tensor]:
    """`linear` of x `[rows, in]` outside of autograd with a weight that stays, for about `rows` rows.

    The library is chosen and the weight transposed only once."""
    if in_onednn(weight, weight, rows * weight.numel()):
        return lambda x: _onednn(x, weight, bias)
    transposed = weight.t()
    return lambda x: torch.mm(x, transposed) if bias is None else torch.addmm(bias, x, transposed)


def fixed_linear_onto(weight: Tensor, bias: Tensor | None, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    """As `fixed_linear`, of x and what the result is added to: residual + x W^T + b."""
    if in_onednn(weight, weight, rows * weight.numel()):
        return lambda x, residual: torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
    product = fixed_linear(weight, bias, rows)
    return lambda x, residual: residual + product(x)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b for matrices `[m, k]` and `[k, n]` of any strides; in oneDNN outside of autograd."""
    return _onednn(a, b.t()) if in_onednn(a, b, a.numel() * b.shape[1]) else a @ b


def transposed_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a^T b for matrices `[k, m]` and `[k, n]`, as `matmul`."""
    if not in_onednn(a, b, a.numel() * b.shape[1]):
        return a.t() @ b
    # oneDNN copies a first operand that is transposed, in one thread: so that is the narrower of the two.
    if a.shape[1] <= b.shape[1]:
        return _onednn(a.t(), b.t())
    return _onednn(b.t(), a.t()).t().contiguous()


class TransposedSum:
    """The sum of a^T b over pairs a `[k, m]`, b `[k, n]` that come one after the other; float32 `[m, n]` of `like`."""

    def __init__(self, like: Tensor):
        self._in_onednn = has_onednn(like)
        # oneDNN wants the narrower operand first (see `transposed_matmul`); the sum is transposed once, at the end.
        self._flipped = self._in_onednn and like.shape[0] > like.shape[1]
        rows, columns = like.shape[::-1] if self._flipped else like.shape
        # oneDNN cannot add to what is there: a product needs memory of its own, which is bounded by making it in parts.
        count = -(-4 * like.numel() // PART_BYTES) if self._in_onednn else 1
        sizes = [len(part) for part in torch.arange(rows).chunk(count)]
        self._parts = [torch.zeros(size, columns, dtype=torch.float32, device=like.device) for size in sizes]

    def add(self, a: Tensor, b: Tensor) -> None:
        if self._flipped:
            a, b = b, a
        for part, rows in zip(self._parts, a.split([len(part) for part in self._parts], 1), strict=True):
            if self._in_onednn or a.dtype != torch.float32:
                part += transposed_matmul(rows, b)
            else:
                part.addmm_(rows.t(), b)

    def times(self, factor: Tensor) -> Tensor:
        """The sum times a scalar; this object is used up."""
        parts, self._parts = self._parts, []
        if len(parts) == 1 and not self._flipped:
            return parts[0].mul_(factor)
        dim = 1 if self._flipped else 0
        rows, columns = sum(map(len, parts)), parts[0].shape[1]
        shape = (columns, rows) if self._flipped else (rows, columns)
        total = torch.empty(shape, dtype=torch.float32, device=parts[0].device)
        for slot in total.split([len(part) for part in parts], dim):
            part = parts.pop(0)
            torch.mul(part.t() if self._flipped else part, factor, out=slot)
        return total


def in_onednn(a: Tensor, b: Tensor, multiply_adds: int) -> bool:
    """Whether a product of `a` and `b` goes to oneDNN."""
    return multiply_adds >= WORTHWHILE and has_onednn(a) and has_onednn(b)


def has_onednn(x: Tensor) -> bool:
    """Whether large products with `x` go to oneDNN."""
    return x.dtype == torch.float32 and _device_takes_onednn(x.device)


@torch.compiler.assume_constant_result
def _device_takes_onednn(device: torch.device) -> bool:
    if not (prefers_onednn(device) and torch.backends.mkldnn.enabled):
        return False
    info_once("Float32 products run in oneDNN, which is faster than MKL on this processor")
    return True


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T for `[..., k]` and `[n, k]`."""
    if not (b.is_contiguous() or b.t().is_contiguous()):
        b = b.contiguous()  # else oneDNN falls back to a loop that is a thousand times slower
    if torch.compiler.is_compiling():
        return _opaque_onednn(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@torch.library.custom_op(
    "cordee::onednn_linear", mutates_args=(), schema="(Tensor a, Tensor b, Tensor? bias) -> Tensor"
)
def _opaque_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """For torch.compile, which would take the operator itself for one of its own and copy transposed weights."""
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


@_opaque_onednn.register_fake
def _(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[0])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b in either library."""
    if in_onednn(x, weight, x.numel() * weight.shape[0]):
        return _onednn(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, before: Before | None) -> Tensor:
        ctx.before = before
        ctx.save_for_backward(x, weight)
        return _product(x if before is None else before(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        factor = x
        if ctx.before is not None:
            x = x.detach().requires_grad_(need_x)
            with torch.enable_grad():
                factor = ctx.before(x)
        rows = grad.reshape(-1, grad.shape[-1])
        weight_grad = transposed_matmul(rows, factor.detach().reshape(-1, factor.shape[-1])) if need_weight else None
        x_grad = matmul(rows, weight).view(factor.shape) if need_x else None
        if need_x and ctx.before is not None:
            (x_grad,) = torch.autograd.grad(factor, x, x_grad)
        return x_grad, weight_grad, rows.sum(0) if need_bias else None, None
