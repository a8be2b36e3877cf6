"""Defaults of --model: what they are, and that whatever is given goes first."""

from __future__ import annotations

import pytest

from cordee.config import laws
from cordee.config.load import load_config
from cordee.optim import recipe
from cordee.train.options import TrainConfig

SCHEDULE = ("lr_decay_style", "lr_warmup_fraction", "lr_warmup_iters", "min_lr", "weight_decay", "adam_beta2")
MEGATRON = ("linear", None, 0, 0.0, 0.01, 0.999)  # arguments.py of Megatron-LM, but for warm-up which scripts give
LLAMA = ("cosine", 0.01, 0, 1e-5, 0.1, 0.95)  # Touvron et al. 2023, section 2.2; the warm-up is ours


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", MEGATRON),
        ("--load somewhere", MEGATRON),
        ("--model llama2-7b", LLAMA),
        ("--model llama2-7b --lr-warmup-iters 7", ("cosine", None, 7, 1e-5, 0.1, 0.95)),
        ("--model llama2-7b --lr-decay-style linear", ("linear", 0.01, 0, 0.0, 0.1, 0.95)),
        ("--model llama2-7b --lr-decay-style constant", ("constant", 0.01, 0, 0.0, 0.1, 0.95)),
        ("--model llama2-7b --min-lr 0 --weight-decay 0 --adam-beta2 0.99", ("cosine", 0.01, 0, 0.0, 0.0, 0.99)),
        ("--model llama2-7b --optimizer sgd", ("cosine", 0.01, 0, 1e-5, 0.1, 0.999)),
    ],
)
def test_whatever_is_given_goes_before_the_recipe(flags: str, expected: tuple):
    loaded = load_config(TrainConfig, f"--lr 1e-4 --train-iters 5 --seq-length 8 {flags}".split())
    assert tuple(getattr(loaded.config, name) for name in SCHEDULE) == pytest.approx(expected)
    assert not laws.ignored_options(loaded.config)
    if "--model" in flags:
        told = "".join(recipe.notes(loaded.config))
        assert [f"--{name.replace('_', '-')} " in told for name in SCHEDULE] == [
            loaded.origins[name] == "llama2-7b: recipe" for name in SCHEDULE
        ]
    by_recipe = {name for name in SCHEDULE if loaded.origins[name] == "llama2-7b: recipe"}
    assert by_recipe == {
        name
        for name, value, plain in zip(SCHEDULE, expected, MEGATRON, strict=True)
        if "--model" in flags and value != plain and f"--{name.replace('_', '-')} " not in f"{flags} "
    }
