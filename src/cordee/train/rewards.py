"""Rewards of what a policy writes, by Python functions of the user.

Owns finding such functions and what they must return. They are the user's own code and run in this process."""

import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cordee.errors import ProblemError
from cordee.train import outputs
from cordee.train.options import TrainConfig

FLAG = "--reward-function"
TEXTS = ("prompts", "completions", "answers")
RewardFunction = Callable[..., Any]  # of lists of texts, by these names; a number for each completion
MOST = 1e15  # of a reward: float32 holds its square
_FAILURES = (Exception, SystemExit)  # a user's code may fail with anything, and must not end a run as if it were done


def load(name: str) -> RewardFunction:
    """The function of MODULE:NAME or FILE.py:NAME, of a module in the current directory too. ProblemError if there is
    none that takes what it is given."""
    place, _, attribute = name.rpartition(":")
    fix = "give it as module:function or path/to/file.py:function, of the arguments prompts, completions and answers"
    try:
        found = getattr(_module(place), attribute)
        inspect.signature(found).bind(**dict.fromkeys(TEXTS))
    except _FAILURES as error:
        why = f"it cannot be used: {type(error).__name__}: {error}"
        raise ProblemError.of(FLAG, name, why, fix, "missing", limit=name) from error
    return found


def _module(place: str) -> Any:
    """It is executed once, however many of its functions are used."""
    if not place.endswith(".py"):
        with _imports_from(Path.cwd()):
            return importlib.import_module(place)
    path = Path(place).resolve()
    if (name := f"cordee rewards {path}") in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # which dataclasses and pickles of it look up
    try:
        with _imports_from(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _imports_from(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def directory(config: TrainConfig) -> Path | None:
    """Where rollouts are kept; None: nowhere, as checkpoints are in a store or not kept."""
    return outputs.place(config, config.rollout_dir, "rollouts")


def called(name: str, function: RewardFunction, texts: Mapping[str, list[str]]) -> list[float]:
    """A reward for each completion. ProblemError if the function raises, or returns anything but finite numbers."""
    try:
        given = function(**{each: [*found] for each, found in texts.items()})
        given = [given] if isinstance(given, (str, Mapping)) else list(given)
    except _FAILURES as error:
        why, fix = f"it raised {type(error).__name__}: {error}", "let it return a list of numbers"
        raise ProblemError.of(FLAG, name, why, fix, "reward") from error
    if len(given) != (count := len(texts["completions"])):
        why, fix = f"it returned {len(given)} rewards for {count} completions", "let it return one for each"
        raise ProblemError.of(FLAG, name, why, fix, "reward")
    found = [_number(reward) for reward in given]
    for reward, value, completion in zip(given, found, texts["completions"], strict=True):
        if not abs(value) < MOST:
            why = f"it returned {reward!r} for the completion {completion[:200]!r}"
            raise ProblemError.of(FLAG, name, why, "let it return a finite number", "reward")
    return found


def _number(reward: Any) -> float:
    """NaN for what is none."""
    try:
        return float(reward)
    except (TypeError, ValueError):
        return math.nan
