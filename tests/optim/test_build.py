"""Optimizers: groups, equality of implementations, and the update by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from cordee.config.option import options_of
from cordee.model.parameter import local_shard
from cordee.optim.algorithms import registry, state_of
from cordee.optim.build import build_optimizer, parameter_groups, set_rates
from cordee.train.options import TrainConfig


@dataclass
class Spec:
    decay: bool
    rate: float = 1.0


def toy() -> tuple[nn.Module, dict[str, Spec]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    return model, {name: Spec(p.ndim > 1) for name, p in model.named_parameters()}


def train(optimizer: str, steps: int = 3, fused: bool = True) -> list[torch.Tensor]:
    model, specs = toy()
    config = TrainConfig(seq_length=8, lr=1e-2, optimizer=optimizer, weight_decay=0.1)
    built = build_optimizer(config, model.named_parameters(), specs, fused=fused)
    for step in range(steps):
        set_rates(built, 1e-2 / (step + 1), 0.1)
        model(torch.ones(2, 3)).square().sum().backward()
        built.step()
        built.zero_grad()
    return [p.detach() for p in model.parameters()]


def test_groups_follow_the_description():
    model, specs = toy()
    model[0].bias.requires_grad_(False)
    groups = parameter_groups(model.named_parameters(), specs)
    assert [(g["decays"], [p.ndim for p in g["params"]]) for g in groups] == [(True, [2, 2]), (False, [1, 1, 1])]


def test_rates_spare_what_does_not_decay():
    model, specs = toy()
    optimizer = build_optimizer(TrainConfig(seq_length=8, lr=1.0), model.named_parameters(), specs, fused=True)
    set_rates(optimizer, 0.25, 0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.25, 0.5), (0.25, 0.0)]


def test_every_choice_that_the_help_names_exists_and_the_default_is_one():
    (optimizer,) = (option for option in options_of(TrainConfig) if option.name == "optimizer")
    assert optimizer.default in registry()
    for name in registry():
        assert re.search(rf"\b{name}\b", optimizer.declared.help)


def test_the_implementations_of_an_algorithm_keep_one_state():
    assert state_of("fused_adam") == state_of("foreach_adam") == state_of("adam") != state_of("sgd")
    assert state_of("gone") not in {state_of(name) for name in registry()}


def test_implementations_agree():
    for other in (train("foreach_adam"), train("adam", fused=False), train("adam")):
        for ours, theirs in zip(train("fused_adam"), other, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_adamw_by_hand():
    weight = nn.Parameter(torch.tensor([[2.0]]))
    config = TrainConfig(seq_length=8, lr=0.1, adam_beta1=0.9, adam_beta2=0.99, adam_eps=1e-8)
    optimizer = build_optimizer(config, [("w", weight)], {"w": Spec(True)}, fused=True)
    m = v = 0.0
    value = 2.0
    for step in (1, 2, 3):
        set_rates(optimizer, 0.1, 0.5)
        (weight**2).sum().backward()
        gradient = 2 * value
        optimizer.step()
        optimizer.zero_grad()
        m, v = 0.9 * m + 0.1 * gradient, 0.99 * v + 0.01 * gradient**2
        value -= 0.1 * 0.5 * value
        value -= 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.99**step)) ** 0.5 + 1e-8)
        assert weight.item() == pytest.approx(value, rel=1e-6)


def test_sgd_learns():
    before = toy()[0]
    after = train("sgd")
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after, strict=True))


def two_meshes(rank: int, world_size: int) -> list[tuple[bool, int]]:
    by_shape = {shape: init_device_mesh("cpu", shape) for shape in ((2,), (2, 1))}
    parameters, specs = [], {}
    for index, (mesh, decay) in enumerate([(m, d) for m in by_shape.values() for d in (False, True)]):
        values = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0), *[Replicate()] * (mesh.ndim - 1)])
        parameters.append((f"p{index}", nn.Parameter(values)))
        specs[f"p{index}"] = Spec(decay)
    parameters.append(("plain", nn.Parameter(torch.ones(3))))
    specs["plain"] = Spec(True)
    config = TrainConfig(seq_length=8, lr=1e-2)
    built = build_optimizer(config, parameters, specs, fused=True)
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    built.step()  # torch's fused operator refuses a list over two meshes
    assert all((local_shard(p.detach())[0] < 1).all() for _, p in parameters)
    return [(group["decays"], len(group["params"])) for group in built.param_groups]


def test_each_mesh_has_groups_of_its_own(pool):
    assert pool.run(two_meshes, 2) == [[(True, 1), (True, 1), (True, 1), (False, 1), (False, 1)]] * 2
