"""`cordee evaluate`: a model's scores on tasks, to the terminal and a file.

Owns which processes have which part of the model, and which of them speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cordee import launch, log
from cordee.config.check import inference_processes, model_processes
from cordee.config.schema import EvaluateConfig, TokenizerOptions
from cordee.convert import formats
from cordee.data.tokenizer import Tokenizer, holds_tokenizer, load_tokenizer
from cordee.errors import raise_all
from cordee.evaluate.runner import run_tasks, show, tasks_of, write
from cordee.evaluate.task import Subject, Task
from cordee.generate.loading import check_vocabulary, load_part
from cordee.generate.results import check_new
from cordee.parallel import inference


def run(config: EvaluateConfig) -> int:
    """Evaluate the model at `config.load`. ProblemError with what keeps it from starting.

    Processes that the degrees do not ask for hold further copies of the model and take their share of the work.
    """
    log.setup(launch.rank_info().rank)
    check_new(config.output)
    source = formats.read(config.load)
    tasks = tasks_of(config, source.spec.config)
    tokenizer = _tokenizer(config, tasks, source.companions)
    if tokenizer is not None:
        raise_all(check_vocabulary(tokenizer, source.spec.config))
    shape = inference.degrees(config, inference_processes(config) // model_processes(config))
    with ExitStack() as stack:
        model, place = load_part(source, config, shape, stack, "while evaluating")
        subject = Subject(model, tokenizer, place)
        results = run_tasks(tasks, subject, config)
    if subject.speaks:
        show(results)
        if config.output is not None:
            write(config.output, config.load, results)
    return 0


def _tokenizer(config: EvaluateConfig, tasks: Sequence[Task], companions: Path | None) -> Tokenizer | None:
    """The tokenizer that the options name, else that beside the model, else None if no task needs one."""
    named = any(getattr(config, name) != getattr(TokenizerOptions(), name) for name in vars(TokenizerOptions()))
    needed = any(task.needs_tokenizer(config) for task in tasks)
    if named or needed or (companions is not None and holds_tokenizer(companions)):
        return load_tokenizer(config, companions and str(companions))
    return None
