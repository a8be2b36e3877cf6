"""How the options of one job fit together.

Owns the rules between options: no files, no model, no devices. Each topic has one function that yields every problem
it finds, and `check_train`, `check_generate`, ... ask them all. Options on their own (types, ranges, choices) are the
loader's matter; what they mean for a model, data or a tokenizer is checked by the packages of that name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cordee import launch
from cordee.config import deepspeed
from cordee.config.model_options import PortedOptions
from cordee.config.option import options_of, to_flag
from cordee.config.schema import (
    BatchOptions,
    CheckpointOptions,
    DecodingOptions,
    EvaluateConfig,
    GenerateConfig,
    InferenceLayoutOptions,
    OptimizerOptions,
    ParallelOptions,
    PerformanceOptions,
    PrecisionOptions,
    PreprocessConfig,
    TrainConfig,
)
from cordee.errors import Problem

Problems = Iterator[Problem]


def check_train(config: TrainConfig) -> list[Problem]:
    """All problems between the options of a training run; a launcher, if there is one, tells how many processes."""
    processes = launch.world_size(config.nproc_per_node)
    data_ranks = max(1, processes // model_ranks(config))  # degrees that do not fit have their own problems
    return [
        *_length(config),
        *_positions(config),
        *_batch(config, data_ranks),
        *_rampup(config, data_ranks),
        *_learning_rate(config),
        *_warmup(config),
        *_weight_decay(config),
        *_precision(config),
        *_processes(config),
        *_needs(config, ("deepspeed",), "deepspeed_config"),
        *deepspeed.check(config, processes),
        *_checkpoints(config),
        *_performance(config),
        *_gathers(config),
    ]


def without_effect(config: TrainConfig) -> Iterator[str]:
    """Options that were given and change nothing, in words. No problem: scripts that are ported are full of them."""
    defaults = {option.name: option.default for option in options_of(TrainConfig)}
    for names, needed, has_effect in _CONDITIONAL:
        if not has_effect(config):
            given = [to_flag(name) for name in names if getattr(config, name) != defaults[name]]
            if given:
                yield f"without effect: {', '.join(given)}, for {needed}"


_CONDITIONAL: tuple[tuple[tuple[str, ...], str, Callable[[TrainConfig], bool]], ...] = (
    (
        ("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
        "the loss is scaled dynamically only with --fp16 and without --loss-scale",
        lambda config: config.fp16 and config.loss_scale is None,
    ),
    (
        (
            "context_parallel_algo",
            "ulysses_degree_in_cp",
            "cp_window_size",
            "use_cp_send_recv_overlap",
            "kv_head_repeat_before_uly_alltoall",
            "cp_attention_mask_type",
        ),
        "--context-parallel-size is 1",
        lambda config: config.context_parallel_size > 1,
    ),
    (
        ("use_cp_send_recv_overlap",),
        "ulysses_cp_algo hands nothing round a ring",
        lambda config: config.context_parallel_size == 1 or config.context_parallel_algo != "ulysses_cp_algo",
    ),
    (
        ("kv_head_repeat_before_uly_alltoall",),
        "megatron_cp_algo exchanges no heads",
        lambda config: config.context_parallel_size == 1 or config.context_parallel_algo != "megatron_cp_algo",
    ),
    (("sgd_momentum",), "--optimizer is not sgd", lambda config: config.optimizer == "sgd"),
    (("adam_beta1", "adam_beta2", "adam_eps"), "--optimizer is sgd", lambda config: config.optimizer != "sgd"),
    (("split",), "--train-data-path and its like are not split", lambda config: bool(config.data_path)),
    (("eval_interval",), "--eval-iters 0 validates never", lambda config: config.eval_iters > 0),
    (("tensorboard_log_interval",), "there is no --tensorboard-dir", lambda config: config.tensorboard_dir is not None),
    (("min_lr",), "--lr-decay-style is constant", lambda config: config.lr_decay_style != "constant"),
    (
        ("lr_decay_iters", "lr_decay_samples"),
        "--lr-decay-style is constant",
        lambda config: config.lr_decay_style != "constant" or config.lr_warmup_fraction is not None,
    ),
    (
        ("lr_warmup_init",),
        "there is no warm-up",
        lambda config: bool(config.lr_warmup_iters or config.lr_warmup_samples or config.lr_warmup_fraction),
    ),
    (
        ("tp_comm_overlap", "tp_comm_overlap_parts"),
        "there is one tensor-parallel rank",
        lambda config: config.tensor_model_parallel_size > 1,
    ),
    (
        ("moe_token_dispatcher_type", "moe_permutation_async_comm"),
        "each rank has all experts (--expert-model-parallel-size 1)",
        lambda config: config.expert_model_parallel_size > 1,
    ),
    (
        ("accumulate_allreduce_grads_in_fp32",),
        "the run computes in float32",
        lambda config: config.fp16 or config.bf16,
    ),
    (
        tuple(option.name for option in options_of(PortedOptions)),
        "it is so here anyway",
        lambda config: False,
    ),
    (
        ("delay_grad_reduce",),
        "a layer's gradients always travel as soon as its part of the last backward is over",
        lambda config: False,
    ),
    (
        ("overlap_grad_reduce", "overlap_param_gather", "delay_param_gather"),
        "there is one process",
        lambda config: launch.world_size(config.nproc_per_node) > 1,
    ),
    (
        ("overlap_param_gather",),
        "--zero-stage 0 shares no weights out that had to be gathered",
        lambda config: config.zero_stage > 0,
    ),
    (
        ("delay_param_gather",),
        "only --zero-stage 3 gathers weights for the backward",
        lambda config: config.zero_stage == 3,
    ),
)


def check_generate(config: GenerateConfig) -> list[Problem]:
    """All problems between the options of a generation."""
    return [*_prompts(config), *check_decoding(config), *_parts(config)]


def model_processes(options: InferenceLayoutOptions) -> int:
    """How many processes share a model."""
    return options.tensor_model_parallel_size * options.pipeline_model_parallel_size


def inference_processes(options: GenerateConfig | EvaluateConfig) -> int:
    """How many processes there are: those of one model, or in an evaluation as many as are asked for or started."""
    if isinstance(options, GenerateConfig):
        return model_processes(options)
    here = launch.rank_info()
    return here.world_size if here.launcher else options.nproc_per_node or model_processes(options)


def _parts(options: InferenceLayoutOptions) -> Problems:
    here, processes = launch.rank_info(), model_processes(options)
    if here.launcher and here.world_size != processes:
        why = f"{here.launcher} has started {here.world_size} processes, and the degrees ask for {processes}"
        yield Problem("processes", here.world_size, why, f"start {processes}, or change the degrees")


def _copies(config: EvaluateConfig) -> Problems:
    processes, model = inference_processes(config), model_processes(config)
    if processes % model:
        why = f"tensor {config.tensor_model_parallel_size} x pipeline {config.pipeline_model_parallel_size} = {model} "
        yield Problem("processes", processes, f"{why}does not divide them", f"start a multiple of {model}")


def check_decoding(options: DecodingOptions) -> list[Problem]:
    """All problems between the options of how tokens are chosen."""
    return [] if options.do_sample else [*_without_sampling(options)]


def check_evaluate(config: EvaluateConfig) -> list[Problem]:
    """All problems between the options of an evaluation."""
    return [*_windows(config), *_processes(config), *_copies(config)]


def check_preprocess(config: PreprocessConfig) -> list[Problem]:
    """All problems between the options of a preprocessing job."""
    return [*_input(config)]


def _problem(options: Any, name: str, why: str, fix: str) -> Problem:
    return Problem(to_flag(name), getattr(options, name), why, fix)


def _needs(options: Any, names: Sequence[str], needed: str) -> Problems:
    """Options that mean nothing without another one."""
    if getattr(options, needed) in (None, False, ()):
        for name in names:
            if getattr(options, name) not in (None, False, 0, ()):
                yield _problem(options, name, f"it has no effect without {to_flag(needed)}", f"give {to_flag(needed)}")


# ------------------------------------------------------------------------------------------------------ the run


def _length(options: TrainConfig) -> Problems:
    if options.train_iters and options.train_samples:
        why = "the length of the run is given in steps and in samples"
        yield _problem(options, "train_samples", why, "give --train-iters or --train-samples, not both")
    if not options.train_iters and not options.train_samples and not options.skip_train:
        why = "the length of the run is not given"
        yield _problem(options, "train_iters", why, "give --train-iters or --train-samples")
    if options.skip_train and not options.eval_iters:
        yield _problem(options, "skip_train", "with --eval-iters 0 nothing is left to do", "give --eval-iters 100")


def _positions(options: TrainConfig) -> Problems:
    longest = options.max_position_embeddings
    if longest and options.seq_length > longest:
        why = f"the model holds at most {longest} positions (--max-position-embeddings)"
        yield _problem(options, "seq_length", why, f"give at most {longest}, or raise --max-position-embeddings")


def model_ranks(options: ParallelOptions) -> int:
    """Processes that work on the same samples."""
    degrees = (options.tensor_model_parallel_size, options.context_parallel_size, options.pipeline_model_parallel_size)
    return math.prod(degrees)


def fewest_processes(options: ParallelOptions) -> int:
    """The smallest number of processes that the degrees fit."""
    return model_ranks(options) * options.expert_model_parallel_size * options.num_distributed_optimizer_instances


def _batch(options: BatchOptions, data_ranks: int) -> Problems:
    pass_size = options.micro_batch_size * data_ranks
    if options.global_batch_size and options.global_batch_size % pass_size:
        ranks = f"{data_ranks} data-parallel ranks"
        why = f"it is not divisible by {pass_size} = {options.micro_batch_size} per micro-batch x {ranks}"
        fix = f"give a multiple of {pass_size}, such as {-(-options.global_batch_size // pass_size) * pass_size}"
        yield _problem(options, "global_batch_size", why, fix)


def _rampup(options: BatchOptions, data_ranks: int) -> Problems:
    if options.rampup_batch_size is None:
        return
    name, (start, increment, _) = "rampup_batch_size", options.rampup_batch_size
    pass_size = options.micro_batch_size * data_ranks
    end = options.global_batch_size
    if options.train_iters:
        yield _problem(options, name, "a batch that grows is counted in samples", "give --train-samples")
    for number, meaning in ((start, "start"), (increment, "increment")):
        if number % pass_size:
            why = f"{meaning} {number} is not divisible by {pass_size} = micro-batch x data-parallel ranks"
            yield _problem(options, name, why, f"give a multiple of {pass_size}")
    if end is None:
        yield _problem(options, name, "its end is not given", "give --global-batch-size")
    elif start > end or (end - start) % increment:
        why = f"{start} does not reach --global-batch-size {end} in steps of {increment}"
        yield _problem(options, name, why, f"let {end} - START be a multiple of INCREMENT")


# ------------------------------------------------------------------------------------------------- the schedule


def _learning_rate(options: OptimizerOptions) -> Problems:
    for name in ("min_lr", "lr_warmup_init"):
        if getattr(options, name) > options.lr:
            yield _problem(options, name, f"it is above --lr {options.lr}", f"give at most {options.lr}")
    if options.override_opt_param_scheduler and options.use_checkpoint_opt_param_scheduler:
        why = "--override-opt-param-scheduler asks for the opposite"
        yield _problem(options, "use_checkpoint_opt_param_scheduler", why, "give one of the two")


def _warmup(options: TrainConfig) -> Problems:
    in_samples = options.train_samples is not None
    unit, other = ("samples", "iters") if in_samples else ("iters", "samples")
    for name in (f"lr_decay_{other}", f"lr_warmup_{other}"):
        if getattr(options, name):
            why = f"the run is counted by --train-{unit}"
            yield _problem(options, name, why, f"give {to_flag(name.replace(other, unit))}")
    warmup, length = getattr(options, f"lr_warmup_{unit}"), getattr(options, f"lr_decay_{unit}")
    length = length or getattr(options, f"train_{unit}")
    if options.lr_warmup_fraction is not None and warmup:
        why = "--lr-warmup-fraction gives the warm-up too"
        yield _problem(options, f"lr_warmup_{unit}", why, "give one of the two")
    elif warmup and length and warmup >= length:
        why = f"the schedule is over after {length}"
        yield _problem(options, f"lr_warmup_{unit}", why, f"give less than {length}")


def _weight_decay(options: OptimizerOptions) -> Problems:
    start, end = options.start_weight_decay, options.end_weight_decay
    varies = options.weight_decay_incr_style != "constant"
    for name in ("start_weight_decay", "end_weight_decay"):
        if varies and getattr(options, name) is None:
            why = f"--weight-decay-incr-style {options.weight_decay_incr_style} needs it"
            yield _problem(options, name, why, "give a weight decay")
        if not varies and getattr(options, name) is not None:
            why = "with --weight-decay-incr-style constant only --weight-decay counts"
            yield _problem(options, name, why, "choose linear or cosine, or leave this out")
    if varies and start is not None and end is not None and start > end:
        yield _problem(options, "end_weight_decay", f"it is below --start-weight-decay {start}", "exchange the two")


# -------------------------------------------------------------------------------------------------- the machine


def _precision(options: PrecisionOptions) -> Problems:
    if options.fp16 and options.bf16:
        yield _problem(options, "fp16", "--bf16 is given too", "give one of the two")
    if options.loss_scale is not None and not options.fp16:
        yield _problem(options, "loss_scale", "only float16 is scaled", "add --fp16, or leave this out")
    if options.min_loss_scale > options.initial_loss_scale:
        why = f"it is above --initial-loss-scale {options.initial_loss_scale}"
        yield _problem(options, "min_loss_scale", why, f"give at most {options.initial_loss_scale}")


def _processes(options: ParallelOptions | EvaluateConfig) -> Problems:
    here = launch.rank_info()
    given = options.nproc_per_node
    if here.launcher and given and given != here.local_world_size:
        why = f"{here.launcher} has started {here.local_world_size} processes on this node"
        yield _problem(options, "nproc_per_node", why, "leave it out, or let the launcher start that many")


def _gathers(options: ParallelOptions) -> Problems:
    if options.overlap_param_gather and options.delay_param_gather:
        why = "--delay-param-gather asks for the opposite"
        yield _problem(options, "overlap_param_gather", why, "give one of the two")


def _checkpoints(options: CheckpointOptions) -> Problems:
    if options.save and not options.save_interval:
        why = "it is not said how often to save"
        yield _problem(options, "save_interval", why, "give the number of steps between checkpoints")
    yield from _needs(options, ("save_interval", "keep_last"), "save")
    yield from _needs(options, ("ckpt_step", "finetune", "exit_on_missing_checkpoint"), "load")


def _performance(options: PerformanceOptions) -> Problems:
    yield from _needs(options, ("manual_gc_interval",), "manual_gc")


# --------------------------------------------------------------------------------------------------- other jobs


def _prompts(config: GenerateConfig) -> Problems:
    if not config.prompt and not config.prompts_file:
        yield Problem("--prompt", None, "there is no text to continue", "give --prompt or --prompts-file")
    if config.prompt and config.prompts_file:
        yield _problem(config, "prompts_file", "--prompt is given too", "give one of the two")


def _without_sampling(options: DecodingOptions) -> Problems:
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": 1}
    for name, value in neutral.items():
        if getattr(options, name, value) != value:
            yield _problem(options, name, "without --do-sample the most likely token is taken", "add --do-sample")


def _windows(config: EvaluateConfig) -> Problems:
    if not config.task_data_path:
        yield Problem("--task-data-path", None, "there is nothing to evaluate on", "give a text or a .bin/.idx prefix")
    if config.stride and config.seq_length and config.stride > config.seq_length:
        why = f"tokens between windows of {config.seq_length} would not be scored"
        yield _problem(config, "stride", why, f"give at most {config.seq_length}")


def _input(config: PreprocessConfig) -> Problems:
    if config.merge_group_keys and not config.input:
        yield _problem(
            config, "merge_group_keys", "it is not said where the pairs are", "give their directory: --input"
        )
    elif not config.input and not config.hf_datasets_params:
        yield Problem("--input", None, "there is nothing to read", "give a file, a directory, or --hf-datasets-params")
