"""No option is accepted and ignored: each is read by code that does not declare it, or said to have no effect."""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path

import pytest

import cordee
from cordee.cli import COMMANDS
from cordee.config.laws import ignored_options, laws_of
from cordee.config.option import options_of
from cordee.train.options import TrainConfig

PACKAGE = Path(cordee.__file__).parent
CONFIGS = list(dict.fromkeys(command.schema for command in COMMANDS.values()))

DECLARING = {Path(inspect.getfile(base)) for config in CONFIGS for base in config.__mro__[:-1]}


@functools.cache
def names_read() -> frozenset[str]:
    """Every attribute and every string in the code that could read an option."""
    found: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        if file in DECLARING:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return frozenset(found)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_option_is_read(config):
    unread = {option.name for option in options_of(config)} - names_read()
    assert unread <= {name for law in laws_of(config) if law.kind in ("ignored", "requires") for name in law.names}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"delay_grad_reduce": True}, ["delay_grad_reduce"]),
        ({"use_glm_rope": True, "rotary_interleaved": True}, ["use_glm_rope", "rotary_interleaved"]),
        ({"overlap_grad_reduce": True, "delay_grad_reduce": False, "zero_stage": 0}, []),
        ({"overlap_grad_reduce": True, "nproc_per_node": 1}, ["overlap_grad_reduce"]),
        ({"overlap_param_gather": True}, []),
        ({"overlap_param_gather": True, "zero_stage": 0}, ["overlap_param_gather"]),
        ({"delay_param_gather": True, "zero_stage": 2}, ["delay_param_gather"]),
        ({"delay_param_gather": True, "zero_stage": 3}, []),
    ],
)
def test_what_changes_nothing_is_told(given: dict, told: list[str]):
    run = TrainConfig(**{"seq_length": 8, "lr": 1e-3, "nproc_per_node": 2, **given})
    assert [name for ignored in ignored_options(run) for name in ignored.names] == told
