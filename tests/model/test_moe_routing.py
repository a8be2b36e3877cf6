"""The router against megatron-core's, brute force and hand computation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cordee.model.config import ModelConfig, NormConfig, RouterConfig
from cordee.model.router import Router, Routing, count_by_expert, rank_in_group

TOKENS, HIDDEN = 33, 16


def build(config: RouterConfig) -> Router:
    norm = NormConfig(kind="rms", eps=1e-6)
    model = ModelConfig(vocab_size=8, hidden_size=HIDDEN, max_position_embeddings=8, layers=(), final_norm=norm)
    torch.manual_seed(0)
    router = Router(config, model)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_()
    return router


def dense(routing: Routing) -> Tensor:
    """Weights as `[tokens, num_experts]`, zero where there is no route."""
    return torch.zeros_like(routing.logits).scatter(1, routing.experts, routing.weights)


@pytest.mark.parametrize(
    ("config", "megatron"),
    [
        (RouterConfig(num_experts=8, top_k=2, score_when="after"), {}),
        (RouterConfig(num_experts=8, top_k=2), {"use_pre_softmax": True}),
        (RouterConfig(num_experts=8, top_k=3, scale=16.0), {"use_pre_softmax": True, "scaling_factor": 16.0}),
        (
            RouterConfig(num_experts=8, top_k=2, num_groups=4, top_groups=2, group_score="max"),
            {"use_pre_softmax": True, "num_groups": 4, "group_topk": 2},  # the sum of the best 2/2 of a group
        ),
        (
            RouterConfig(
                num_experts=8,
                top_k=4,
                score="sigmoid",
                correction_bias=True,
                normalise=True,
                scale=2.5,
                num_groups=2,
                top_groups=2,
                group_score="top2_sum",
            ),
            {"score_function": "sigmoid", "num_groups": 2, "group_topk": 2, "scaling_factor": 2.5},
        ),
        (RouterConfig(num_experts=8, top_k=2, score="sigmoid", normalise=True), {"score_function": "sigmoid"}),
    ],
)
def test_equals_megatron(config, megatron):
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    router = build(config)
    routing = router(torch.randn(TOKENS, HIDDEN))
    probs, routing_map = moe_utils.topk_routing_with_score_function(
        routing.logits, config.top_k, expert_bias=router.correction_bias, **megatron
    )
    torch.testing.assert_close(dense(routing), probs)
    assert torch.equal(dense(routing) != 0, routing_map)


@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_limited_to_groups_by_brute_force(group_score):
    config = RouterConfig(num_experts=12, top_k=4, num_groups=4, top_groups=2, group_score=group_score)
    routing = build(config)(torch.randn(TOKENS, HIDDEN))
    for scores, chosen in zip(routing.logits.softmax(-1), routing.experts, strict=True):
        groups = scores.view(4, 3)
        worth = [group.max() if group_score == "max" else group.sort().values[-2:].sum() for group in groups]
        best = max(itertools.combinations(range(4), 2), key=lambda pair: sum(worth[g] for g in pair))
        allowed = [expert for group in best for expert in range(3 * group, 3 * group + 3)]
        expected = sorted(allowed, key=lambda expert: -scores[expert])[:4]
        assert chosen.tolist() == expected


def test_the_correction_bias_chooses_but_does_not_weigh():
    config = RouterConfig(num_experts=4, top_k=1, score="sigmoid", correction_bias=True)
    router = build(config)
    with torch.no_grad():
        router.correction_bias.copy_(torch.tensor([0.0, 0.0, 2.0, 0.0]))
    routing = router(torch.randn(TOKENS, HIDDEN))
    assert (routing.experts == 2).all()
    torch.testing.assert_close(routing.weights, routing.logits.sigmoid()[:, 2:3])


def test_scores_are_float32_for_half_precision_tokens():
    router = build(RouterConfig(num_experts=4, top_k=2)).bfloat16()
    routing = router(torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16))
    assert routing.logits.dtype == routing.weights.dtype == torch.float32


def test_near_ties_are_decided_in_float32():
    router = build(RouterConfig(num_experts=2, top_k=1)).bfloat16()
    x = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    with torch.no_grad():
        router.weight.fill_(1.0)
        router.weight[1, 0] = 1.0078125  # 16 and 16.0078125 round to the same bfloat16
    assert router(x).experts.item() == 1


def test_count_and_rank():
    experts = torch.tensor([0, 0, 0, 2, 2, 3])
    counts = count_by_expert(experts, 5)
    assert counts.tolist() == [3, 0, 2, 1, 0]
    assert rank_in_group(experts, counts).tolist() == [0, 1, 2, 0, 1, 0]
