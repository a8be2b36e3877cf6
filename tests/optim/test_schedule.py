"""Schedules against Megatron's own scheduler, step by step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cordee.config import laws
from cordee.config.laws import ignored_options
from cordee.optim.schedule import Schedule, build_schedule, problems
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


WSD = {"lr_decay_style": "WSD"}
CASES = {
    "linear": ({}, {}),
    "cosine": ({"lr_decay_style": "cosine"}, {"lr_decay_style": "cosine"}),
    "constant": ({"lr_decay_style": "constant"}, {"lr_decay_style": "constant"}),
    "inverse": (
        {"lr_decay_style": "inverse-square-root", "lr_warmup_iters": 3},
        {"lr_decay_style": "inverse-square-root", "lr_warmup_steps": 3 * GBS},
    ),
    "inverse without warm-up": ({"lr_decay_style": "inverse-square-root"}, {"lr_decay_style": "inverse-square-root"}),
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
    **{
        f"WSD {style}": (
            {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": 7, "lr_warmup_iters": 3},
            {
                "lr_decay_style": "WSD",
                "lr_wsd_decay_style": style,
                "wsd_decay_steps": 7 * GBS,
                "lr_warmup_steps": 3 * GBS,
            },
        )
        for style in ("exponential", "linear", "cosine", "minus_sqrt")
    },
    "WSD that ends before the run": (
        {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5, "lr_decay_iters": 15},
        {
            "lr_decay_style": "WSD",
            "lr_wsd_decay_style": "exponential",
            "wsd_decay_steps": 5 * GBS,
            "lr_decay_steps": 15 * GBS,
        },
    ),
    "WSD in samples": (
        {"train_iters": None, "train_samples": 80, "lr_decay_style": "WSD", "lr_wsd_decay_samples": 30},
        {"lr_decay_style": "WSD", "lr_wsd_decay_style": "exponential", "wsd_decay_steps": 30},
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


# ---- warm-up, stable, decay ------------------------------------------------------------------------------------------

# What is left between peak and minimum after no, a quarter, half, three quarters and all of the decay phase.
LEFT = {
    "exponential": (1, 2**0.75 - 1, 2**0.5 - 1, 2**0.25 - 1, 0),
    "linear": (1, 0.75, 0.5, 0.25, 0),
    "cosine": (1, 0.5 + 0.125**0.5, 0.5, 0.5 - 0.125**0.5, 0),
    "minus_sqrt": (1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5, 0),
}


@pytest.mark.parametrize("style", LEFT)
def test_wsd(style: str):
    """20 steps: 4 of warm-up, 8 stable, 8 of decay, then the minimum."""
    options = {"lr_decay_style": "WSD", "lr_wsd_decay_style": style, "lr_wsd_decay_iters": 8, "lr_warmup_iters": 4}
    schedule = scheduled(config(**options))
    rates = [schedule.learning_rate(step * GBS) for step in range(30)]
    assert rates[:4] == pytest.approx([0, 0.75e-3, 1.5e-3, 2.25e-3])
    assert rates[4:13] == pytest.approx([3e-3] * 9)
    assert rates[12:21:2] == pytest.approx([1e-4 + left * 2.9e-3 for left in LEFT[style]])
    assert rates[20:] == pytest.approx([1e-4] * 10)
    assert rates[12:21] == sorted(rates[12:21], reverse=True)


@pytest.mark.parametrize(
    ("options", "broken"),
    [
        ({}, [("lr_wsd_decay_iters", "missing")]),
        ({"train_iters": None, "train_samples": 80}, [("lr_wsd_decay_samples", "missing")]),
        ({"lr_wsd_decay_iters": 20}, []),
        ({"lr_wsd_decay_iters": 21}, [("lr_wsd_decay_iters", "at most")]),
        ({"lr_wsd_decay_iters": 16, "lr_warmup_iters": 5}, [("lr_wsd_decay_iters", "at most")]),
        ({"lr_wsd_decay_iters": 16, "lr_warmup_fraction": 0.25}, [("lr_wsd_decay_iters", "at most")]),
        ({"lr_wsd_decay_iters": 15, "lr_warmup_fraction": 0.25}, []),
        ({"lr_wsd_decay_iters": 12, "lr_decay_iters": 11}, [("lr_wsd_decay_iters", "at most")]),
    ],
)
def test_what_wsd_needs(options: dict, broken: list):
    given = config(lr_decay_style="WSD", **options)
    found = [*laws.problems(given), *problems(given, given.train_iters, given.train_samples)]
    assert [(problem.subject, problem.kind) for problem in found] == broken


def test_only_wsd_has_a_decay_phase():
    told = ignored_options(config(lr_wsd_decay_iters=4, lr_wsd_decay_style="linear"))
    assert [each.names for each in told] == [("lr_wsd_decay_style", "lr_wsd_decay_iters")]
    phase = {"lr_wsd_decay_iters": 4}
    assert scheduled(config(**phase)).effective() == scheduled(config()).effective()
    wsd = [scheduled(config(lr_decay_style="WSD", lr_wsd_decay_iters=steps)).effective() for steps in (4, 5)]
    assert wsd[0] != wsd[1]
