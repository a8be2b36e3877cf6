"""The options of every command: one class per topic, composed into one class per command.

Owns names, types, defaults and help texts, and nothing that computes. The field name is the YAML key and, with
dashes, the flag; it is Megatron's name wherever Megatron has one. `None` means "not given". A boolean is stated
positively and also has a `--no-...` flag, so Megatron's `--no-load-optim` is `load_optim: false`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from cordee.config.laws import GIVEN, NOT_GIVEN, POSITIVE, SEVERAL, at_most, but, excludes, ignored, needs
from cordee.config.model_options import ExpertTrainingOptions, ModelOptions, PortedOptions, VocabularyOptions
from cordee.config.option import option, required

_DTYPE_SYNONYMS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class TokenizerOptions(VocabularyOptions):
    """Tokenizer."""

    tokenizer_type: (
        Literal[
            "PretrainedFromHF",
            "GPT2BPETokenizer",
            "SentencePieceTokenizer",
            "GPTSentencePieceTokenizer",
            "Llama2Tokenizer",
            "TikTokenizer",
            "NullTokenizer",
        ]
        | None
    ) = option(None, "kind of tokenizer [PretrainedFromHF, from --load if that holds one]")
    tokenizer_name_or_path: str | None = option(
        None, "PretrainedFromHF: directory with a Hugging Face tokenizer", metavar="DIR"
    )
    tokenizer_model: str | None = option(None, "SentencePiece, Llama2 and TikTokenizer: the model file", metavar="FILE")
    vocab_file: str | None = option(None, "GPT2BPETokenizer: vocabulary, JSON", metavar="FILE")
    merge_file: str | None = option(None, "GPT2BPETokenizer: merges, text", metavar="FILE")
    tokenizer_kwargs: Mapping[str, str | int | bool] = option(
        {}, "PretrainedFromHF: more arguments: key value key value ..."
    )
    tokenizer_use_fast: bool = option(
        True, "PretrainedFromHF: take the fast implementation", negations=("--tokenizer-not-use-fast",)
    )


# ------------------------------------------------------------------------------------------------ a training run


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batch and length of the run."""

    seq_length: int = required("tokens per sample", above=0)
    micro_batch_size: int = option(1, "samples per data-parallel rank and forward pass", above=0)
    global_batch_size: int | None = option(
        None, "samples per step over all processes [micro-batch-size x data-parallel ranks]", above=0
    )
    rampup_batch_size: tuple[int, int, int] | None = option(
        None, "start with a small global batch: START INCREMENT SAMPLES; needs --train-samples", above=0
    )
    train_iters: int | None = option(None, "length of the run in steps", above=0)
    train_samples: int | None = option(None, "length of the run in samples", above=0)
    seed: int = option(1234, "decides initial weights, sample order and dropout", at_least=0, below=2**32)

    laws = (
        excludes("train_samples", "train_iters"),
        needs("rampup_batch_size", train_samples=GIVEN),
        needs("rampup_batch_size", global_batch_size=GIVEN),
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Objective."""

    stage: str = option("pretrain", "what is trained: pretrain (the next token)")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data."""

    data_path: tuple[str, ...] = option(
        (), "prefix of .bin/.idx, or WEIGHT PREFIX WEIGHT PREFIX ...; --split cuts it in three"
    )
    train_data_path: tuple[str, ...] = option((), "as --data-path, only for training; then --split is not used")
    valid_data_path: tuple[str, ...] = option((), "as --data-path, only for validation")
    test_data_path: tuple[str, ...] = option((), "as --data-path, only for the final test")
    split: str = option("969, 30, 1", "parts of --data-path for training, validation and test", metavar="A,B,C")
    data_cache_path: str | None = option(None, "directory for sample orders [beside the data]", metavar="DIR")
    dataloader_type: Literal["single", "cyclic"] = option(
        "single", "single: in the dataset's own (shuffled) order; cyclic: every epoch shuffled anew"
    )
    num_workers: int = option(0, "threads that read ahead per training process; 0 reads in place", at_least=0)
    eod_mask_loss: bool = option(False, "do not train what follows an end-of-document token")
    reset_position_ids: bool = option(False, "count positions anew in every document of a sample")
    reset_attention_mask: bool = option(False, "keep documents of one sample from attending to each other")

    laws = (ignored("split", data_path=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and schedule."""

    optimizer: str = option(
        "adam", "adam: AdamW, fused where the device has it; fused_adam, foreach_adam: that implementation; sgd"
    )
    lr: float = required("highest learning rate", above=0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", at_least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = option(
        "linear", "course of the learning rate after warm-up"
    )
    lr_decay_iters: int | None = option(None, "steps until --min-lr [the whole run]", above=0)
    lr_decay_samples: int | None = option(None, "samples until --min-lr, for runs in samples", above=0)
    lr_warmup_fraction: float | None = option(None, "warm-up as a fraction of the decay length", at_least=0, at_most=1)
    lr_warmup_iters: int = option(0, "warm-up in steps", at_least=0)
    lr_warmup_samples: int = option(0, "warm-up in samples, for runs in samples", at_least=0)
    lr_warmup_init: float = option(0.0, "learning rate at the start of the warm-up", at_least=0)
    weight_decay: float = option(0.01, "decay of weights; biases and norms are spared", at_least=0)
    start_weight_decay: float | None = option(
        None, "weight decay at the start, if --weight-decay-incr-style is not constant", at_least=0
    )
    end_weight_decay: float | None = option(
        None, "weight decay at the end, if --weight-decay-incr-style is not constant", at_least=0
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option(
        "constant", "course of the weight decay over the run"
    )
    clip_grad: float = option(1.0, "largest global gradient norm; 0 does not clip", at_least=0)
    adam_beta1: float = option(0.9, "Adam: memory of the gradient", at_least=0, below=1)
    adam_beta2: float = option(0.999, "Adam: memory of the squared gradient", at_least=0, below=1)
    adam_eps: float = option(1e-8, "Adam: added to the denominator", above=0)
    sgd_momentum: float = option(0.9, "SGD: momentum", at_least=0)
    override_opt_param_scheduler: bool = option(
        False,
        "on resume, take the schedule from the options, not from the checkpoint",
        aliases=("--override-opt_param-scheduler", "--override-lr-scheduler"),
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False,
        "on resume, take the schedule from the checkpoint, whatever the options say",
        aliases=("--use-checkpoint-opt_param-scheduler", "--use-checkpoint-lr-scheduler"),
    )

    laws = (
        at_most("min_lr", "lr_warmup_init", other="lr"),
        needs("lr_decay_samples", "lr_warmup_samples", train_samples=GIVEN),
        excludes("lr_decay_iters", "train_samples"),
        excludes("lr_warmup_iters", "train_samples", "lr_warmup_fraction"),
        excludes("lr_warmup_samples", "lr_warmup_fraction"),
        needs("start_weight_decay", "end_weight_decay", weight_decay_incr_style=but("constant")),
        at_most("start_weight_decay", other="end_weight_decay"),
        excludes("use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"),
        ignored("min_lr", lr_decay_style=but("constant")),
        ignored("lr_decay_iters", "lr_decay_samples", lr_decay_style=but("constant"), lr_warmup_fraction=GIVEN),
        ignored("lr_warmup_init", lr_warmup_iters=POSITIVE, lr_warmup_samples=POSITIVE, lr_warmup_fraction=POSITIVE),
        ignored("adam_beta1", "adam_beta2", "adam_eps", optimizer=but("sgd")),
        ignored("sgd_momentum", optimizer="sgd"),
    )


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions:
    """Precision: master weights and optimizer state are always float32."""

    fp16: bool = option(False, "compute in float16 with loss scaling")
    bf16: bool = option(False, "compute in bfloat16")
    accumulate_allreduce_grads_in_fp32: bool = option(
        True, "sum gradients over processes in float32 instead of the compute type"
    )
    loss_scale: float | None = option(None, "fp16: a fixed loss scale [dynamic]", above=0)
    initial_loss_scale: float = option(2.0**32, "fp16: first dynamic loss scale", above=0)
    min_loss_scale: float = option(1.0, "fp16: smallest dynamic loss scale", above=0)
    loss_scale_window: int = option(1000, "fp16: good steps before the loss scale doubles", above=0)
    hysteresis: int = option(2, "fp16: bad steps before the loss scale halves", above=0)

    laws = (
        excludes("fp16", "bf16"),
        needs("loss_scale", fp16=True),
        at_most("min_loss_scale", other="initial_loss_scale"),
        ignored("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis", fp16=True),
        ignored("initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis", loss_scale=NOT_GIVEN),
        ignored("accumulate_allreduce_grads_in_fp32", fp16=True, bf16=True),
    )


PipelineSchedule = Literal[
    "gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev", "fold_aiao", "fold_fifo"
]


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """Processes and parallelism."""

    nproc_per_node: int | None = option(
        None, "local processes to start [one per local device; not used under torchrun or Slurm]", above=0
    )
    tensor_model_parallel_size: int = option(
        1, "ranks that share the matrices of a layer: heads, width of the MLP, vocabulary", above=0
    )
    sequence_parallel: bool = option(
        False, "with tensor parallelism: share the tokens between its blocks out too, for norms and dropout"
    )
    tp_comm_overlap: bool = option(
        False,
        "with tensor parallelism: cut its products into parts, and let one part travel while the next is computed",
        aliases=("--use-mc2", "--use-ascend-mc2", "--use-ascend-coc"),
    )
    tp_comm_overlap_parts: int = option(
        4, "parts of a product with --tp-comm-overlap", aliases=("--coc-parallel-num",), above=0
    )
    pipeline_model_parallel_size: int = option(1, "ranks that share the layers, one or more stages each", above=0)
    pipeline_schedule: PipelineSchedule | None = option(
        None, "order of a pipeline's work [1f1b; interleaved where there are virtual stages]"
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers of each stage, where a pipeline rank has several", above=0
    )
    num_layer_list: str | None = option(
        None,
        "layers of each pipeline stage: 7,8,8,9 [even by what layers cost]",
        aliases=("--manual-layers",),
        metavar="N,N,...",
    )
    use_manual_layer_allocation: bool = option(False, "the layers of stages have to be given, by --num-layer-list")
    noop_layers: str | None = option(
        None, "places of layers that are not there but count when stages are given as many each: 0,127", metavar="N,..."
    )
    optimized_pipeline: bool = option(False, "1F1B with micro-batches of the sizes --manual-mbs gives")
    manual_mbs: str | None = option(
        None,
        "samples of each micro-batch of a step on one data-parallel rank: 1,2,3,2, or example-config-1 or -2",
        metavar="N,N,...",
    )
    fold_mode: Literal["aiao", "fifo"] | None = option(
        None,
        "virtual stages one after another (aiao) or in turns (fifo), the gradients of each reduced under the next",
        aliases=("--foldx-mode",),
    )
    pipeline_timeline: str | None = option(
        None, "write when each rank of the pipeline did what in the second step, as JSON", metavar="FILE"
    )
    context_parallel_size: int = option(1, "ranks that share the tokens of each sequence", above=0)
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] = option(
        "ulysses_cp_algo",
        "how those attend to all tokens: exchange heads for tokens, hand keys and values round a ring, or both",
    )
    ulysses_degree_in_cp: int | None = option(
        None, "hybrid_cp_algo: ranks that exchange heads for tokens; as many such groups make the ring", above=0
    )
    cp_window_size: int = option(1, "ranks of an inner ring within the ring; 1 is one plain ring", above=0)
    use_cp_send_recv_overlap: bool = option(False, "compute while the next keys and values of a ring are on their way")
    kv_head_repeat_before_uly_alltoall: bool = option(
        True,
        "key and value heads that the exchanging ranks cannot divide: repeat them; else all ranks get all of them",
    )
    cp_attention_mask_type: Literal["causal", "full"] = option(
        "causal", "full: with context parallelism every token sees later ones too"
    )
    expert_model_parallel_size: int = option(
        1,
        "ranks, of those with different samples or tokens, that share the experts",
        aliases=("--moe-expert-parallel-size",),
        above=0,
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = option(
        "alltoall",
        "how tokens reach experts of other ranks: each is sent where its experts are, or all are gathered everywhere",
    )
    moe_permutation_async_comm: bool = option(
        False,
        "let the messages to experts of other ranks overlap, each other and the sorting of tokens; results are equal",
    )
    zero_stage: Literal[0, 1, 2, 3] = option(
        1,
        "what data-parallel ranks share out: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too",
        shorthands={"--use-distributed-optimizer": 1},
    )
    num_distributed_optimizer_instances: int = option(
        1, "how often what --zero-stage shares out is repeated, each copy over fewer ranks (HSDP)", above=0
    )
    overlap_grad_reduce: bool = option(
        False, "let two layers' gradients travel at a time, not one, under the backward: less waiting, more memory"
    )
    delay_grad_reduce: bool = option(False, "hold gradients back until all pipeline stages can send theirs")
    overlap_param_gather: bool = option(
        False, "gather the weights of two layers before their turn has come: less waiting, more memory"
    )
    delay_param_gather: bool = option(
        False, "with --zero-stage 3: gather weights for the backward when a layer's turn has come, never ahead"
    )
    deepspeed: bool = option(False, "as scripts for DeepSpeed say it: there must be a --deepspeed-config")
    deepspeed_config: str | None = option(
        None,
        "JSON file of DeepSpeed: its ZeRO stage, precision, batch sizes and clipping are taken over",
        aliases=("--deepspeed_config",),
        metavar="FILE",
    )
    distributed_backend: Literal["gloo", "nccl", "hccl"] | None = option(
        None, "communication library [the device's own]"
    )
    distributed_timeout_minutes: float = option(
        45.0, "how long a rank waits for the others in a collective, before it gives up", above=0
    )

    laws = (
        ignored("tp_comm_overlap", "tp_comm_overlap_parts", tensor_model_parallel_size=SEVERAL),
        needs("pipeline_schedule", "num_layers_per_virtual_pipeline_stage", pipeline_model_parallel_size=SEVERAL),
        needs("num_layer_list", "noop_layers", "fold_mode", "pipeline_timeline", pipeline_model_parallel_size=SEVERAL),
        excludes("num_layer_list", "num_layers_per_virtual_pipeline_stage", "noop_layers"),
        needs("use_manual_layer_allocation", num_layer_list=GIVEN),
        needs("fold_mode", num_layers_per_virtual_pipeline_stage=GIVEN),
        needs("optimized_pipeline", manual_mbs=GIVEN),
        needs("manual_mbs", optimized_pipeline=True),
        excludes("manual_mbs", "rampup_batch_size"),
        ignored("context_parallel_algo", "ulysses_degree_in_cp", "cp_window_size", context_parallel_size=SEVERAL),
        ignored("cp_attention_mask_type", "use_cp_send_recv_overlap", context_parallel_size=SEVERAL),
        ignored("kv_head_repeat_before_uly_alltoall", context_parallel_size=SEVERAL),
        ignored("use_cp_send_recv_overlap", context_parallel_algo=but("ulysses_cp_algo")),
        ignored("kv_head_repeat_before_uly_alltoall", context_parallel_algo=but("megatron_cp_algo")),
        ignored("moe_token_dispatcher_type", "moe_permutation_async_comm", expert_model_parallel_size=SEVERAL),
        ignored("overlap_grad_reduce", "overlap_param_gather", "delay_param_gather", nproc_per_node=SEVERAL),
        ignored(
            "delay_grad_reduce", why="a layer's gradients are always reduced right after its part of the last backward"
        ),
        ignored("overlap_param_gather", zero_stage=POSITIVE),
        ignored("delay_param_gather", zero_stage=3),
        excludes("overlap_param_gather", "delay_param_gather"),
        needs("num_distributed_optimizer_instances", zero_stage=POSITIVE),
        needs("deepspeed", deepspeed_config=GIVEN),
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Checkpoints."""

    save: str | None = option(
        None, "directory for checkpoints, or a URL of a store that fsspec knows (s3://bucket/run)", metavar="DIR|URL"
    )
    save_interval: int | None = option(
        None, "steps between checkpoints, needed with --save; one is always written at the end", above=0
    )
    keep_last: int | None = option(None, "keep only this many newest checkpoints [all]", above=0)
    async_save: bool = option(True, "write checkpoints in the background while training goes on")
    save_optim: bool = option(True, "write optimizer state; without it a run cannot resume exactly")
    load: str | None = option(
        None,
        "checkpoint directory, or its URL, to resume from, or a model to start from: a directory of any format that "
        "cordee convert reads (Hugging Face, Megatron, ...), or a file of GGUF",
        metavar="DIR|URL|FILE",
    )
    ckpt_step: int | None = option(None, "step to load instead of the newest complete one", at_least=0)
    finetune: bool = option(False, "take only the weights of --load and start at step 0")
    load_optim: bool = option(True, "take the optimizer state of --load")
    load_rng: bool = option(True, "take the random state of --load")
    exit_on_missing_checkpoint: bool = option(
        False, "stop if --load, where it is --save, holds no checkpoint yet, instead of starting from initial weights"
    )

    laws = (
        needs("save_interval", "keep_last", save=GIVEN),
        needs("ckpt_step", "finetune", "exit_on_missing_checkpoint", load=GIVEN),
    )


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation."""

    eval_interval: int = option(1000, "steps between validations", above=0)
    eval_iters: int = option(100, "global batches per validation; 0 validates never", at_least=0)
    skip_train: bool = option(False, "only validate and test, do not train")

    laws = (ignored("eval_interval", eval_iters=POSITIVE),)


@dataclass(frozen=True, kw_only=True)
class ExitOptions:
    """Ending early: each way saves a checkpoint first."""

    exit_interval: int | None = option(None, "stop at a step that this divides", above=0)
    exit_duration_in_mins: float | None = option(None, "stop after this many minutes", above=0)
    exit_signal_handler: bool = option(True, "on SIGTERM or Ctrl-C finish the step, save and stop")
    exit_grace_seconds: float = option(
        120.0, "how long the launcher waits for processes that were told to stop before it kills them", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Logging."""

    log_interval: int = option(10, "steps between log lines", above=0)
    log_throughput: bool = option(True, "write TFLOP/s per device in the log line")
    log_params_norm: bool = option(False, "write the L2 norm of all weights in the log line")
    log_num_zeros_in_grad: bool = option(False, "write the number of zero gradients in the log line")
    tensorboard_dir: str | None = option(None, "write TensorBoard events there", metavar="DIR")
    tensorboard_log_interval: int = option(1, "steps between TensorBoard values", above=0)
    metrics_file: str | None = option(None, "one JSON line per log line [metrics.jsonl in --save]", metavar="FILE")
    peak_tflops: float | None = option(
        None, "peak of one device in TFLOP/s, for MFU [known for the device, else measured at the start]", above=0
    )

    laws = (ignored("tensorboard_log_interval", tensorboard_dir=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class PerformanceOptions:
    """Performance."""

    compile: Literal["none", "blocks", "model"] = option("none", "torch.compile: each layer, or the whole model")
    manual_gc: bool = option(False, "run Python's garbage collector on all ranks at the same steps only")
    manual_gc_interval: int = option(
        0, "steps between collections with --manual-gc; 0: only at validations", at_least=0
    )
    use_deter_comp: bool = option(
        False, "deterministic kernels only: two runs give the same bits", aliases=("--deterministic-mode",)
    )

    laws = (needs("manual_gc_interval", manual_gc=True),)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(
    ModelOptions,
    ExpertTrainingOptions,
    TokenizerOptions,
    BatchOptions,
    ObjectiveOptions,
    DataOptions,
    OptimizerOptions,
    PrecisionOptions,
    ParallelOptions,
    CheckpointOptions,
    ValidationOptions,
    ExitOptions,
    LoggingOptions,
    PerformanceOptions,
    PortedOptions,
):
    """A training run."""


# ----------------------------------------------------------------------------------------------- the other jobs


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """Model to run."""

    load: str = required(
        "model: a directory of any format that cordee convert reads (Hugging Face, Megatron, checkpoints of a run, "
        "...), a URL of checkpoints of a run, or a file of GGUF",
        metavar="DIR|URL|FILE",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "type of weights and arithmetic [as stored]", synonyms=_DTYPE_SYNONYMS
    )
    device: str | None = option(None, "device to run on [the fastest there is]")


@dataclass(frozen=True, kw_only=True)
class InferenceLayoutOptions:
    """Processes that share the model: as many as the product of the two degrees."""

    tensor_model_parallel_size: int = option(1, "processes that share the matrices of a layer", above=0)
    pipeline_model_parallel_size: int = option(1, "processes that share the layers", above=0)
    distributed_backend: Literal["gloo", "nccl", "hccl"] | None = option(
        None, "communication library [the device's own]"
    )
    distributed_timeout_minutes: float = option(45, "how long a collective may take", above=0)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Decoding."""

    max_new_tokens: int = option(128, "tokens to write at most", above=0)
    do_sample: bool = option(False, "draw tokens at random [off: always the most likely token]")
    temperature: float = option(1.0, "with --do-sample: below 1 bolder choices are rarer", above=0)
    top_k: int = option(0, "with --do-sample: only the k most likely tokens; 0 does not cut", at_least=0)
    top_p: float = option(
        1.0, "with --do-sample: only the most likely tokens that together reach this probability", above=0, at_most=1
    )
    batch_size: int = option(8, "continuations computed at the same time", above=0)
    use_kv_cache: bool = option(True, "keep keys and values of earlier tokens", negations=("--no-kv-cache",))
    straight_decoding: bool = option(
        True, "fused decode path for single tokens, where the model has one; off: through its modules"
    )
    seed: int = option(1234, "decides what --do-sample draws", at_least=0)

    laws = (needs("temperature", "top_k", "top_p", do_sample=True),)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(DecodingOptions):
    """Generation."""

    prompt: tuple[str, ...] = option((), "text to continue; several are continued as one batch", aliases=("--prompts",))
    prompts_file: str | None = option(None, "file with one prompt per line", metavar="FILE")
    num_return_sequences: int = option(
        1, "continuations per prompt, with --do-sample", aliases=("--num-samples",), above=0
    )
    output: str | None = option(None, "also write one JSON line per continuation", metavar="FILE")

    laws = (
        needs("num_return_sequences", do_sample=True),
        excludes("prompts_file", "prompt"),
    )


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(InferenceOptions, InferenceLayoutOptions, TokenizerOptions, GenerateOptions):
    """Text from prompts."""


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Evaluation."""

    task: tuple[str, ...] = option(("perplexity",), "benchmarks to run: perplexity")
    task_data_path: tuple[str, ...] = option((), "text files or prefixes of .bin/.idx, or a directory of texts")
    json_keys: tuple[str, ...] = option(
        ("text",), "columns of records that hold text, each a document of its own", aliases=("--json-key",)
    )
    whole_files: bool = option(False, "take a .txt file as one document, not every line as one")
    seq_length: int | None = option(None, "window of the model in tokens [its longest sequence]", above=0)
    stride: int | None = option(None, "tokens the window moves on [the window]", above=0)
    prepend_bos: bool = option(True, "begin every document with the tokenizer's bos token, if it has one")
    evaluation_batch_size: int = option(8, "sequences computed at the same time", above=0)
    max_eval_samples: int | None = option(None, "evaluate only the first documents [all]", above=0)
    skip_invalid: bool = option(False, "count and leave out records that cannot be read, instead of stopping")
    output: str | None = option(
        None, "also write the results as JSON; an interrupted evaluation resumes from FILE.partial", metavar="FILE"
    )

    laws = (at_most("stride", other="seq_length"),)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(InferenceOptions, InferenceLayoutOptions, TokenizerOptions, EvaluateOptions):
    """Scores of a model."""

    nproc_per_node: int | None = option(
        None, "processes of this machine; every so many as the degrees ask for are a copy of the model [one]", above=0
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Input and output."""

    input: str | None = option(
        None,
        "file or directory: json, jsonl, csv, txt, parquet, arrow, a document at most 16 MiB; to merge: directory of "
        ".bin/.idx",
        metavar="PATH",
    )
    output_prefix: str = required("writes PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    hf_datasets_params: str | None = option(
        None, "JSON file with the arguments of datasets.load_dataset, instead of --input", metavar="FILE"
    )
    streaming: bool = option(False, "with --hf-datasets-params: do not download first; local files always stream")
    json_keys: tuple[str, ...] = option(("text",), "columns to tokenize, each to its own pair", aliases=("--json-key",))
    append_eod: bool = option(False, "end every document with the tokenizer's end-of-document token")
    seq_length: int | None = option(None, "leave out documents of this many tokens or more", above=0)
    workers: int = option(1, "processes that tokenize; the output is the same for any number", above=0)
    n_subs: int = option(1, "so many times --workers processes tokenize", above=0)
    merge_group_keys: tuple[str, ...] = option(
        (), "join all pairs of --input whose names hold the key to PREFIX_KEY.bin and .idx; tokenizes nothing"
    )
    skip_invalid: bool = option(False, "count and leave out records that cannot be read, instead of stopping")
    overwrite: bool = option(False, "replace output that exists")
    log_interval: int = option(100, "documents between progress lines", above=0)

    laws = (needs("merge_group_keys", input=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(PreprocessOptions, TokenizerOptions):
    """Text to .bin/.idx."""


_FORMAT_SYNONYMS = {
    "huggingface": "hf",
    "llama2_hf": "hf",
    "megatron": "mg",
    "save_huggingface_llama": "hf",
    "loader_llama2_hf": "hf",
}


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Conversion."""

    load_dir: str = required(
        "directory to read: Hugging Face, Megatron (core, legacy, AscendSpeed, MindSpeed-LLM), pipelines of DeepSpeed, "
        "MindFormers names, DCP, GGUF (or the file itself), or a checkpoint of a run (also a URL, s3://bucket/run); "
        "what it is, and its degrees of parallelism, are read from it",
        aliases=("--input-model-dir",),
        metavar="DIR|URL",
    )
    save_dir: str = required(
        "directory to write; from mg to hf it may be the original model's, then it is DIR/mg2hf",
        aliases=("--output-model-dir",),
        metavar="DIR",
    )
    load_model_type: Literal["hf", "mg", "gguf"] | None = option(
        None, "what there must be to read [anything]", aliases=("--loader",), synonyms=_FORMAT_SYNONYMS
    )
    save_model_type: Literal["hf", "mg", "ascendspeed", "mindformers", "dcp", "gguf"] | None = option(
        None, "format to write [hf; mg with --saver megatron]", synonyms=_FORMAT_SYNONYMS
    )
    saver: Literal["megatron"] | None = option(None, "older name of --save-model-type mg")
    model_type: Literal["GPT", "BERT"] = option("GPT", "kind of model; there are decoders only")
    model_type_hf: str | None = option(
        None, "what the model must be, as MindSpeed-LLM calls it (llama2, mixtral, ...) [anything]", metavar="NAME"
    )
    model: str | None = option(
        None,
        "which model a Megatron checkpoint holds: a preset, or a directory with its config.json [by the config.json "
        "beside it, or by the settings in it]",
        metavar="PRESET|DIR",
    )
    params_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "type of the weights to write [as stored]", synonyms=_DTYPE_SYNONYMS
    )
    overwrite: bool = option(False, "replace output that exists")
    dry_run: bool = option(False, "only tell which files would be written, and how much memory that takes")
    verify: bool = option(False, "read what was written and compare: every tensor, and logits if there is memory")
    checking: bool = option(True, "refuse a Megatron checkpoint with tensors that are not the model's")
    workers: int = option(1, "threads, and one more, that read, convert and write, whatever the format", above=0)
    max_queue_size: int | None = option(None, "without effect: there is no queue; scripts of MindSpeed-LLM give it")
    megatron_path: str | None = option(
        None, "without effect: Megatron's code is not needed; scripts of MindSpeed-LLM give it", metavar="DIR"
    )

    laws = (
        ignored("max_queue_size", why="there is no queue"),
        ignored("megatron_path", why="Megatron's code is not needed"),
    )


def _of_ranks(kind: str) -> tuple[str, ...]:
    """How the converters of MindSpeed-LLM and AscendSpeed call the number of ranks to write."""
    return tuple(f"--{start}{kind}-model-parallel-size" for start in ("target-", "tgt-", ""))


@dataclass(frozen=True, kw_only=True)
class MegatronTargetOptions:
    """Megatron checkpoints to write."""

    use_mcore_models: bool = option(False, "write Megatron-Core's format [the legacy format]")
    save_to_legacy: bool = option(False, "with --use-mcore-models: write the legacy format all the same")
    load_from_legacy: bool = option(False, "what is read must be of the legacy format")
    transformer_impl: Literal["local", "transformer_engine", "mindspeed"] = option(
        "local", "whose names Megatron-Core's format has: its own layers', Transformer Engine's, MindSpeed-LLM's"
    )
    target_tensor_parallel_size: int = option(1, "tensor ranks to write", aliases=_of_ranks("tensor"), above=0)
    src_tensor_model_parallel_size: int | None = option(
        None, "tensor ranks that what is read must have [as it has]", above=0
    )
    src_pipeline_model_parallel_size: int | None = option(
        None, "pipeline stages that what is read must have [as it has]", above=0
    )
    target_pipeline_parallel_size: int = option(1, "pipeline stages to write", aliases=_of_ranks("pipeline"), above=0)
    target_expert_parallel_size: int = option(
        1, "expert ranks to write", aliases=("--target-expert-model-parallel-size",), above=0
    )
    num_layer_list: str | None = option(None, "layers of each stage: 7,8,8,9 [as many in each]", metavar="N,N,...")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers of a virtual stage [stages are one piece]", above=0
    )
    moe_grouped_gemm: bool = option(False, "store the experts of a rank together")
    make_vocab_size_divisible_by: int | None = option(
        None,
        "round rows of the embedding up to a multiple of this and of the tensor ranks [1; ascendspeed: 128]",
        above=0,
    )
    true_vocab_size: int | None = option(
        None,
        "tokens of a Megatron checkpoint that tells only padded rows",
        aliases=("--orig-vocab-size",),
        above=0,
    )
    vocab_file: str | None = option(None, "as --true-vocab-size: count the tokens of this vocab.json", metavar="FILE")
    tokenizer_model: str | None = option(None, "tokenizer to note in the checkpoint's settings", metavar="FILE")
    deepspeed: bool = option(False, "ascendspeed: files as DeepSpeed names them")
    merge_mlp: bool = option(False, "ascendspeed: gate and up in one tensor")
    w_pack: bool | None = option(
        None, "the Hugging Face model must (not) store q, k and v in one W_pack", shorthands={"--pse": True}
    )
    add_qkv_bias: bool | None = option(None, "the model must (not) have biases of q, k and v")
    add_dense_bias: bool | None = option(None, "the model must (not) have a bias after attention")
    embed_layernorm: bool | None = option(None, "the model must (not) have a norm after the embedding")
    post_norm: bool | None = option(None, "the model must (not) have norms after attention and MLP too")

    laws = (
        needs("save_to_legacy", use_mcore_models=True),
        excludes("vocab_file", "true_vocab_size"),
        needs("deepspeed", "merge_mlp", save_model_type="ascendspeed"),
    )


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """An adapter (LoRA) to merge into the weights."""

    lora_load: str | None = option(
        None, "directory of the adapter: of PEFT, or a Megatron checkpoint of LoRA training", metavar="DIR"
    )
    lora_r: int | None = option(None, "rank it must have [as it has]", above=0)
    lora_alpha: float | None = option(
        None, "the product of its matrices counts alpha / r [as it says; 32 where it does not]", above=0
    )
    lora_target_modules: tuple[str, ...] | None = option(
        None, "modules it must be of, such as linear_qkv or q_proj [as it is]", metavar="NAME"
    )

    laws = (needs("lora_r", "lora_alpha", "lora_target_modules", lora_load=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ConvertOptions, MegatronTargetOptions, AdapterOptions):
    """Weights from one format to another."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measurement."""

    steps: int | None = option(None, "steps (tokens, files) per round [enough for a steady median]", above=0)
    rounds: int = option(5, "rounds in which contenders take turns; suites without contenders have one", above=0)
    threads: int | None = option(None, "CPU threads [all cores]", above=0)
    compile: Literal["none", "blocks", "model"] = option("none", "train: what of Cordée's model torch.compile gets")
    load: str | None = option(None, "generate: model directory [a random Llama, 35 M parameters]", metavar="DIR")
    model: str | None = option(None, "convert: preset whose shape the checkpoint has [llama2-13b]", metavar="PRESET")
    scratch: str | None = option(
        None, "convert: directory with room for the checkpoint [the system's for temporary files]", metavar="DIR"
    )
    discard: bool = option(
        False, "convert: give what is written back to the disk at once, for checkpoints larger than the disk"
    )
    output: str | None = option(
        None, "also write the report, as Markdown to a name that ends in .md, else as JSON", metavar="FILE"
    )


@dataclass(frozen=True, kw_only=True)
class BenchConfig(BenchOptions):
    """Speed and memory against peers."""

    suite: Literal["train", "generate", "preprocess", "convert", "parity", "resume"] = required(
        "what to measure", positional=True
    )


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Pipeline schedules, simulated."""

    schedule: tuple[PipelineSchedule, ...] = option(
        ("1f1b",), f"what to simulate; several are compared: {', '.join(get_args(PipelineSchedule))}", metavar="NAME"
    )
    pipeline_model_parallel_size: int | None = option(None, "ranks of the pipeline [4, or as --manual-mbs]", above=0)
    stages_per_rank: int | None = option(None, "stages of a rank, for schedules that leave a choice [2]", above=0)
    num_layers: int | None = option(None, "layers of the model [one or more a stage, as few as possible]", above=0)
    num_layer_list: str | None = option(None, "layers of each stage: 7,8,8,9 [as many in each]", metavar="N,N,...")
    num_micro_batches: int | None = option(None, "micro-batches of a step [8, or as --manual-mbs]", above=0)
    micro_batch_size: int | None = option(None, "samples of a micro-batch [1, or as --manual-mbs]", above=0)
    manual_mbs: str | None = option(
        None,
        "compare 1f1b with micro-batches of these sizes too: example-config-1, example-config-2 or 1,2,3,...",
        metavar="LIST",
    )
    forward_time: float = option(1.0, "forward of one sample through one layer, in any unit of time", above=0)
    backward_time: float | None = option(None, "whole backward of one sample through one layer [2 forwards]", above=0)
    backward_input_time: float | None = option(None, "the part of it that is by inputs [half]", above=0)
    fixed_time: float = option(0.0, "time of each forward and backward besides, whatever its size", at_least=0)
    communication_time: float = option(0.0, "sending the activations of one sample to the next rank", at_least=0)
    reduction_time: float = option(0.0, "reducing the gradients of one layer over data-parallel ranks", at_least=0)
    timeline: str | None = option(
        None, "compare with the measured step in this JSON file, which a run wrote", metavar="FILE"
    )
    output: str | None = option(None, "draw the schedules: .svg or .png", metavar="FILE")

    laws = (excludes("num_layers", "num_layer_list"),)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(PlanOptions):
    """What a run will be like."""


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """Quickstart."""

    input: str | None = option(
        None, "your text: a file or a directory [the sources of Python's standard library]", metavar="PATH"
    )
    output: str = option("quickstart-run", "directory for all results", metavar="DIR")
    nproc_per_node: int = option(2, "training processes", above=0)
    train_iters: int | None = option(None, "steps [as many as fit in --train-seconds]", above=0)
    train_seconds: float = option(100.0, "time for training", above=0)
    seed: int = option(1234, "decides initial weights and sample order", at_least=0, below=2**32)
    overwrite: bool = option(False, "replace the results of an earlier quickstart")


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig(QuickstartOptions):
    """The whole climb on this machine."""
