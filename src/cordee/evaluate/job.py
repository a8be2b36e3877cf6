"""`cordee evaluate`: a model's scores on tasks, to the terminal and a file.

Owns which processes have which part of the model, and which of them speaks."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from cordee import launch, log
from cordee.checkpoint import adapter
from cordee.checkpoint.storage import location_of
from cordee.config import laws
from cordee.errors import Findings, Problem, Problems, divisible, raise_all
from cordee.evaluate.finished import Finished, fingerprint_files
from cordee.evaluate.options import EvaluateConfig
from cordee.evaluate.runner import run_tasks, show, tasks_of, write
from cordee.evaluate.task import Subject, Task
from cordee.generate.loading import check_part, join, load_part, stop_ids, tokenizer_of
from cordee.generate.results import check_new
from cordee.parallel import inference
from cordee.parallel.degrees import RANKS, Degrees, model_processes
from cordee.tokenizer import Tokenizer, holds_tokenizer, names_tokenizer
from cordee.weights.codec import Source


def option_problems(config: EvaluateConfig) -> Problems:
    """All problems between the options of an evaluation."""
    yield from laws.problems(config)
    yield from launch.problems(config.nproc_per_node)
    degrees = f"tensor {config.tensor_model_parallel_size} x pipeline {config.pipeline_model_parallel_size}"
    model = model_processes(config)
    yield from divisible("processes", _processes(config), model, degrees, *RANKS, instead="lower a degree")


def check_run(config: EvaluateConfig) -> list[Problem]:
    """Everything that would stop the job, as far as it can be known without loading the weights."""
    found = Findings()
    found.attempt(lambda: _prepare(config))
    return found.problems


def run(config: EvaluateConfig) -> int:
    """Evaluate the model at `config.load`. ProblemError with all that keeps it from starting.

    Processes that the degrees do not ask for hold further copies of the model and take their share of the work."""
    log.setup(launch.rank_info().rank)
    source, tokenizer, tasks, stop = _prepare(config)
    with ExitStack() as stack:
        layout = join(config, _degrees(config), stack, "while evaluating")
        model, stage = load_part(source, config, layout)
        subject = Subject(model, tokenizer, stage, stop)
        finished = _finished(config, subject)
        results = run_tasks(tasks, subject, config, finished)
    if subject.speaks:
        show(results)
        if config.output is not None:
            write(config.output, config.load, results)
            finished.remove()
    return 0


def _finished(config: EvaluateConfig, subject: Subject) -> Finished:
    """What an evaluation of the same weights that was killed has found, in a file beside `--output`."""
    if config.output is None or not subject.speaks:
        return Finished(None)
    dtype = next(subject.model.parameters()).dtype
    path = Path(config.output)
    given = config.load, *config.adapters().values()
    files = [fingerprint_files(location_of(each)) for each in given]
    return Finished(path.with_name(f"{path.name}.partial"), f"{' '.join(files)} {dtype}")


def _processes(config: EvaluateConfig) -> int:
    """Those of a launcher, or those that are asked for; else those of one copy of the model."""
    return launch.world_size(config.nproc_per_node or model_processes(config))


def _degrees(config: EvaluateConfig) -> Degrees:
    return inference.degrees(config, max(1, _processes(config) // model_processes(config)))


def _prepare(config: EvaluateConfig) -> tuple[Source, Tokenizer | None, list[Task], frozenset[int]]:
    """Weights, tokenizer (None: no task needs one), tasks and the tokens that end a text: nothing is known to be wrong
    with them."""
    found = Findings([*option_problems(config)])
    found.attempt(lambda: check_new(config.output))
    source = found.attempt(lambda: adapter.read(config.load, config, config.only_adapter()))
    found.problems += check_part(source, config, _degrees(config))
    tasks = found.attempt(lambda: tasks_of(config, source and source.spec.config))
    tokenizer = found.attempt(lambda: _tokenizer(config, tasks or [], source))
    stop = None
    if source is not None and tokenizer is not None:
        stop = found.attempt(lambda: stop_ids(source.spec, source.assets, tokenizer))
    raise_all(found.problems)
    assert source is not None and tasks is not None
    return source, tokenizer, tasks, stop or frozenset()


def _tokenizer(config: EvaluateConfig, tasks: Sequence[Task], source: Source | None) -> Tokenizer | None:
    """The tokenizer that the options name, else that beside the model, else None if no task needs one."""
    needed = any(task.needs_tokenizer(config) for task in tasks)
    beside = source is not None and source.assets is not None and holds_tokenizer(source.assets)
    return tokenizer_of(config, source) if needed or beside or names_tokenizer(config) else None
