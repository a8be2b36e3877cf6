"""Tasks, one after the other, on one model.

Owns their order, the progress shown and the two forms of the results: a table and JSON. Knows no task by name."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from rich.table import Table

from cordee.config.spelling import unknown
from cordee.errors import ProblemError, raise_all
from cordee.evaluate.engine import Engine
from cordee.evaluate.finished import Finished
from cordee.evaluate.options import EvaluateOptions
from cordee.evaluate.requests import Encoder, Request
from cordee.evaluate.task import Result, Subject, Task, all_tasks
from cordee.generate.results import NewFile
from cordee.log import console, counted, logger, progress_bar
from cordee.model.config import ModelConfig


def tasks_of(options: EvaluateOptions, model: ModelConfig | None) -> list[Task]:
    """The tasks of --task. ProblemError for unknown names, and for all that the tasks find wrong."""
    known = all_tasks()
    wrong = [unknown("--task", name, known, "there is no such task") for name in options.task if name not in known]
    chosen = [known[name] for name in dict.fromkeys(options.task) if name in known]
    raise_all([*wrong, *(problem for task in chosen for problem in task.check(options, model))])
    return chosen


def run_tasks(
    tasks: Sequence[Task], subject: Subject, options: EvaluateOptions, finished: Finished | None = None
) -> list[Result]:
    """The result of each task. A bar on the terminal shows the progress.

    finished: results of requests that were answered before, to which those of this run are added."""
    engine = Engine(subject, options.evaluation_batch_size, finished)
    results = []
    for task in tasks:
        with progress_bar(task.name, shown=subject.speaks) as progress:
            results.append(_run(task, subject, engine, options, progress))
    return results


def _run(
    task: Task, subject: Subject, engine: Engine, options: EvaluateOptions, progress: Callable[[float], None]
) -> Result:
    config = subject.model.config
    window = options.seq_length or config.context_length
    encoder = Encoder(subject.tokenizer, window, vocab_size=config.vocab_size, prepend_bos=options.prepend_bos)
    result = task.score(engine.answers(_asked(task, subject, encoder, options), progress), options)
    if not encoder.truncated:
        return result
    cut = counted(encoder.truncated, "request")
    logger.warning("%s: %s cut at the left to %s", task.name, cut, counted(window, "token"))
    return replace(result, metrics={**result.metrics, "truncated": encoder.truncated})


def _asked(
    task: Task, subject: Subject, encoder: Encoder, options: EvaluateOptions
) -> Iterator[tuple[Any, Sequence[Request]]]:
    """The documents with what is asked about each, whose number is in the problems that it has."""
    for number, doc in enumerate(task.docs(subject, options), 1):
        try:
            requests = task.requests(doc, encoder, options)
        except ProblemError as error:
            named = [replace(problem, place=f"document {number} of {task.name}") for problem in error.problems]
            raise ProblemError(named, error.everywhere) from error
        yield doc, requests


def table(result: Result) -> Table:
    """Metrics as columns, parts as rows, the whole last."""
    rows = {**result.parts, "total": result.metrics} if len(result.parts) > 1 else result.parts or {"": result.metrics}
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    shown = Table(title=result.task, title_justify="left")
    shown.add_column("", overflow="fold")
    for name in names:
        shown.add_column(name.replace("_", " "), justify="right")
    for part, metrics in rows.items():
        shown.add_row(part, *(_number(metrics[name]) if name in metrics else "" for name in names))
    return shown


def show(results: Sequence[Result]) -> None:
    for result in results:
        console().print(table(result))


def write(path: str, model: str, results: Sequence[Result]) -> None:
    """Write the results as one JSON object to a new file."""
    content = {"model": model, "results": [{"task": r.task, "metrics": r.metrics, "parts": r.parts} for r in results]}
    with closing(NewFile(path)) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False))


def _number(value: float | int) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
