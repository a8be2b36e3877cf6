"""Checks of the options of one job against each other.

Owns the rules between options that their classes do not declare as laws (`laws.py`): no files, no model, no devices.
Single options (types, ranges, choices) are the loader's; the model, data and tokenizer packages check what options mean
for them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from cordee import launch
from cordee.config import laws
from cordee.config.option import to_flag
from cordee.config.schema import (
    BatchOptions,
    EvaluateConfig,
    GenerateConfig,
    InferenceLayoutOptions,
    OptimizerOptions,
    ParallelOptions,
    PreprocessConfig,
    TrainConfig,
)
from cordee.errors import Problem, Problems, at_most, divisible

DEGREES = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
RANKS = ("nproc_per_node", *DEGREES)  # the number of data-parallel ranks follows from these


def check_train(config: TrainConfig) -> list[Problem]:
    """All problems between the options of a training run; a launcher, if there is one, sets the number of processes."""
    return [
        *laws.problems(config),
        *_length(config),
        *at_most(
            "--seq-length",
            config.seq_length,
            config.max_position_embeddings,
            f"--max-position-embeddings {config.max_position_embeddings}",
            "max_position_embeddings",
            instead="raise --max-position-embeddings",
        ),
        *_batch(config, data_ranks(config, launch.world_size(config.nproc_per_node))),
        *_warmup(config),
        *_weight_decay(config),
        *_processes(config),
        *_save_interval(config),
    ]


def check_generate(config: GenerateConfig) -> list[Problem]:
    """All problems between the options of a generation."""
    return [*_prompts(config), *laws.problems(config), *_launched_processes(config)]


def model_processes(options: InferenceLayoutOptions) -> int:
    """The number of processes that shard one copy of the model."""
    return options.tensor_model_parallel_size * options.pipeline_model_parallel_size


def inference_processes(options: GenerateConfig | EvaluateConfig) -> int:
    """The number of processes: those of one copy of the model; for an evaluation, those given or launched."""
    if isinstance(options, GenerateConfig):
        return model_processes(options)
    here = launch.rank_info()
    return here.world_size if here.launcher else options.nproc_per_node or model_processes(options)


def _launched_processes(options: InferenceLayoutOptions) -> Problems:
    here, processes = launch.rank_info(), model_processes(options)
    if here.launcher and here.world_size != processes:
        why = f"{here.launcher} has started {here.world_size} processes, tensor x pipeline degrees are {processes}"
        fix = f"start {processes}, or change the degrees"
        yield Problem("processes", here.world_size, why, fix, "launched", DEGREES, processes)


def _copies(config: EvaluateConfig) -> Problems:
    model = model_processes(config)
    degrees = f"tensor {config.tensor_model_parallel_size} x pipeline {config.pipeline_model_parallel_size}"
    yield from divisible("processes", inference_processes(config), model, degrees, *RANKS, instead="lower a degree")


def check_evaluate(config: EvaluateConfig) -> list[Problem]:
    """All problems between the options of an evaluation."""
    return [*_task_data(config), *laws.problems(config), *_processes(config), *_copies(config)]


def check_preprocess(config: PreprocessConfig) -> list[Problem]:
    """All problems between the options of a preprocessing job."""
    return [*laws.problems(config), *_input(config)]


def _problem(options: Any, name: str, why: str, fix: str, *involves: str, kind: str = "invalid") -> Problem:
    return Problem(to_flag(name), getattr(options, name), why, fix, kind, involves)


# ------------------------------------------------------------------------------------------------------ the run


def _length(options: TrainConfig) -> Problems:
    if not options.train_iters and not options.train_samples and not options.skip_train:
        why, fix = "the length of the run is not given", "give --train-iters or --train-samples"
        yield _problem(options, "train_iters", why, fix, "train_samples", "skip_train", kind="missing")
    if options.skip_train and not options.eval_iters:
        why, fix = "--eval-iters 0 leaves nothing to do", "give --eval-iters 100"
        yield _problem(options, "skip_train", why, fix, "eval_iters", kind="excludes")


def model_ranks(options: ParallelOptions) -> int:
    """The number of ranks of one model replica: they process the same samples."""
    return math.prod(getattr(options, name) for name in DEGREES)


def data_ranks(options: ParallelOptions, processes: int) -> int:
    """The number of data-parallel ranks; 1 where the degrees do not divide the number of processes."""
    ranks, left = divmod(processes, model_ranks(options))
    return 1 if left else max(1, ranks)


def fewest_processes(options: ParallelOptions) -> int:
    """The smallest number of processes that the degrees divide."""
    return model_ranks(options) * options.expert_model_parallel_size * options.num_distributed_optimizer_instances


def _batch(options: BatchOptions, data_ranks: int) -> Problems:
    size = options.micro_batch_size * data_ranks
    made_of = f"{options.micro_batch_size} per micro-batch x {data_ranks} data-parallel ranks"
    end, option, involved = options.global_batch_size, "--rampup-batch-size", ("micro_batch_size", *RANKS)
    if end is not None:
        yield from divisible("--global-batch-size", end, size, made_of, *involved)
    if (ramp := options.rampup_batch_size) is None:
        return
    start, increment, _ = ramp
    for meaning, number in (("start", start), ("increment", increment)):
        for problem in divisible(option, number, size, made_of, *involved):
            yield replace(problem, value=ramp, why=f"{meaning} {problem.why}", limit=(meaning, size))
    if end is not None and (start > end or (end - start) % increment):
        why = f"{start} does not reach {end} in steps of {increment}"
        fix = f"let {end} - START be a multiple of INCREMENT"
        yield Problem(option, ramp, why, fix, "reaches", ("global_batch_size",), end)


# ------------------------------------------------------------------------------------------------- the schedule


def _warmup(options: TrainConfig) -> Problems:
    unit = "iters" if options.train_samples is None else "samples"
    name, decay, whole = f"lr_warmup_{unit}", f"lr_decay_{unit}", f"train_{unit}"
    warmup, length = getattr(options, name), getattr(options, decay) or getattr(options, whole)
    if warmup and length and warmup >= length and options.lr_warmup_fraction is None:
        why = f"the learning rate schedule ends after {length} {unit}"
        yield _problem(options, name, why, f"give less than {length}", decay, whole, kind="at most")


def _weight_decay(options: OptimizerOptions) -> Problems:
    style = options.weight_decay_incr_style
    for name in ("start_weight_decay", "end_weight_decay"):
        if style != "constant" and getattr(options, name) is None:
            why = f"--weight-decay-incr-style is {style}"
            yield _problem(options, name, why, "give a weight decay", "weight_decay_incr_style", kind="missing")


# -------------------------------------------------------------------------------------------------- the machine


def _processes(options: ParallelOptions | EvaluateConfig) -> Problems:
    here = launch.rank_info()
    given = options.nproc_per_node
    if here.launcher and given and given != here.local_world_size:
        why = f"{here.launcher} has started {here.local_world_size} processes on this node"
        fix = "leave the option out, or launch that many"
        yield Problem("--nproc-per-node", given, why, fix, "launched", limit=here.local_world_size)


def _save_interval(options: TrainConfig) -> Problems:
    if options.save and not options.save_interval:
        why, fix = "--save is given", "give the iterations between checkpoints"
        yield _problem(options, "save_interval", why, fix, "save", kind="missing")


# --------------------------------------------------------------------------------------------------- other jobs


def _prompts(config: GenerateConfig) -> Problems:
    if not config.prompt and not config.prompts_file:
        fix = "give --prompt or --prompts-file"
        yield Problem("--prompt", None, "there is no text to continue", fix, "missing", ("prompts_file",))


def _task_data(config: EvaluateConfig) -> Problems:
    if not config.task_data_path:
        fix = "give a text or a .bin/.idx prefix"
        yield Problem("--task-data-path", None, "there is nothing to evaluate on", fix, "missing")


def _input(config: PreprocessConfig) -> Problems:
    if not config.input and not config.hf_datasets_params and not config.merge_group_keys:
        fix = "give a file, a directory, or --hf-datasets-params"
        yield Problem("--input", None, "there is nothing to read", fix, "missing", ("hf_datasets_params",))
