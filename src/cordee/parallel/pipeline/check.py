"""Which pipelines can run.

Owns the laws between the schedule, ZeRO, compilation and micro-batches. Those of stages and layers are `split.py`'s,
those of a schedule's numbers `schedules.py`'s, those of a list of micro-batches `micro_batches.py`'s."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from cordee.errors import Findings, Problem, Problems, excludes, raise_all
from cordee.parallel.degrees import RANKS, Degrees
from cordee.parallel.laws import PlacedRun
from cordee.parallel.options import LayoutOptions
from cordee.parallel.pipeline import micro_batches, schedules
from cordee.parallel.pipeline.split import StagePartition, partition_layers, schedule_of

SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")
LARGE_BUBBLE = 0.2  # fraction of a step that is worth a note
_SCHEDULE = ("pipeline_schedule", "fold_mode", "num_layers_per_virtual_pipeline_stage")


def sizes(options: LayoutOptions) -> tuple[int, ...] | None:
    """Samples of each micro-batch of a step, if they are given. ProblemError if they cannot be read."""
    if options.manual_mbs is None or not options.optimized_pipeline:
        return None
    return micro_batches.sizes(options.manual_mbs)


def partition(run: PlacedRun) -> StagePartition | None:
    """How a pipeline shards the layers of a run's model, None without one. ProblemError with all broken laws."""
    model, found = run.model, Findings([*check(run)])
    stages = None
    if run.degrees.pp > 1 and model is not None:
        stages = found.attempt(lambda: partition_layers(run.options, model, run.options.seq_length))
    raise_all(found.problems)
    return stages


def check(run: PlacedRun) -> Problems:
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
        fix = "make the directory, or give another path"
        yield Problem("--pipeline-timeline", options.pipeline_timeline, "its directory does not exist", fix, "absent")


def notes(partition: StagePartition | None, counts: Sequence[int]) -> Iterator[str]:
    """What a person should know of a pipeline that can run."""
    if partition is None or partition.schedule in SPLIT_BACKWARD:  # whose bubble is a third, or less
        return
    ranks, stages, fewest = partition.num_ranks, partition.stages_per_rank, min(counts)
    bubble = (ranks - 1) / (stages * fewest + ranks - 1)
    if bubble > LARGE_BUBBLE:
        yield (
            f"the pipeline bubble is {bubble:.0%} of a step of {fewest} micro-batches: more of them, or another "
            "--pipeline-schedule, shrink it (cordee plan compares them)"
        )


def _dynamic(options: LayoutOptions, degrees: Degrees) -> Problems:
    if options.manual_mbs is None or not options.optimized_pipeline:
        return
    if schedule_of(options) != "1f1b" or degrees.pp == 1:
        why = "micro-batches of different sizes need a pipeline with the schedule 1F1B"
        fix = "give --pipeline-model-parallel-size, and no other schedule"
        yield Problem("--optimized-pipeline", True, why, fix, "requires", ("pipeline_model_parallel_size", *_SCHEDULE))
    mbs, size = options.manual_mbs, options.micro_batch_size
    samples = (options.global_batch_size or size * degrees.data) // degrees.data
    yield from micro_batches.problems(mbs, num_ranks=degrees.pp, micro_batch_size=size, num_samples=samples)


def _split_backward(options: LayoutOptions, schedule: str) -> Problems:
    option, virtual = "--pipeline-schedule", options.num_layers_per_virtual_pipeline_stage
    if options.zero_stage == 3:
        why = "ZeRO stage 3 would free the parameters between dgrad and wgrad"
        fix = "give --zero-stage 0, 1 or 2, or another schedule"
        yield Problem(option, schedule, why, fix, "excludes", ("zero_stage",), "--zero-stage")
    if options.compile != "none":
        why = "dgrad and wgrad run apart, and torch.compile makes one backward of each layer"
        fix = "give --compile none, or another schedule"
        yield Problem(option, schedule, why, fix, "excludes", ("compile",), "--compile")
    if schedule in schedules.V_SHAPED:
        why = "each rank has two stages, balanced by what their layers cost"
        yield from excludes(option, schedule, "--num-layers-per-virtual-pipeline-stage", virtual, why)


def _schedule(options: LayoutOptions, schedule: str, num_ranks: int, counts: Sequence[int]) -> Problems:
    """The laws of the schedule's numbers; each once, though steps may have several sizes."""
    virtual = options.num_layers_per_virtual_pipeline_stage is not None
    stages = 2 if virtual or schedule in schedules.V_SHAPED else 1  # virtual stages are at least two a rank
    option = "--fold-mode" if options.fold_mode is not None else "--pipeline-schedule"
    value = options.fold_mode or schedule
    found = [problem for count in counts for problem in schedules.problems(schedule, num_ranks, stages, count)]
    involved = (*_SCHEDULE, *RANKS, "global_batch_size", "micro_batch_size", "rampup_batch_size")
    yield from dict.fromkeys(replace(problem, option=option, value=value, involves=involved) for problem in found)
