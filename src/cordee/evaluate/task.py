"""What can be evaluated: the form of a task, of what it is given and of what it finds.

Owns the seam between the runner and the tasks, and the list of tasks. A task says what is asked about each of its
documents and what the answers are worth; how a model answers is the engine's affair."""

import functools
import pkgutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from cordee.errors import Problem
from cordee.evaluate import tasks
from cordee.evaluate.options import EvaluateOptions
from cordee.evaluate.requests import Encoder, Request

if TYPE_CHECKING:
    from cordee.model.config import ModelConfig
    from cordee.model.gpt import GPTModel
    from cordee.parallel.inference import InferenceStage
    from cordee.tokenizer import Tokenizer

Metrics = dict[str, float | int]


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model in evaluation mode, its tokenizer if there is one, and the tokens that end a text.

    `stage`: that of this process, among several that share the model or the work; all of them run the same tasks, and
    find the same."""

    model: "GPTModel"
    tokenizer: "Tokenizer | None"
    stage: "InferenceStage | None" = None
    stop_ids: frozenset[int] = frozenset()

    @property
    def speaks(self) -> bool:
        """Whether this process shows and writes what all have found."""
        return self.stage is None or self.stage.layout.rank == 0


@dataclass(frozen=True)
class Result:
    """What a task has found: metrics over everything, and of each part (a file, a subject) by its name."""

    task: str
    metrics: Metrics
    parts: dict[str, Metrics]


class Doc(Protocol):
    """What a task asks about at once; `done` is the share of all documents up to its end."""

    @property
    def done(self) -> float: ...


class Task(Protocol):
    """`name` is that of `--task`."""

    name: str

    def check(self, options: EvaluateOptions, model: "ModelConfig | None") -> list[Problem]:
        """What is wrong with the options for such a model, if it is known, or with the data, as far as it shows without
        reading it."""
        ...

    def needs_tokenizer(self, options: EvaluateOptions) -> bool: ...

    def docs(self, subject: Subject, options: EvaluateOptions) -> Iterator[Any]:
        """The documents, each a `Doc`, in the same order every time. ProblemError if the data is unusable."""
        ...

    def requests(self, doc: Any, encoder: Encoder, options: EvaluateOptions) -> Sequence[Request]:
        """What is asked about a document."""
        ...

    def score(self, answered: Iterable[tuple[Any, Sequence[Any]]], options: EvaluateOptions) -> Result:
        """What the answers to the requests of each document make. It is computed as they are taken: once, in order."""
        ...


@functools.cache
def all_tasks() -> dict[str, Task]:
    """Every task by its name."""
    modules = (import_module(f"{tasks.__name__}.{info.name}") for info in pkgutil.iter_modules(tasks.__path__))
    return {module.TASK.name: module.TASK for module in modules if hasattr(module, "TASK")}
