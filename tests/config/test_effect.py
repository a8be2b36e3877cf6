"""No option is accepted and ignored: each is read by code outside of `cordee.config`, or said to have no effect."""

from __future__ import annotations

import ast
import functools
from dataclasses import replace
from pathlib import Path

import pytest

import cordee
from cordee.config import schema
from cordee.config.check import without_effect
from cordee.config.option import options_of, to_flag

PACKAGE = Path(cordee.__file__).parent
CONFIGS = [getattr(schema, name) for name in dir(schema) if name.endswith("Config")]


@functools.cache
def names_read() -> frozenset[str]:
    """Every attribute and every string in the code that could read an option."""
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        if file.parent == PACKAGE / "config":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return frozenset(found)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_is_read(config):
    ignored = {option.name for option in options_of(config)} - names_read()
    assert all(config is schema.TrainConfig and is_told(name) for name in ignored)


def is_told(name: str) -> bool:
    """Whether a run that is given the switch `name` says that nothing comes of it."""
    run = replace(schema.TrainConfig(seq_length=8, lr=1e-3), **{name: True})
    return any(to_flag(name) in line for line in without_effect(run))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"delay_grad_reduce": True}, ["--delay-grad-reduce"]),
        ({"overlap_grad_reduce": True, "delay_grad_reduce": False, "zero_stage": 0}, []),
        ({"overlap_grad_reduce": True, "nproc_per_node": 1}, ["--overlap-grad-reduce"]),
        ({"overlap_param_gather": True}, []),
        ({"overlap_param_gather": True, "zero_stage": 0}, ["--overlap-param-gather"]),
        ({"delay_param_gather": True, "zero_stage": 2}, ["--delay-param-gather"]),
        ({"delay_param_gather": True, "zero_stage": 3}, []),
    ],
)
def test_when_gradients_and_weights_travel(given: dict, told: list[str]):
    run = schema.TrainConfig(**{"seq_length": 8, "lr": 1e-3, "nproc_per_node": 2, **given})
    lines = list(without_effect(run))
    assert [line.removeprefix("without effect: ").partition(", for")[0] for line in lines] == told
