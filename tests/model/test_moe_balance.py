"""Auxiliary losses against hand computation, transformers and megatron-core, and how their gradients enter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cordee.model.balance import Balance, auxiliary_losses, balanced, probabilities, token_sums
from cordee.model.config import BalanceConfig, CapacityConfig, MoEConfig, RouterConfig
from cordee.model.router import Routing
from tests.model.moe_cases import FFN, HIDDEN, build, mlp, router

EXPERTS, TOP_K = 8, 2


def random_routing(
    tokens: int, top_k: int = TOP_K, score: str = "softmax", seed: int = 0
) -> tuple[Routing, RouterConfig]:
    torch.manual_seed(seed)
    logits = torch.randn(tokens, EXPERTS, requires_grad=True)
    config = RouterConfig(num_experts=EXPERTS, top_k=top_k, score=score)
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    weights, experts = scores.topk(top_k)
    return Routing(logits, experts, weights), config


def losses_of(routing: Routing, config: RouterConfig, balance: BalanceConfig, batch_size: int = 1, counted=None):
    return auxiliary_losses(token_sums(routing, config, balance, batch_size, counted), config, balance)


def test_expert_loss_of_a_hand_computed_case():
    # Two tokens, two experts, top 1. P = (0.7, 0.3), f = 2 * (1, 0): the loss is 2 * 0.7.
    logits = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    routing = Routing(logits, torch.tensor([[0], [0]]), torch.tensor([[0.8], [0.6]]))
    config = RouterConfig(num_experts=2, top_k=1)
    losses = losses_of(routing, config, BalanceConfig(z=1.0))
    torch.testing.assert_close(losses["load_balancing_loss"], torch.tensor(1.4))
    torch.testing.assert_close(losses["z_loss"], torch.tensor(0.0))  # the logsumexp of log probabilities is zero


def test_device_and_communication_loss_of_a_hand_computed_case():
    # Four experts on two devices, two tokens, top 2. Token 0 takes experts 0 and 1, token 1 takes 1 and 2.
    probs = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.1, 0.4, 0.3, 0.2]])
    routing = Routing(probs.log(), torch.tensor([[0, 1], [1, 2]]), probs[:, :2])
    config = RouterConfig(num_experts=4, top_k=2)
    losses = losses_of(routing, config, BalanceConfig(device=1.0, communication=1.0, num_devices=2, top_devices=1))
    # f = 4 / (2 * 2) * (1, 2, 1, 0); P = (0.25, 0.35, 0.25, 0.15); of devices 0.6 and 0.4.
    torch.testing.assert_close(losses["load_balancing_loss"], torch.tensor(0.25 + 0.7 + 0.25))
    torch.testing.assert_close(losses["device_balancing_loss"], torch.tensor(1.5 * 0.6 + 0.5 * 0.4))
    # Device 0 gets both tokens, device 1 one of them: 2 / (1 * 2) * (2, 1).
    torch.testing.assert_close(losses["communication_balancing_loss"], torch.tensor(2 * 0.6 + 1 * 0.4))


def test_even_routing_costs_one():
    logits = torch.zeros(EXPERTS, EXPERTS)
    experts = torch.stack([torch.arange(EXPERTS), (torch.arange(EXPERTS) + 1) % EXPERTS], 1)
    routing = Routing(logits, experts, torch.full((EXPERTS, 2), 0.125))
    config = RouterConfig(num_experts=EXPERTS, top_k=2)
    balance = BalanceConfig(device=1.0, num_devices=4)
    for loss in losses_of(routing, config, balance).values():
        torch.testing.assert_close(loss, torch.tensor(1.0))


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_expert_loss_equals_transformers(top_k, padded):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routing, config = random_routing(24, top_k)
    mask = torch.ones(2, 12, dtype=torch.int64)
    if padded:
        mask[1, 7:] = 0
    expected = load_balancing_loss_func((routing.logits,), EXPERTS, top_k, mask)
    loss = losses_of(routing, config, BalanceConfig(), 2, mask.flatten().bool())["load_balancing_loss"]
    torch.testing.assert_close(top_k * loss, expected)  # transformers does not divide the visits by top-k
    (own,) = torch.autograd.grad(top_k * loss, routing.logits)
    (theirs,) = torch.autograd.grad(expected, routing.logits)
    torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_expert_and_z_loss_equal_megatron(score):
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    routing, config = random_routing(24, score=score)
    routing_map, scores = moe_utils.compute_routing_scores_for_aux_loss(routing.logits, TOP_K, score)
    losses = losses_of(routing, config, BalanceConfig(z=1.0))
    torch.testing.assert_close(scores, probabilities(routing.logits, config))
    expected = moe_utils.switch_load_balancing_loss_func(scores, routing_map.sum(0), 24, TOP_K, EXPERTS, 1.0)
    torch.testing.assert_close(losses["load_balancing_loss"], expected)
    torch.testing.assert_close(losses["z_loss"], moe_utils.z_loss_func(routing.logits, 1.0))


def test_per_sequence_is_the_mean_over_sequences():
    routing, config = random_routing(30)
    balance = BalanceConfig(per_sequence=True, device=1.0, communication=1.0, num_devices=4, top_devices=2, z=1.0)
    whole = losses_of(routing, config, balance, batch_size=3)
    parts = []
    for start in (0, 10, 20):
        rows = slice(start, start + 10)
        parts.append(
            losses_of(Routing(routing.logits[rows], routing.experts[rows], routing.weights[rows]), config, balance)
        )
    for name, loss in whole.items():
        torch.testing.assert_close(loss, torch.stack([part[name] for part in parts]).mean())
    assert not torch.isclose(
        whole["load_balancing_loss"],
        losses_of(routing, config, replace(balance, per_sequence=False), 3)["load_balancing_loss"],
    )


def test_a_sequence_of_padding_alone_is_finite():
    routing, config = random_routing(8)
    counted = torch.tensor([True] * 4 + [False] * 4)
    balance = BalanceConfig(per_sequence=True, z=1.0)
    for loss in losses_of(routing, config, balance, 2, counted).values():
        assert loss.isfinite()


def test_split_tokens_add_up():
    """Two processes that hold half of the tokens each find the same losses, and each the gradients of its half."""
    routing, config = random_routing(20)
    balance = BalanceConfig(expert=1.0, communication=1.0, num_devices=4, top_devices=2, z=1.0)
    sums = token_sums(routing, config, balance, 1)
    expected = sum(auxiliary_losses(sums, config, balance).values())
    (whole,) = torch.autograd.grad(expected, routing.logits)
    halves = []
    for rows in (slice(0, 10), slice(10, 20)):
        logits = routing.logits.detach()[rows].requires_grad_()
        half = Routing(logits, routing.experts[rows], routing.weights[rows])
        mine = token_sums(half, config, balance, 1)
        reduced = mine + (sums - mine).detach()  # a sum over processes whose backward changes nothing
        loss = sum(auxiliary_losses(reduced, config, balance).values())
        torch.testing.assert_close(loss, expected)
        halves.append(torch.autograd.grad(loss, logits)[0])
    torch.testing.assert_close(torch.cat(halves), whole)


BALANCE = BalanceConfig(expert=0.02, device=0.05, communication=0.02, num_devices=4, top_devices=2, z=0.001)


def gradients(config: MoEConfig, x: Tensor, balance: Balance | None, main: float = 1.0, recompute: bool = False):
    """Gradients of `main` times a loss of a block of our own by its parameters and its input."""
    block = build(config)
    x = x.clone().requires_grad_()
    y = checkpoint(block, x, balance, use_reentrant=False) if recompute else block(x, balance)
    (main * y.square().sum()).backward()
    return [x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


def explicit_gradients(config: MoEConfig, x: Tensor, scale: float):
    """Gradients of the loss and, written out, `scale` times each coefficient times its auxiliary loss."""
    block = build(config)
    x = x.clone().requires_grad_()
    routing = block.router(x.flatten(0, 1))
    c = config.balance
    losses = losses_of(routing, config.router, c, len(x))
    weighed = [c.expert, c.device, c.communication, c.z]
    total = block(x).square().sum() + scale * sum(w * loss for w, loss in zip(weighed, losses.values(), strict=True))
    total.backward()
    return [x.grad, *(p.grad for p in block.parameters() if p.grad is not None)]


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_are_scale_times_coefficient_times_loss(per_sequence, recompute):
    config = MoEConfig(router=router(2), expert=mlp(FFN), balance=replace(BALANCE, per_sequence=per_sequence))
    x = torch.randn(3, 7, HIDDEN)
    own = gradients(config, x, Balance(scale=21.0), recompute=recompute)
    for gradient, expected in zip(own, explicit_gradients(config, x, 21.0), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_gradients_do_not_depend_on_how_the_main_loss_is_scaled():
    config = MoEConfig(router=router(2), expert=mlp(FFN), balance=BALANCE)
    x = torch.randn(3, 7, HIDDEN)
    only = gradients(config, x, Balance(scale=5.0), main=0.0)
    for main in (1.0, 1000.0):
        plain = gradients(config, x, None, main=main)
        both = gradients(config, x, Balance(scale=5.0), main=main)
        for a, b, c in zip(plain, both, only, strict=True):
            torch.testing.assert_close(a + c, b, atol=1e-5 * main, rtol=1e-4)


def test_micro_batches_weigh_by_their_tokens():
    """Scales of weight / global weight make the mean of the auxiliary losses, by weight."""
    config = MoEConfig(router=router(2), expert=mlp(FFN), balance=BALANCE)
    block = build(config)
    parts = torch.randn(3, 7, HIDDEN).split([1, 2])
    total = torch.zeros(())
    for part in parts:
        routing = block.router(part.flatten(0, 1))
        losses = losses_of(routing, config.router, config.balance, len(part)).values()
        weighed = zip([BALANCE.expert, BALANCE.device, BALANCE.communication, BALANCE.z], losses, strict=True)
        total = total + len(part) / 3 * sum(w * loss for w, loss in weighed)
    (expected,) = torch.autograd.grad(total, block.router.weight)
    for part in parts:
        (block(part, Balance(scale=len(part) / 3)) * 0).sum().backward()
    torch.testing.assert_close(block.router.weight.grad, expected, atol=1e-7, rtol=1e-4)


def test_a_scale_may_be_filled_after_the_forward():
    config = MoEConfig(router=router(2), expert=mlp(FFN), balance=BALANCE)
    x = torch.randn(2, 5, HIDDEN)
    block, scale = build(config), torch.zeros(())
    y = block(x, Balance(scale))
    scale.fill_(3.0)
    y.square().sum().backward()
    expected = gradients(config, x, Balance(3.0))
    for gradient, other in zip([p.grad for p in block.parameters()], expected[1:], strict=True):
        torch.testing.assert_close(gradient, other)


def test_the_output_does_not_change():
    config = MoEConfig(router=router(2), expert=mlp(FFN), balance=BALANCE)
    block, x = build(config), torch.randn(2, 5, HIDDEN)
    assert torch.equal(block(x), block(x, Balance()))


def test_metrics_are_means_over_layers_and_count_the_dropped():
    limited = MoEConfig(
        router=router(2), expert=mlp(FFN), balance=BalanceConfig(z=0.1), capacity=CapacityConfig(factor=0.5)
    )
    free = replace(limited, balance=BalanceConfig(), capacity=None)
    x = torch.randn(2, 8, HIDDEN)
    balance, each = Balance(), []
    for config, seed in ((limited, 0), (free, 1)):
        block, alone = build(config, seed=seed), Balance()
        for _ in range(2):  # a second forward, as in recomputation, replaces the report of the first
            block(x, balance)
        block(x, alone)
        each.append(alone.metrics())
    metrics = balance.metrics()
    assert metrics.keys() == {"load_balancing_loss", "largest_expert_load", "z_loss", "dropped_fraction"}
    mean = (each[0]["load_balancing_loss"] + each[1]["load_balancing_loss"]) / 2
    torch.testing.assert_close(metrics["load_balancing_loss"], mean)
    assert metrics["z_loss"] == each[0]["z_loss"]
    # 16 tokens, two experts each, eight experts, factor 0.5: two routes an expert are kept of 32.
    assert metrics["dropped_fraction"] >= 0.5
    assert metrics["largest_expert_load"] >= 1.0
    assert Balance().metrics() == {}


def test_without_coefficients_nothing_enters():
    config = MoEConfig(router=router(2), expert=mlp(FFN))
    x = torch.randn(2, 5, HIDDEN)
    for a, b in zip(gradients(config, x, None), gradients(config, x, Balance(7.0)), strict=True):
        torch.testing.assert_close(a, b)


def test_balanced_reduces_before_the_losses():
    routing, config = random_routing(12)
    balance, layer = Balance(), torch.nn.Identity()
    half = BalanceConfig(expert=1.0)
    balanced(routing, config, half, balance, layer=layer, batch_size=1, reduce=lambda sums: 2 * sums)
    doubled = balance.layers[layer]["load_balancing_loss"]  # twice the visits on twice the tokens
    torch.testing.assert_close(doubled, losses_of(routing, config, half)["load_balancing_loss"].detach())
