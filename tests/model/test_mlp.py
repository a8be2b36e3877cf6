from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, GptOssConfig, LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2MLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama.modeling_llama import LlamaMLP

from cordee.model.config import MLPConfig
from cordee.model.mlp import MLP
from cordee.ops.activation import gated, gated_reference
from tests.model import tiny

HIDDEN, FFN = 24, 32


def mlp(activation: str, **options) -> MLP:
    return MLP(MLPConfig(ffn_hidden_size=FFN, activation=activation, **options), tiny.config(hidden_size=HIDDEN))


def randomised(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def check(ours: MLP, theirs: nn.Module) -> None:
    x = torch.randn(2, 5, HIDDEN)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


SHAPE = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_attention_heads": 4}
GATED = {
    "silu": (LlamaMLP, LlamaConfig(**SHAPE), "silu", False),
    "silu with biases": (LlamaMLP, LlamaConfig(**SHAPE, mlp_bias=True), "silu", True),
    "gelu": (LlamaMLP, LlamaConfig(**SHAPE, hidden_act="gelu"), "gelu", False),
    "gelu_tanh": (Gemma2MLP, Gemma2Config(**SHAPE), "gelu_tanh", False),
}


@pytest.mark.parametrize(("original", "config", "activation", "bias"), GATED.values(), ids=GATED)
def test_gated(original, config, activation, bias):
    theirs, ours = randomised(original(config)), mlp(activation, gated=True, bias=bias)
    for kind in ("weight", "bias") if bias else ("weight",):
        both = torch.stack([getattr(theirs.gate_proj, kind), getattr(theirs.up_proj, kind)])
        getattr(ours.gate_up, kind).data.copy_(both)
        getattr(ours.down, kind).data.copy_(getattr(theirs.down_proj, kind))
    check(ours, theirs)


@pytest.mark.parametrize(("activation", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_new"), ("relu", "relu")])
@pytest.mark.parametrize("bias", [True, False])
def test_plain(activation, theirs, bias):
    original = randomised(
        nn.Sequential(nn.Linear(HIDDEN, FFN, bias=bias), ACT2FN[theirs], nn.Linear(FFN, HIDDEN, bias=bias))
    )
    ours = mlp(activation, gated=False, bias=bias)
    ours.up.load_state_dict(original[0].state_dict())
    ours.down.load_state_dict(original[2].state_dict())
    check(ours, original)


@pytest.mark.parametrize("limit", [0.7, 7.0])
def test_clamped_swiglu_is_that_of_gpt_oss(limit):
    config = GptOssConfig(hidden_size=HIDDEN, intermediate_size=FFN, num_local_experts=1, num_hidden_layers=1)
    config.swiglu_limit, config.swiglu_alpha = limit, 1.702
    x = torch.randn(5, 2 * FFN) * 4
    gate, up = x.chunk(2, -1)
    expected = GptOssExperts(config)._apply_gate(torch.stack((gate, up), -1).flatten(-2))
    torch.testing.assert_close(gated(x, "swiglu_clamped", limit), expected)
    assert (x.abs() > limit).any()
    config = MLPConfig(ffn_hidden_size=FFN, activation="swiglu_clamped", gated=True, bias=True, limit=limit)
    block = MLP(config, tiny.config(hidden_size=HIDDEN))
    randomised(block)
    hidden = torch.randn(2, 5, HIDDEN) * 4
    torch.testing.assert_close(block(hidden), block.down(gated(block.gate_up(hidden), "swiglu_clamped", limit)))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
def test_fused_is_the_reference_forward_and_backward(activation):
    x = torch.randn(5, 2 * FFN, dtype=torch.float64)
    results = []
    for function in (gated, gated_reference):
        leaf = x.clone().requires_grad_()
        y = function(leaf, activation)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append((y.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])
