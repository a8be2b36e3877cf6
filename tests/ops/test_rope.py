from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cordee.ops.rope import rotate, rotate_reference, split_rotated

HEAD_DIM = 12


def inputs(rotary_dim: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x `[batch, seq, heads, head_dim]` and cos, sin of random angles."""
    torch.manual_seed(0)
    angle = torch.randn(2, 5, 1, rotary_dim // 2)
    return torch.randn(2, 5, 3, HEAD_DIM, dtype=dtype), angle.cos(), angle.sin()


@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 8, 2])
def test_reference_turns_the_first_dims_as_transformers_does(rotary_dim):
    x, cos, sin = inputs(rotary_dim)
    twice = [torch.cat((t, t), -1)[:, :, 0] for t in (cos, sin)]
    expected, _ = apply_rotary_pos_emb(x[..., :rotary_dim], x[..., :rotary_dim], *twice, unsqueeze_dim=2)
    turned = rotate_reference(x, cos, sin)
    torch.testing.assert_close(turned[..., :rotary_dim], expected)
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 8, 2])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rotate_is_the_reference_forward_and_backward(rotary_dim, factor):
    """With a factor, cos and sin are no longer of one angle (YaRN)."""
    x, cos, sin = inputs(rotary_dim)
    results = []
    for f in (rotate_reference, rotate):
        leaf = x.clone().requires_grad_()
        y = f(leaf, cos * factor, sin * factor)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


def test_low_precision_is_turned_in_float32():
    x, cos, sin = inputs(HEAD_DIM, torch.bfloat16)
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned, rotate_reference(x.float(), cos, sin).bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("rotary_dim", [HEAD_DIM, 8])
@pytest.mark.parametrize("grad", [True, False])
def test_split_rotated_turns_queries_and_keys_and_leaves_values(heads, rotary_dim, grad):
    torch.manual_seed(0)
    angle = torch.randn(2, 5, 1, 1, rotary_dim // 2)
    cos, sin = angle.cos(), angle.sin()
    qkv = torch.randn(2, 5, 4, heads + 2, HEAD_DIM, requires_grad=grad)
    turned = rotate_reference(qkv, cos, sin)
    expected = (turned[..., :-2, :], turned[..., -2, :], qkv[..., -1, :])
    with torch.set_grad_enabled(grad):
        got = split_rotated(qkv, cos, sin)
    torch.testing.assert_close(got, expected)
    if not grad:
        return
    weights = [torch.randn_like(part) for part in expected]
    ours, theirs = (
        torch.autograd.grad(sum((p * w).sum() for p, w in zip(parts, weights, strict=True)), qkv, retain_graph=True)
        for parts in (got, expected)
    )
    torch.testing.assert_close(ours, theirs)
    (only_keys,) = torch.autograd.grad(got[1].sum(), qkv, retain_graph=True)
    torch.testing.assert_close(only_keys, torch.autograd.grad(expected[1].sum(), qkv, retain_graph=True)[0])
