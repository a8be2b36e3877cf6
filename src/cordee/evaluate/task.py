"""What can be evaluated: the form of a task, of what it is given and of what it finds.

Owns the seam between the runner and the tasks, and the list of tasks. A task of questions and answers (documents,
prompts, scores) and a task of likelihoods are alike to the runner: both look at a model and give metrics.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cordee.config.schema import EvaluateOptions
from cordee.errors import Problem
from cordee.evaluate import tasks

if TYPE_CHECKING:
    from cordee.data.tokenizer import Tokenizer
    from cordee.model.config import ModelConfig
    from cordee.model.gpt import GPTModel
    from cordee.parallel.inference import Place

Metrics = dict[str, float | int]


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model in evaluation mode, and its tokenizer if there is one.

    `place`: where this process is among several that share the model or the work; all of them run the same tasks, and
    find the same.
    """

    model: GPTModel
    tokenizer: Tokenizer | None
    place: Place | None = None

    @property
    def speaks(self) -> bool:
        """Whether this process shows and writes what all have found."""
        return self.place is None or self.place.layout.rank == 0


@dataclass(frozen=True)
class Result:
    """What a task has found: metrics over everything, and of each part (a file, a subject) by its name."""

    task: str
    metrics: Metrics
    parts: dict[str, Metrics]


class Task(Protocol):
    """`name` is that of `--task`."""

    name: str

    def check(self, options: EvaluateOptions, model: ModelConfig) -> list[Problem]:
        """What is wrong with the options for such a model, or with the data, as far as it shows without reading it."""
        ...

    def needs_tokenizer(self, options: EvaluateOptions) -> bool: ...

    def run(self, subject: Subject, options: EvaluateOptions, progress: Callable[[float], None]) -> Result:
        """Evaluate; `progress` is told the share that is done, from 0 to 1. ProblemError if the data is unusable."""
        ...


@functools.cache
def all_tasks() -> dict[str, Task]:
    """Every task by its name."""
    modules = (
        importlib.import_module(f"{tasks.__name__}.{info.name}") for info in pkgutil.iter_modules(tasks.__path__)
    )
    found = [module.TASK for module in modules if hasattr(module, "TASK")]
    return {task.name: task for task in found}
