"""Which pipelines can run, as far as options tell.

Owns the laws between the schedule, ZeRO, compilation and micro-batches. How layers are divided is `split.py`'s, and
what a schedule asks of numbers `orders.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cordee.config.check import RANKS
from cordee.config.schema import TrainConfig
from cordee.errors import Findings, Problem, Problems, excludes, raise_all
from cordee.parallel.degrees import Degrees
from cordee.parallel.laws import Run
from cordee.parallel.pipeline import micro_batches, orders
from cordee.parallel.pipeline.split import Division, divide, schedule_of

SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")
LARGE_BUBBLE = 0.2  # share of a step that is worth a word
_SCHEDULE = ("pipeline_schedule", "fold_mode", "num_layers_per_virtual_pipeline_stage")


def sizes(options: TrainConfig) -> tuple[int, ...] | None:
    """Samples of each micro-batch of a step, if they are given. ProblemError if they cannot be read."""
    if options.manual_mbs is None or not options.optimized_pipeline:
        return None
    return micro_batches.sizes(options.manual_mbs)


def division(run: Run) -> Division | None:
    """How a pipeline shards the layers of a run's model, None without one.

    ProblemError with all that keeps the run from going through it.
    """
    model, found = run.model, Findings([*check(run)])
    divided = None
    if run.degrees.pp > 1 and model is not None:
        divided = found.attempt(lambda: divide(run.options, model, run.options.seq_length))
    raise_all(found.problems)
    return divided


def check(run: Run) -> Problems:
    """What keeps a schedule, ZeRO, compilation and micro-batches from each other."""
    options, schedule = run.options, schedule_of(run.options)
    yield from _dynamic(options, run.degrees)
    if run.degrees.pp == 1:
        return
    if options.fold_mode is not None and options.pipeline_schedule not in (None, f"fold_{options.fold_mode}"):
        yield from excludes("--fold-mode", options.fold_mode, "--pipeline-schedule", options.pipeline_schedule)
    if schedule in SPLIT_BACKWARD:
        yield from _split_backward(options, schedule)
    yield from _schedule(options, schedule, run.degrees.pp, run.micro_batches)
    if options.pipeline_timeline is not None and not Path(options.pipeline_timeline).absolute().parent.is_dir():
        why = "there is no such directory to write it in"
        yield Problem("--pipeline-timeline", options.pipeline_timeline, why, "make it, or give another place")


def notes(division: Division | None, counts: Sequence[int]) -> Iterator[str]:
    """What a person should know of a pipeline that can run."""
    if division is None:
        return
    ranks, stages, fewest = division.num_ranks, division.stages_per_rank, min(counts)
    if division.schedule in SPLIT_BACKWARD:
        return  # they wait for a third as long, or less
    bubble = (ranks - 1) / (stages * fewest + ranks - 1)
    if bubble > LARGE_BUBBLE:
        yield (
            f"the pipeline waits for {bubble:.0%} of a step of {fewest} micro-batches: more of them, or another "
            "--pipeline-schedule, make it less (cordee plan compares them)"
        )


def _dynamic(options: TrainConfig, degrees: Degrees) -> Problems:
    if options.manual_mbs is None or not options.optimized_pipeline:
        return
    if schedule_of(options) != "1f1b" or degrees.pp == 1:
        why = "micro-batches of different sizes go through a pipeline as 1F1B"
        fix = "give --pipeline-model-parallel-size, and no other schedule"
        involved = ("pipeline_model_parallel_size", *_SCHEDULE)
        yield Problem("--optimized-pipeline", True, why, fix, "requires", involved)
    num_samples = (options.global_batch_size or options.micro_batch_size * degrees.data) // degrees.data
    yield from micro_batches.problems(
        options.manual_mbs,
        num_ranks=degrees.pp,
        micro_batch_size=options.micro_batch_size,
        num_samples=num_samples,
    )


def _split_backward(options: TrainConfig, schedule: str) -> Problems:
    option = "--pipeline-schedule"
    if options.zero_stage == 3:
        why = "its backward is in two parts, between which ZeRO stage 3 would free the parameters"
        fix = "give --zero-stage 0, 1 or 2, or another schedule"
        yield Problem(option, schedule, why, fix, "excludes", ("zero_stage",), "--zero-stage")
    if options.compile != "none":
        why = "its backward is in two parts, and torch.compile makes one of each layer"
        fix = "give --compile none, or another schedule"
        yield Problem(option, schedule, why, fix, "excludes", ("compile",), "--compile")
    if options.num_layers_per_virtual_pipeline_stage is not None and schedule in orders.V_SHAPED:
        why = "each rank has two stages, whose layers are divided by their cost"
        fix = "leave out --num-layers-per-virtual-pipeline-stage"
        yield Problem(option, schedule, why, fix, "excludes", _SCHEDULE, "--num-layers-per-virtual-pipeline-stage")


def _schedule(options: TrainConfig, schedule: str, num_ranks: int, counts: Sequence[int]) -> Problems:
    """What the schedule asks of numbers; each thing once, though steps may have several sizes."""
    virtual = options.num_layers_per_virtual_pipeline_stage is not None
    stages = 2 if virtual or schedule in orders.V_SHAPED else 1  # virtual stages are at least two a rank
    option = "--fold-mode" if options.fold_mode is not None else "--pipeline-schedule"
    value = options.fold_mode or schedule
    found = [problem for count in counts for problem in orders.problems(schedule, num_ranks, stages, count)]
    involved = (*_SCHEDULE, *RANKS, "global_batch_size", "micro_batch_size", "rampup_batch_size")
    yield from dict.fromkeys(replace(problem, option=option, value=value, involves=involved) for problem in found)
