"""Rotary positions on halves of the head dim, forward and backward.

`rotate_reference` is the definition (Su et al. 2021, in the half-split order of published checkpoints);
`rotate` does the same with fewer passes over memory and keeps nothing but the angles for the backward.
`split_rotated` also takes apart what comes out of one projection as queries, keys and values."""

import torch
from torch import Tensor
from torch.autograd import Function


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x `[..., head_dim]` by angles given as cos, sin `[..., rotary_dim / 2]`, which broadcast.

    Of the first `rotary_dim` dims, dims j and j + rotary_dim / 2 rotate together; the others stay."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `rotate_reference`."""
    if x.dtype != torch.float32 or torch.compiler.is_compiling():
        return rotate_reference(x, cos, sin)
    return _Rotate.apply(x, cos, sin) if torch.is_grad_enabled() else _rotate(x, cos, sin, 1.0)


def split_rotated(qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q `[batch, seq, groups, q heads, head_dim]` and k, v `[batch, seq, groups, head_dim]`, q and k rotated.

    `qkv` is `[batch, seq, groups, q heads + 2, head_dim]`. In training the three are copies, so that `qkv` itself need
    not be kept, and its gradient is assembled once."""
    if qkv.dtype == torch.float32 and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _SplitRotated.apply(qkv, cos, sin)
    qk = rotate(qkv[..., :-1, :], cos, sin)
    return qk[..., :-1, :], qk[..., -1, :], qkv[..., -1, :]


class _Rotate(Function):
    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, sin, -1.0), None, None


class _SplitRotated(Function):
    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        q, k, v = _slots(qkv)
        v = v.squeeze(3).clone(memory_format=torch.contiguous_format)
        return _rotate(q, cos, sin, 1.0), _rotate(k, cos, sin, 1.0).squeeze(3), v

    @staticmethod
    def backward(ctx, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor):
        cos, sin = ctx.saved_tensors
        batch, seq, groups, heads, dim = q_grad.shape
        grad = torch.empty(batch, seq, groups, heads + 2, dim, dtype=q_grad.dtype, device=q_grad.device)
        q, k, v = _slots(grad)
        _rotate(q_grad, cos, sin, -1.0, q)
        _rotate(k_grad.unsqueeze(3), cos, sin, -1.0, k)
        v.copy_(v_grad.unsqueeze(3))
        return grad, None, None


def _slots(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v, each with a dim of slots."""
    return qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1:, :]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, direction: float, out: Tensor | None = None) -> Tensor:
    """x rotated by the angles, or back by them for `direction` -1, in `out` or new memory."""
    half = cos.shape[-1]
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    first, second = x[..., :half], x[..., half : 2 * half]
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-direction)
    torch.mul(second, cos, out=out[..., half : 2 * half]).addcmul_(first, sin, value=direction)
    if x.shape[-1] > 2 * half:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out
