"""Mixture-of-experts blocks against those of transformers, and dispatch against the loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from cordee.model.config import CapacityConfig, MLPConfig, MoEConfig
from cordee.model.moe import MoE, Rows, local_dispatch, loop_dispatch
from cordee.model.parameter import parameter_specs
from cordee.model.router import Routing, limit_to_capacity
from tests.model.moe_cases import CASES, EXPERTS, FFN, HIDDEN, build, mlp, randomise, router

DISPATCHES = [local_dispatch, loop_dispatch]


def copy_into(block: MoE, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.copy_(values[name])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name, dispatch):
    case = CASES[name]
    torch.manual_seed(3)
    original, block = case.block(), build(case.config)
    randomise(original)
    parameters = dict(original.named_parameters())
    values = case.canonical(parameters | dict(original.named_buffers()))
    assert values.keys() == dict(block.named_parameters()).keys()
    copy_into(block, values)
    block.placement.replace("dispatch", "test", dispatch)
    x = torch.randn(2, 21, HIDDEN)
    x_original, x_own = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = case.output(original(x_original)).view_as(x)
    result = block(x_own)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)

    upstream = torch.randn_like(x)
    expected.backward(upstream)
    result.backward(upstream)
    torch.testing.assert_close(x_own.grad, x_original.grad, atol=1e-4, rtol=1e-4)
    of_original = {name: p.grad for name, p in parameters.items()}
    of_original |= {name: torch.zeros_like(b) for name, b in original.named_buffers()}
    of_original = case.canonical(of_original)
    for key, gradient in gradients(block).items():
        torch.testing.assert_close(gradient, of_original[key], atol=1e-4, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", CASES)
def test_dispatch_equals_the_loop_in_bfloat16(name):
    block = build(CASES[name].config, torch.bfloat16)
    x = torch.randn(1, 9, HIDDEN, dtype=torch.bfloat16)
    grouped = block(x)
    block.placement.replace("dispatch", "test", loop_dispatch)
    torch.testing.assert_close(grouped, block(x), atol=0.05, rtol=0.05)
    assert grouped.dtype == torch.bfloat16


@pytest.mark.parametrize("weight_input", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("capacity", [None, (0.5, False), (0.5, True), (3.0, True)])
def test_dispatch_equals_the_loop(gated, bias, weight_input, capacity):
    expert = MLPConfig(ffn_hidden_size=FFN, activation="gelu", gated=gated, bias=bias)
    limits = None if capacity is None else CapacityConfig(factor=capacity[0], pad=capacity[1])
    config = MoEConfig(router=router(2, normalise=True), expert=expert, weight_input=weight_input, capacity=limits)
    x = torch.randn(2, 11, HIDDEN)
    results = []
    for dispatch in DISPATCHES:
        block = build(config)
        block.placement.replace("dispatch", "test", dispatch)
        inputs = x.clone().requires_grad_()
        y = block(inputs)
        y.square().sum().backward()
        results.append([y, inputs.grad, *gradients(block).values()])
    for grouped, loop in zip(*results, strict=True):
        torch.testing.assert_close(grouped, loop, atol=1e-5, rtol=1e-4)


def test_experts_without_tokens_get_zero_gradients():
    block = build(MoEConfig(router=router(1), expert=mlp(FFN, bias=True)))
    with torch.no_grad():
        block.router.weight.zero_()
        block.router.weight[5] = 10.0
    x = torch.rand(1, 4, HIDDEN)  # positive: the fifth expert always wins
    block(x).sum().backward()
    for parameter in block.experts.parameters():
        idle = torch.arange(EXPERTS) != 5
        assert parameter.grad[idle].count_nonzero() == 0
        assert parameter.grad[5].count_nonzero() > 0


def test_a_single_token():
    block = build(MoEConfig(router=router(2), expert=mlp(FFN)))
    x = torch.randn(1, 1, HIDDEN)
    torch.testing.assert_close(block(x), block(x.expand(3, 1, HIDDEN))[:1])


def test_canonical_names_and_axes():
    config = MoEConfig(
        router=router(2, bias=True, correction_bias=True), expert=mlp(FFN, bias=True), shared=mlp(20), shared_gate=True
    )
    specs = parameter_specs(build(config))
    assert {name: (spec.shape, spec.axes) for name, spec in specs.items()} == {
        "router.weight": ((EXPERTS, HIDDEN), ("choice", "embed")),
        "router.bias": ((EXPERTS,), ("choice",)),
        "router.correction_bias": ((EXPERTS,), ("choice",)),
        "experts.gate_up.weight": ((EXPERTS, 2, FFN, HIDDEN), ("expert", "branch", "ffn", "embed")),
        "experts.gate_up.bias": ((EXPERTS, 2, FFN), ("expert", "branch", "ffn")),
        "experts.down.weight": ((EXPERTS, HIDDEN, FFN), ("expert", "embed", "ffn")),
        "experts.down.bias": ((EXPERTS, HIDDEN), ("expert", "embed")),
        "shared.gate_up.weight": ((2, 20, HIDDEN), ("branch", "ffn", "embed")),
        "shared.down.weight": ((HIDDEN, 20), ("embed", "ffn")),
        "shared_gate.weight": ((1, HIDDEN), ("gate", "embed")),
    }
    assert [name for name, spec in specs.items() if not spec.trained] == ["router.correction_bias"]


def test_the_correction_bias_is_not_trained():
    block = build(CASES["deepseek_v3"].config)
    block(torch.randn(1, 5, HIDDEN)).sum().backward()
    assert block.router.correction_bias.grad is None
    assert not block.router.correction_bias.requires_grad


def routing_of(experts: list[list[int]], weights: list[list[float]], num_experts: int) -> Routing:
    return Routing(torch.zeros(len(experts), num_experts), torch.tensor(experts), torch.tensor(weights))


def test_rows_are_sorted_by_expert():
    rows = Rows.of(routing_of([[2, 0], [0, 1], [2, 1]], [[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]], 4))
    assert rows.counts.tolist() == [2, 2, 2, 0]
    assert rows.token.tolist() == [0, 1, 1, 2, 0, 2]
    torch.testing.assert_close(rows.weights, torch.tensor([0.4, 0.7, 0.3, 0.2, 0.6, 0.8]))


@pytest.mark.parametrize(("drop", "kept"), [("position", [0, 1, 4]), ("probs", [1, 3, 4])])
def test_capacity_of_a_hand_computed_case(drop, kept):
    # Five tokens, one expert each, two experts, factor 0.8: ceil(5 * 1 / 2 * 0.8) = 2 tokens an expert.
    routing = routing_of([[0], [0], [0], [0], [1]], [[0.2], [0.9], [0.1], [0.5], [0.3]], 2)
    limited = limit_to_capacity(routing, CapacityConfig(factor=0.8, drop=drop))
    assert limited.kept.flatten().nonzero().flatten().tolist() == kept
    rows = Rows.of(limited)
    assert rows.counts.tolist() == [2, 1]
    assert rows.token.tolist() == kept


def test_padding_to_capacity_of_a_hand_computed_case():
    # Three tokens, two experts each, three experts, factor 1: two rows an expert. Expert 0 has three tokens.
    routing = routing_of([[0, 1], [0, 2], [0, 1]], [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]], 3)
    limited = limit_to_capacity(routing, CapacityConfig(factor=1.0, pad=True))
    assert limited.kept.tolist() == [[True, True], [False, True], [True, True]]
    rows = Rows.of(limited)
    assert rows.counts.tolist() == [2, 2, 2]
    assert rows.token.tolist() == [0, 2, 0, 2, 1, 3]  # 3: no token
    torch.testing.assert_close(rows.weights, torch.tensor([0.9, 0.7, 0.1, 0.3, 0.4, 0.0]))


def test_the_published_capacity_example():
    # T=8 tokens, k=2, E=4, factor 1.1: ceil(16 / 4 * 1.1) = 5.
    experts = [[0, 1]] * 8
    limited = limit_to_capacity(routing_of(experts, [[0.5, 0.5]] * 8, 4), CapacityConfig(factor=1.1))
    assert limited.kept.sum(0).tolist() == [5, 5]


@pytest.mark.parametrize("pad", [False, True])
def test_dropping_by_weight_equals_megatron(pad):
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    torch.manual_seed(0)
    tokens, top_k, factor = 40, 2, 0.7
    logits = torch.randn(tokens, EXPERTS)
    weights, experts = logits.softmax(-1).topk(top_k)
    limited = limit_to_capacity(Routing(logits, experts, weights), CapacityConfig(factor=factor, pad=pad))
    probs = torch.zeros_like(logits).scatter(1, experts, weights)
    expected, _ = moe_utils.apply_router_token_dropping(probs, probs > 0, top_k, factor, "probs", pad)
    own = torch.zeros_like(logits).scatter(1, experts, weights * limited.kept)
    torch.testing.assert_close(own, expected)


def test_capacity_cuts_in_training_only():
    config = MoEConfig(router=router(2), expert=mlp(FFN), capacity=CapacityConfig(factor=0.25))
    block = build(config)
    free = build(MoEConfig(router=router(2), expert=mlp(FFN)))
    x = torch.randn(2, 16, HIDDEN)
    assert not torch.equal(block(x), free(x))
    assert torch.equal(block.eval()(x), free(x))


def test_the_compiled_block_equals_the_plain_one():
    config = CASES["qwen2_moe"].config
    block = build(config)
    x = torch.randn(2, 7, HIDDEN)
    expected = block(x)
    block.compile(dynamic=False, backend="aot_eager")
    torch.testing.assert_close(block(x), expected)
