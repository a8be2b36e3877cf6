"""The loss scale against Megatron's rule, and what a checkpoint keeps of it."""

from __future__ import annotations

import random

import pytest
import torch

from cordee.optim.precision import LossScaler, build_scaler
from cordee.train.options import TrainConfig


def megatron(monkeypatch, **arguments):
    module = pytest.importorskip("megatron.core.optimizer.grad_scaler")
    real = torch.tensor
    # The peer keeps its scale on a GPU; here that is the CPU.
    monkeypatch.setattr(module.torch, "tensor", lambda *args, device=None, **kwargs: real(*args, **kwargs))
    return module.DynamicGradScaler(growth_factor=2.0, backoff_factor=0.5, **arguments)


@pytest.mark.parametrize("seed", range(5))
def test_equals_megatron(monkeypatch, seed: int):
    ours = LossScaler(scale=2.0**8, dynamic=True, minimum=4.0, window=3, hysteresis=2)
    theirs = megatron(monkeypatch, initial_scale=2.0**8, min_scale=4.0, growth_interval=3, hysteresis=2)
    draw = random.Random(seed)
    seen = set()
    for _ in range(200):
        overflow = draw.random() < 0.3
        ours.update(overflow)
        theirs.update(overflow)
        assert ours.scale == theirs.scale.item()
        seen.add(ours.scale)
    assert len(seen) > 3


def test_state_goes_on_where_it_was():
    first = LossScaler(scale=2.0**8, dynamic=True, window=3)
    for overflow in (True, False, False, True):
        first.update(overflow)
    second = LossScaler(scale=2.0**16, dynamic=True, window=3)
    second.load_state_dict(first.state_dict())
    for overflow in (True, False, False, False, False):
        first.update(overflow)
        second.update(overflow)
        assert first.scale == second.scale


@pytest.mark.parametrize(
    ("options", "scale", "dynamic"),
    [
        ({}, 1.0, False),
        ({"bf16": True}, 1.0, False),
        ({"fp16": True}, 2.0**32, True),
        ({"fp16": True, "loss_scale": 128.0}, 128.0, False),
    ],
)
def test_options(options, scale, dynamic):
    scaler = build_scaler(TrainConfig(seq_length=8, lr=1e-3, **options))
    assert (scaler.scale, scaler.dynamic) == (scale, dynamic)
    if not dynamic:
        scaler.update(True)
        scaler.load_state_dict({"scale": 7.0, "good_steps": 0, "overflows": 0})
        assert scaler.scale == scale
