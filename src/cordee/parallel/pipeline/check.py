"""Which pipelines can run, as far as options tell.

Owns the laws between the schedule, ZeRO, compilation and micro-batches. How layers are divided is `split.py`'s, and
what a schedule asks of numbers `orders.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cordee.config.schema import TrainConfig
from cordee.errors import Problem, ProblemError, raise_all
from cordee.model.config import ModelConfig
from cordee.parallel.degrees import Degrees
from cordee.parallel.pipeline import micro_batches, orders
from cordee.parallel.pipeline.split import Division, divide, schedule_of

SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")
LARGE_BUBBLE = 0.2  # share of a step that is worth a word
_ONLY_PIPELINE = (
    "pipeline_schedule",
    "num_layers_per_virtual_pipeline_stage",
    "num_layer_list",
    "noop_layers",
    "fold_mode",
    "pipeline_timeline",
)


def sizes(options: TrainConfig) -> tuple[int, ...] | None:
    """Samples of each micro-batch of a step, if they are given. ProblemError if they cannot be read."""
    if options.manual_mbs is None or not options.optimized_pipeline:
        return None
    return micro_batches.sizes(options.manual_mbs)


def division(options: TrainConfig, degrees: Degrees, model: ModelConfig, counts: Sequence[int]) -> Division | None:
    """How a pipeline shares `model` out, None without one; `counts` are the numbers of micro-batches that steps have.

    ProblemError with all that keeps a run from going through it.
    """
    found, divided = list(problems(options, degrees, counts)), None
    if degrees.pp > 1:
        try:
            divided = divide(options, model, options.seq_length)
        except ProblemError as error:
            found += error.problems
    raise_all(found)
    return divided


def problems(options: TrainConfig, degrees: Degrees, counts: Sequence[int]) -> Iterator[Problem]:
    """What keeps options from each other; `counts` as `division` has them."""
    yield from _dynamic(options, degrees)
    if options.use_manual_layer_allocation and options.num_layer_list is None:
        yield Problem("--use-manual-layer-allocation", True, "no layers are given", "give --num-layer-list")
    if degrees.pp == 1:
        yield from _without_pipeline(options)
        return
    yield from _fold(options)
    schedule = schedule_of(options)
    if schedule in SPLIT_BACKWARD:
        yield from _split_backward(options, schedule)
    yield from _schedule(options, schedule, degrees.pp, counts)
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


def _without_pipeline(options: TrainConfig) -> Iterator[Problem]:
    for name in _ONLY_PIPELINE:
        if (value := getattr(options, name)) is not None:
            why = "it has no effect with one stage"
            fix = "give --pipeline-model-parallel-size, or leave it out"
            yield Problem("--" + name.replace("_", "-"), value, why, fix)


def _dynamic(options: TrainConfig, degrees: Degrees) -> Iterator[Problem]:
    if options.manual_mbs is None:
        if options.optimized_pipeline:
            why = "it is not said which micro-batches there are"
            yield Problem("--optimized-pipeline", True, why, "give --manual-mbs")
        return
    if not options.optimized_pipeline:
        why = "it has no effect without --optimized-pipeline"
        yield Problem("--manual-mbs", options.manual_mbs, why, "add --optimized-pipeline, or leave this out")
        return
    if schedule_of(options) != "1f1b" or degrees.pp == 1:
        why = "micro-batches of different sizes go through a pipeline as 1F1B"
        yield Problem("--optimized-pipeline", True, why, "give --pipeline-model-parallel-size, and no other schedule")
    if options.rampup_batch_size is not None:
        why = "a batch that grows has no fixed micro-batches"
        yield Problem("--manual-mbs", options.manual_mbs, why, "drop it, or --rampup-batch-size")
    num_samples = (options.global_batch_size or options.micro_batch_size * degrees.data) // degrees.data
    yield from micro_batches.problems(
        options.manual_mbs,
        num_ranks=degrees.pp,
        micro_batch_size=options.micro_batch_size,
        num_samples=num_samples,
    )


def _fold(options: TrainConfig) -> Iterator[Problem]:
    if options.fold_mode is None:
        return
    option = "--fold-mode"
    if options.pipeline_schedule not in (None, f"fold_{options.fold_mode}"):
        why = f"--pipeline-schedule {options.pipeline_schedule} asks for another order"
        yield Problem(option, options.fold_mode, why, "give one of the two")
    if options.num_layers_per_virtual_pipeline_stage is None:
        why = "there are no virtual stages to fold"
        yield Problem(option, options.fold_mode, why, "give --num-layers-per-virtual-pipeline-stage")


def _split_backward(options: TrainConfig, schedule: str) -> Iterator[Problem]:
    option = "--pipeline-schedule"
    if options.zero_stage == 3:
        why = "its backward is in two parts, between which ZeRO stage 3 would give the parameters away"
        yield Problem(option, schedule, why, "give --zero-stage 0, 1 or 2, or another schedule")
    if options.compile != "none":
        why = "its backward is in two parts, and torch.compile makes one of each layer"
        yield Problem(option, schedule, why, "give --compile none, or another schedule")
    if options.num_layers_per_virtual_pipeline_stage is not None and schedule in orders.V_SHAPED:
        why = "each rank has two stages, whose layers are shared out by their cost"
        yield Problem(option, schedule, why, "leave out --num-layers-per-virtual-pipeline-stage")


def _schedule(options: TrainConfig, schedule: str, num_ranks: int, counts: Sequence[int]) -> Iterator[Problem]:
    """What the schedule asks of numbers; each thing once, though steps may have several sizes."""
    virtual = options.num_layers_per_virtual_pipeline_stage is not None
    stages = 2 if virtual or schedule in orders.V_SHAPED else 1  # virtual stages are at least two a rank
    option = "--fold-mode" if options.fold_mode is not None else "--pipeline-schedule"
    value = options.fold_mode or schedule
    found = [problem for count in counts for problem in orders.problems(schedule, num_ranks, stages, count)]
    yield from dict.fromkeys(replace(problem, option=option, value=value) for problem in found)
