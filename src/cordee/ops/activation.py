"""Activations of the MLP, plain and gated.

The gated forms take gate and up as they leave one GEMM and keep only that for the backward."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


SIGMOID_SLOPE = 1.702  # of GPT-OSS: x * sigmoid(1.702 x) is close to GELU (Hendrycks & Gimpel 2016)


def gated_reference(gate_up: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """act(gate) * up from `[..., 2 * ffn]`, gate first; gives `[..., ffn]`. `limit` belongs to "swiglu_clamped"."""
    gate, up = gate_up.chunk(2, -1)
    if activation == "swiglu_clamped":
        assert limit is not None
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(SIGMOID_SLOPE * gate) * (up + 1)
    return ACTIVATIONS[activation](gate) * up


def gated(gate_up: Tensor, activation: str, limit: float | None = None) -> Tensor:
    """As `gated_reference`; SiLU keeps only its input for the backward."""
    if activation != "silu" or torch.compiler.is_compiling() or not gate_up.requires_grad:
        return gated_reference(gate_up, activation, limit)
    return _SwiGLU.apply(gate_up)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        gate_grad, up_grad = out.chunk(2, -1)
        torch.mul(grad, F.silu(gate), out=up_grad)
        torch.mul(grad, up, out=gate_grad)
        gate_grad.copy_(torch.ops.aten.silu_backward(gate_grad, gate))
        return out
