"""Rewards of what a policy writes, by Python functions of the user.

Owns finding such functions and what they must return. They are the user's own code and run in this process."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cordee.errors import ProblemError

FLAG = "--reward-function"
RewardFunction = Callable[..., Any]  # of lists of texts, by name; a sequence of numbers


def load(name: str) -> RewardFunction:
    """The function of MODULE:NAME or FILE.py:NAME. ProblemError if there is none."""
    place, _, attribute = name.rpartition(":")
    fix = "give it as module:function or path/to/file.py:function"
    try:
        found = getattr(_module(place), attribute)
    except Exception as error:  # a module of the user may fail with anything
        why = f"it cannot be imported: {type(error).__name__}: {error}"
        raise ProblemError.of(FLAG, name, why, fix, "missing") from error
    if not callable(found):
        raise ProblemError.of(FLAG, name, "it is no function", fix, "missing")
    return found


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    name = f"cordee_rewards_{Path(place).stem}"
    spec = importlib.util.spec_from_file_location(name, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # which dataclasses and pickles of it look up
    spec.loader.exec_module(module)
    return module


def called(name: str, function: RewardFunction, texts: dict[str, list[str]]) -> list[float]:
    """A reward for each completion. ProblemError if the function raises, or returns anything but finite numbers."""
    count = len(texts["completions"])
    try:
        found = [float(reward) for reward in function(**texts)]
        why = f"it returned {len(found)} rewards for {count} completions" if len(found) != count else None
    except Exception as error:  # a function of the user may fail with anything
        why, found = f"it raised {type(error).__name__}: {error}", []
    for reward, completion in zip(found, texts["completions"], strict=False):
        if not math.isfinite(reward):
            why = f"it returned {reward} for the completion {completion[:200]!r}"
    if why is not None:
        fix = "let it return one finite number a completion; what was trained before is saved"
        raise ProblemError.of(FLAG, name, why, fix, "reward")
    return found
