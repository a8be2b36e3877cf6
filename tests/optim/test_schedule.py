"""Schedules against Megatron's own scheduler, step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cordee.optim.schedule import Schedule, build_schedule
from cordee.train.options import TrainConfig

GBS = 4


def config(**options) -> TrainConfig:
    return TrainConfig(**{"seq_length": 8, "lr": 3e-3, "min_lr": 1e-4, "train_iters": 20, **options})


def megatron(**arguments):
    module = pytest.importorskip("megatron.core.optimizer_param_scheduler")
    optimizer = SimpleNamespace(param_groups=[{}])
    defaults = {
        "init_lr": 0.0,
        "max_lr": 3e-3,
        "min_lr": 1e-4,
        "lr_warmup_steps": 0,
        "lr_decay_steps": 20 * GBS,
        "lr_decay_style": "linear",
        "start_wd": 0.01,
        "end_wd": 0.01,
        "wd_incr_steps": 20 * GBS,
        "wd_incr_style": "constant",
    }
    return module.OptimizerParamScheduler(optimizer, **{**defaults, **arguments}), optimizer.param_groups[0]


CASES = {
    "linear": ({}, {}),
    "cosine": ({"lr_decay_style": "cosine"}, {"lr_decay_style": "cosine"}),
    "constant": ({"lr_decay_style": "constant"}, {"lr_decay_style": "constant"}),
    "inverse": (
        {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 3},
        {"lr_decay_style": "inverse-square-root", "lr_warmup_steps": 3 * GBS},
    ),
    "inverse without warm-up": (
        {"lr_decay_style": "inverse-square-root"},
        {"lr_decay_style": "inverse-square-root"},
    ),
    "warm-up from above zero": (
        {"lr_warmup_iters": 5, "lr_warmup_init": 1e-5},
        {"lr_warmup_steps": 5 * GBS, "init_lr": 1e-5},
    ),
    "warm-up fraction": (
        {"lr_warmup_fraction": 0.13, "lr_decay_style": "cosine"},
        {"lr_warmup_steps": 0.13 * 20 * GBS, "lr_decay_style": "cosine"},
    ),
    "decay ends before the run": ({"lr_decay_iters": 11}, {"lr_decay_steps": 11 * GBS}),
    "in samples": (
        {"train_iters": None, "train_samples": 80, "lr_decay_samples": 70, "lr_warmup_samples": 9},
        {"lr_decay_steps": 70, "lr_warmup_steps": 9},
    ),
    "weight decay linear": (
        {"weight_decay_incr_style": "linear", "start_weight_decay": 0.01, "end_weight_decay": 0.1},
        {"wd_incr_style": "linear", "end_wd": 0.1},
    ),
    "weight decay cosine": (
        {"weight_decay_incr_style": "cosine", "start_weight_decay": 0.01, "end_weight_decay": 0.1},
        {"wd_incr_style": "cosine", "end_wd": 0.1},
    ),
}


def scheduled(options: TrainConfig) -> Schedule:
    return build_schedule(options, options.train_iters, options.train_samples, GBS)


@pytest.mark.parametrize("case", CASES)
def test_equals_megatron(case: str):
    ours, theirs = CASES[case]
    schedule = scheduled(config(**ours))
    peer, group = megatron(**theirs)
    for step in range(25):
        assert schedule.learning_rate(step * GBS) == pytest.approx(group["lr"], rel=1e-12, abs=0)
        assert schedule.weight_decay(step * GBS) == pytest.approx(group["weight_decay"], rel=1e-12, abs=0)
        peer.step(GBS)


def test_own_limits_of_a_group():
    schedule = scheduled(config())
    assert schedule.learning_rate(0, max_lr=1.0, min_lr=0.5) == 1.0
    assert schedule.learning_rate(10**6, max_lr=1.0, min_lr=0.5) == 0.5
