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
    ) = option(None, "tokenizer class [PretrainedFromHF with the tokenizer in --load, if there is one]")
    tokenizer_name_or_path: str | None = option(None, "PretrainedFromHF: Hugging Face tokenizer", metavar="DIR")
    tokenizer_model: str | None = option(None, "SentencePiece, Llama2 and TikTokenizer: the model file", metavar="FILE")
    vocab_file: str | None = option(None, "GPT2BPETokenizer: vocabulary, JSON", metavar="FILE")
    merge_file: str | None = option(None, "GPT2BPETokenizer: BPE merges, text", metavar="FILE")
    tokenizer_kwargs: Mapping[str, str | int | bool] = option(
        {}, "PretrainedFromHF: further keyword arguments: key value key value ..."
    )
    tokenizer_use_fast: bool = option(
        True, "PretrainedFromHF: use the fast (Rust) implementation", negations=("--tokenizer-not-use-fast",)
    )


# ------------------------------------------------------------------------------------------------ a training run


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batch, gradient accumulation and length of the run."""

    seq_length: int = required("sequence length: tokens per sample", above=0)
    micro_batch_size: int = option(1, "samples of one forward and backward on a data-parallel rank", above=0)
    global_batch_size: int | None = option(
        None, "samples per step: micro-batch x data-parallel ranks x gradient accumulation steps [x 1]", above=0
    )
    rampup_batch_size: tuple[int, int, int] | None = option(
        None, "batch size ramp-up, START INCREMENT SAMPLES: over so many samples up to --global-batch-size", above=0
    )
    train_iters: int | None = option(None, "length of the run in iterations (optimizer steps)", above=0)
    train_samples: int | None = option(None, "length of the run in samples", above=0)
    seed: int = option(1234, "random seed of initial weights, shuffling and dropout", at_least=0, below=2**32)

    laws = (
        excludes("train_samples", "train_iters"),
        needs("rampup_batch_size", train_samples=GIVEN),
        needs("rampup_batch_size", global_batch_size=GIVEN),
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """Objective."""

    stage: str = option("pretrain", "training objective: pretrain (next-token prediction)")


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Data."""

    data_path: tuple[str, ...] = option(
        (), ".bin/.idx prefix, or a blend: WEIGHT PREFIX WEIGHT PREFIX ...; --split divides it in three"
    )
    train_data_path: tuple[str, ...] = option((), "as --data-path, for training only; --split is then ignored")
    valid_data_path: tuple[str, ...] = option((), "as --data-path, for validation only")
    test_data_path: tuple[str, ...] = option((), "as --data-path, for the final test only")
    split: str = option("969, 30, 1", "proportions of --data-path for training, validation and test", metavar="A,B,C")
    data_cache_path: str | None = option(
        None, "cache directory of sample indices (shuffled orders) [beside the data]", metavar="DIR"
    )
    dataloader_type: Literal["single", "cyclic"] = option(
        "single", "sampler: single: sequential over the dataset's own shuffled index; cyclic: reshuffled every epoch"
    )
    num_workers: int = option(
        0, "dataloader threads that prefetch batches per training process; 0 loads in the main thread", at_least=0
    )
    eod_mask_loss: bool = option(False, "loss mask: no loss on the token after an end-of-document (EOD) token")
    reset_position_ids: bool = option(False, "restart position ids at every document of a sample")
    reset_attention_mask: bool = option(
        False, "block-diagonal attention mask: documents packed into one sample do not attend to each other"
    )

    laws = (ignored("split", data_path=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Optimizer and learning rate schedule."""

    optimizer: str = option(
        "adam",
        "adam: AdamW, fused where the device has a fused kernel; fused_adam, foreach_adam: that implementation; sgd",
    )
    lr: float = required("peak learning rate", above=0)
    min_lr: float = option(0.0, "learning rate at the end of the decay", at_least=0)
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = option(
        "linear", "learning rate schedule after warm-up"
    )
    lr_decay_iters: int | None = option(None, "decay length: iterations until --min-lr [the whole run]", above=0)
    lr_decay_samples: int | None = option(None, "decay length in samples, with --train-samples [whole run]", above=0)
    lr_warmup_fraction: float | None = option(None, "linear warm-up / decay length", at_least=0, at_most=1)
    lr_warmup_iters: int = option(0, "linear warm-up in iterations", at_least=0)
    lr_warmup_samples: int = option(0, "linear warm-up in samples, for runs with --train-samples", at_least=0)
    lr_warmup_init: float = option(0.0, "learning rate at the start of warm-up", at_least=0)
    weight_decay: float = option(0.01, "decoupled weight decay; biases and norm weights are not decayed", at_least=0)
    start_weight_decay: float | None = option(
        None, "weight decay at the start of the run, if --weight-decay-incr-style is not constant", at_least=0
    )
    end_weight_decay: float | None = option(
        None, "weight decay at the end of the run, if --weight-decay-incr-style is not constant", at_least=0
    )
    weight_decay_incr_style: Literal["constant", "linear", "cosine"] = option("constant", "weight decay schedule")
    clip_grad: float = option(1.0, "gradient clipping: maximum global L2 norm of gradients; 0: no clipping", at_least=0)
    adam_beta1: float = option(0.9, "first-moment decay (Adam beta1), of the mean of gradients", at_least=0, below=1)
    adam_beta2: float = option(0.999, "second-moment decay (Adam beta2), of squared gradients", at_least=0, below=1)
    adam_eps: float = option(1e-8, "Adam epsilon, added to the denominator", above=0)
    sgd_momentum: float = option(0.9, "SGD momentum factor", at_least=0)
    override_opt_param_scheduler: bool = option(
        False,
        "on resume, take learning rate and weight decay schedules from the options, not the checkpoint",
        aliases=("--override-opt_param-scheduler", "--override-lr-scheduler"),
    )
    use_checkpoint_opt_param_scheduler: bool = option(
        False,
        "on resume, take them from the checkpoint, whatever the options say",
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

    fp16: bool = option(False, "mixed precision: compute in float16, with loss scaling")
    bf16: bool = option(False, "mixed precision: compute in bfloat16")
    accumulate_allreduce_grads_in_fp32: bool = option(
        True, "all-reduce and reduce-scatter gradients in float32, not in the compute dtype"
    )
    loss_scale: float | None = option(None, "fp16: static loss scale [dynamic loss scaling]", above=0)
    initial_loss_scale: float = option(2.0**32, "fp16: initial dynamic loss scale", above=0)
    min_loss_scale: float = option(1.0, "fp16: minimum dynamic loss scale", above=0)
    loss_scale_window: int = option(1000, "fp16: steps without overflow before the loss scale doubles", above=0)
    hysteresis: int = option(2, "fp16: overflow steps (inf or NaN gradients) before the loss scale halves", above=0)

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
    """Parallelism: processes, sharding, ZeRO and communication overlap."""

    nproc_per_node: int | None = option(
        None, "processes (ranks) to start here; torchrun and Slurm start their own [one per local device]", above=0
    )
    tensor_model_parallel_size: int = option(
        1, "tensor parallelism (TP): ranks that shard the weights: heads, MLP width, vocabulary", above=0
    )
    sequence_parallel: bool = option(
        False, "with TP, shard activations of norms and dropout by tokens: all-gather and reduce-scatter"
    )
    tp_comm_overlap: bool = option(
        False,
        "run the GEMMs of TP in chunks: all-gather or reduce-scatter of one chunk overlaps the GEMM of the next",
        aliases=("--use-mc2", "--use-ascend-mc2", "--use-ascend-coc"),
    )
    tp_comm_overlap_parts: int = option(
        4, "--tp-comm-overlap: chunks of a GEMM", aliases=("--coc-parallel-num",), above=0
    )
    pipeline_model_parallel_size: int = option(
        1, "pipeline parallelism (PP): ranks that shard the layers into stages", above=0
    )
    pipeline_schedule: PipelineSchedule | None = option(
        None,
        "pipeline schedule; zero-bubble ones split backward in input-gradient (dgrad) and weight-gradient (wgrad)"
        " [1f1b, or interleaved with virtual stages]",
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers per virtual pipeline stage (model chunk), with several stages per rank", above=0
    )
    num_layer_list: str | None = option(
        None,
        "layers of each pipeline stage: 7,8,8,9 [balanced by FLOPs]",
        aliases=("--manual-layers",),
        metavar="N,N,...",
    )
    use_manual_layer_allocation: bool = option(False, "require --num-layer-list for the layers of the pipeline stages")
    noop_layers: str | None = option(
        None, "indices of no-op layers, which compute nothing but count in the size of a stage: 0,127", metavar="N,..."
    )
    optimized_pipeline: bool = option(False, "1F1B schedule with micro-batches of the sizes in --manual-mbs")
    manual_mbs: str | None = option(
        None, "samples of each micro-batch of a step and rank: 1,2,3,2, or example-config-1 or -2", metavar="N,N,..."
    )
    fold_mode: Literal["aiao", "fifo"] | None = option(
        None,
        "virtual stages one by one (aiao) or in turns (fifo), reducing gradients under the next backward",
        aliases=("--foldx-mode",),
    )
    pipeline_timeline: str | None = option(
        None, "write the timeline of the second step, per pipeline rank, as JSON", metavar="FILE"
    )
    context_parallel_size: int = option(
        1, "context parallelism (CP): ranks over which the tokens of each sequence are sharded", above=0
    )
    context_parallel_algo: Literal["ulysses_cp_algo", "megatron_cp_algo", "hybrid_cp_algo"] = option(
        "ulysses_cp_algo",
        "Ulysses (all-to-all over heads and sequence), ring attention (megatron_cp_algo, rotates KV), or both (hybrid)",
    )
    ulysses_degree_in_cp: int | None = option(
        None, "hybrid_cp_algo: ranks of an all-to-all; ring ranks = context-parallel-size / this", above=0
    )
    cp_window_size: int = option(1, "ring attention: ranks per inner ring (double ring); 1: one single ring", above=0)
    use_cp_send_recv_overlap: bool = option(False, "ring attention: overlap send/recv of the next KV with compute")
    kv_head_repeat_before_uly_alltoall: bool = option(
        True, "Ulysses, KV heads not divisible by its ranks: repeat them; off: all-gather them"
    )
    cp_attention_mask_type: Literal["causal", "full"] = option(
        "causal", "attention mask under context parallelism; full: bidirectional"
    )
    expert_model_parallel_size: int = option(
        1,
        "expert parallelism (EP): data- and context-parallel ranks that shard the experts",
        aliases=("--moe-expert-parallel-size",),
        above=0,
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = option(
        "alltoall", "MoE token dispatch over EP ranks: all-to-all, or all-gather and reduce-scatter"
    )
    moe_permutation_async_comm: bool = option(
        False, "overlap expert communication with token permutation; results are bit-identical"
    )
    zero_stage: Literal[0, 1, 2, 3] = option(
        1,
        "ZeRO (FSDP): data-parallel ranks 0 replicate (DDP), 1 shard optimizer state, 2 gradients too, 3 "
        "parameters too",
        shorthands={"--use-distributed-optimizer": 1},
    )
    num_distributed_optimizer_instances: int = option(
        1, "HSDP: replicas of the sharded state, each over fewer data-parallel ranks", above=0
    )
    overlap_grad_reduce: bool = option(
        False, "two gradient buckets (layers) in flight, not one: reduce-scatter overlaps more of backward"
    )
    delay_grad_reduce: bool = option(False, "delay gradient reduce-scatter until all pipeline stages can start theirs")
    overlap_param_gather: bool = option(
        False, "prefetch two layers, not one: all-gather of parameters overlaps more compute; more memory"
    )
    delay_param_gather: bool = option(
        False, "--zero-stage 3: no prefetch in backward; all-gather parameters when a layer needs them"
    )
    deepspeed: bool = option(False, "switch of DeepSpeed scripts; needs --deepspeed-config")
    deepspeed_config: str | None = option(
        None,
        "DeepSpeed JSON file: ZeRO stage, precision, batch sizes, gradient clipping",
        aliases=("--deepspeed_config",),
        metavar="FILE",
    )
    distributed_backend: Literal["gloo", "nccl", "hccl"] | None = option(
        None, "collective communication library [the device's]"
    )
    distributed_timeout_minutes: float = option(45.0, "minutes until a collective or rendezvous times out", above=0)

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
        ignored("delay_grad_reduce", why="a layer's gradients are always reduced right after its last backward"),
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
        None, "checkpoint directory to write, or a URL that fsspec knows (s3://bucket/run)", metavar="DIR|URL"
    )
    save_interval: int | None = option(
        None, "iterations between checkpoints, required with --save; the last iteration is always saved", above=0
    )
    keep_last: int | None = option(None, "keep only this many newest checkpoints [all]", above=0)
    async_save: bool = option(True, "asynchronous checkpoints: write in the background while training continues")
    save_optim: bool = option(True, "save optimizer state; a run cannot resume exactly without it")
    load: str | None = option(
        None,
        "checkpoint directory or URL to resume from, or weights to start from, of any format that cordee convert "
        "reads (Hugging Face, Megatron, GGUF, ...)",
        metavar="DIR|URL|FILE",
    )
    ckpt_step: int | None = option(None, "iteration to load [the last good checkpoint]", at_least=0)
    finetune: bool = option(False, "load only the weights of --load, start at iteration 0")
    load_optim: bool = option(True, "resume the optimizer state of --load")
    load_rng: bool = option(True, "resume the random number generator (RNG) state of --load")
    exit_on_missing_checkpoint: bool = option(
        False, "exit if --load is --save and holds no checkpoint, instead of starting anew"
    )

    laws = (
        needs("save_interval", "keep_last", save=GIVEN),
        needs("ckpt_step", "finetune", "exit_on_missing_checkpoint", load=GIVEN),
    )


@dataclass(frozen=True, kw_only=True)
class ValidationOptions:
    """Validation."""

    eval_interval: int = option(1000, "iterations between validations", above=0)
    eval_iters: int = option(100, "global batches per validation; 0: no validation", at_least=0)
    skip_train: bool = option(False, "skip training, only validate and test")

    laws = (ignored("eval_interval", eval_iters=POSITIVE),)


@dataclass(frozen=True, kw_only=True)
class ExitOptions:
    """Exit: each way saves a checkpoint first."""

    exit_interval: int | None = option(None, "save and exit at an iteration that is divisible by this", above=0)
    exit_duration_in_mins: float | None = option(None, "save and exit after this many minutes", above=0)
    exit_signal_handler: bool = option(True, "on SIGTERM or Ctrl-C, finish the iteration, save a checkpoint and exit")
    exit_grace_seconds: float = option(120.0, "seconds from SIGTERM to SIGKILL of a rank's process", at_least=0)


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Logging."""

    log_interval: int = option(10, "iterations between log lines", above=0)
    log_throughput: bool = option(True, "log TFLOP/s per device (model FLOPs: recompute does not count)")
    log_params_norm: bool = option(False, "log the L2 norm of all parameters")
    log_num_zeros_in_grad: bool = option(False, "log the number of zeros in the gradients")
    tensorboard_dir: str | None = option(None, "write TensorBoard events to this directory", metavar="DIR")
    tensorboard_log_interval: int = option(1, "iterations between TensorBoard values", above=0)
    metrics_file: str | None = option(None, "one JSON line per log line [metrics.jsonl in --save]", metavar="FILE")
    peak_tflops: float | None = option(
        None, "peak TFLOP/s of a device, for MFU [known for the device, or measured]", above=0
    )

    laws = (ignored("tensorboard_log_interval", tensorboard_dir=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class PerformanceOptions:
    """Performance."""

    compile: Literal["none", "blocks", "model"] = option(
        "none", "torch.compile of each transformer layer (blocks) or of the whole model"
    )
    manual_gc: bool = option(False, "run Python's garbage collector on all ranks at the same iterations only")
    manual_gc_interval: int = option(0, "--manual-gc: iterations between collections; 0: at validations", at_least=0)
    use_deter_comp: bool = option(
        False, "deterministic kernels only: two runs are bit-identical", aliases=("--deterministic-mode",)
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
        "model, of any format that cordee convert reads: Hugging Face, Megatron, checkpoints of a run (also a "
        "URL), GGUF",
        metavar="DIR|URL|FILE",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of weights and activations [as stored]", synonyms=_DTYPE_SYNONYMS
    )
    device: str | None = option(None, "device to run on [the fastest available]")


@dataclass(frozen=True, kw_only=True)
class InferenceLayoutOptions:
    """Parallelism of the model: tensor x pipeline processes."""

    tensor_model_parallel_size: int = option(1, "tensor parallelism: processes that shard the weights", above=0)
    pipeline_model_parallel_size: int = option(1, "pipeline parallelism: processes that shard the layers", above=0)
    distributed_backend: Literal["gloo", "nccl", "hccl"] | None = option(
        None, "collective communication library [the device's]"
    )
    distributed_timeout_minutes: float = option(45, "minutes until a collective times out", above=0)


@dataclass(frozen=True, kw_only=True)
class DecodingOptions:
    """Decoding."""

    max_new_tokens: int = option(128, "maximum number of tokens to generate", above=0)
    do_sample: bool = option(False, "sample tokens [off: greedy decoding]")
    temperature: float = option(1.0, "with --do-sample: softmax temperature; lower is more deterministic", above=0)
    top_k: int = option(0, "with --do-sample: sample from the k most likely tokens; 0: no limit", at_least=0)
    top_p: float = option(
        1.0, "with --do-sample: nucleus sampling, smallest set with this probability", above=0, at_most=1
    )
    batch_size: int = option(8, "sequences decoded in one batch", above=0)
    use_kv_cache: bool = option(True, "keep keys and values of earlier tokens (KV cache)", negations=("--no-kv-cache",))
    straight_decoding: bool = option(True, "fused decode path for single tokens, if the model supports it")
    seed: int = option(1234, "random seed of --do-sample", at_least=0)

    laws = (needs("temperature", "top_k", "top_p", do_sample=True),)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(DecodingOptions):
    """Generation."""

    prompt: tuple[str, ...] = option((), "prompt text; several prompts are one batch", aliases=("--prompts",))
    prompts_file: str | None = option(None, "file with one prompt per line", metavar="FILE")
    num_return_sequences: int = option(1, "sequences per prompt, with --do-sample", aliases=("--num-samples",), above=0)
    output: str | None = option(None, "also write one JSON line per generated sequence", metavar="FILE")

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

    task: tuple[str, ...] = option(("perplexity",), "benchmark tasks to run: perplexity")
    task_data_path: tuple[str, ...] = option((), "text files or prefixes of .bin/.idx, or a directory of texts")
    json_keys: tuple[str, ...] = option(
        ("text",), "fields of a record that hold text, each a document of its own", aliases=("--json-key",)
    )
    whole_files: bool = option(False, "take a .txt file as one document, not every line as one")
    seq_length: int | None = option(None, "context window in tokens [the model's max-position-embeddings]", above=0)
    stride: int | None = option(None, "sliding window perplexity: tokens between windows [the window]", above=0)
    prepend_bos: bool = option(True, "prepend the tokenizer's BOS token to every document, if it has one")
    evaluation_batch_size: int = option(8, "sequences scored in one batch", above=0)
    max_eval_samples: int | None = option(None, "evaluate only the first documents [all]", above=0)
    skip_invalid: bool = option(False, "count and skip records that cannot be read, instead of aborting")
    output: str | None = option(
        None, "also write the results as JSON; an interrupted evaluation resumes from FILE.partial", metavar="FILE"
    )

    laws = (at_most("stride", other="seq_length"),)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(InferenceOptions, InferenceLayoutOptions, TokenizerOptions, EvaluateOptions):
    """Scores of a model."""

    nproc_per_node: int | None = option(
        None, "processes of this node, data-parallel over copies of the model [one copy]", above=0
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """Input and output."""

    input: str | None = option(
        None,
        "file or directory: json, jsonl, csv, txt, parquet, arrow, documents of at most 16 MiB; to merge: "
        "directory of .bin/.idx",
        metavar="PATH",
    )
    output_prefix: str = required("writes PREFIX_KEY_document.bin and .idx", metavar="PREFIX")
    hf_datasets_params: str | None = option(
        None, "JSON file with the arguments of datasets.load_dataset, instead of --input", metavar="FILE"
    )
    streaming: bool = option(False, "with --hf-datasets-params: stream, do not download; local files always stream")
    json_keys: tuple[str, ...] = option(
        ("text",), "fields of a record to tokenize, each into its own .bin/.idx pair", aliases=("--json-key",)
    )
    append_eod: bool = option(False, "append the tokenizer's end-of-document (EOD) token to every document")
    seq_length: int | None = option(None, "skip documents of this many tokens or more", above=0)
    workers: int = option(1, "tokenizer processes; the output does not depend on their number", above=0)
    n_subs: int = option(1, "multiplies --workers: number of parts that are tokenized in parallel", above=0)
    merge_group_keys: tuple[str, ...] = option(
        (), "merge .bin/.idx pairs of --input with the key in their name into PREFIX_KEY; no tokenizing"
    )
    skip_invalid: bool = option(False, "count and skip records that cannot be read, instead of aborting")
    overwrite: bool = option(False, "overwrite existing output")
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
        "weights of any format: Hugging Face, Megatron (core, legacy, AscendSpeed, MindSpeed-LLM), DeepSpeed "
        "pipelines, MindFormers, DCP, GGUF, checkpoint of a run (also s3://bucket/run); the layout is detected",
        aliases=("--input-model-dir",),
        metavar="DIR|URL",
    )
    save_dir: str = required(
        "directory to write; mg to hf: the original model's means DIR/mg2hf",
        aliases=("--output-model-dir",),
        metavar="DIR",
    )
    load_model_type: Literal["hf", "mg", "gguf"] | None = option(
        None, "require this input format [any]", aliases=("--loader",), synonyms=_FORMAT_SYNONYMS
    )
    save_model_type: Literal["hf", "mg", "ascendspeed", "mindformers", "dcp", "gguf"] | None = option(
        None, "output format [hf; mg with --saver megatron]", synonyms=_FORMAT_SYNONYMS
    )
    saver: Literal["megatron"] | None = option(None, "older name of --save-model-type mg")
    model_type: Literal["GPT", "BERT"] = option("GPT", "model architecture; only decoders (GPT) are supported")
    model_type_hf: str | None = option(
        None, "require this model, by MindSpeed-LLM's name (llama2, mixtral, ...) [any]", metavar="NAME"
    )
    model: str | None = option(
        None,
        "model of a Megatron checkpoint: preset, or directory with config.json [the config.json or arguments in it]",
        metavar="PRESET|DIR",
    )
    params_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of the weights to write [as stored]", synonyms=_DTYPE_SYNONYMS
    )
    overwrite: bool = option(False, "overwrite existing output")
    dry_run: bool = option(False, "only print which files would be written and the peak memory")
    verify: bool = option(False, "read the output back and compare every tensor, and logits if they fit in memory")
    checking: bool = option(True, "refuse a Megatron checkpoint with tensors that the model does not have (strict)")
    workers: int = option(1, "threads that read, convert and write, besides the main thread", above=0)
    max_queue_size: int | None = option(None, "ignored: there is no queue (an option of MindSpeed-LLM scripts)")
    megatron_path: str | None = option(
        None, "ignored: Megatron's code is not needed (an option of MindSpeed-LLM scripts)", metavar="DIR"
    )

    laws = (
        ignored("max_queue_size", why="there is no queue"),
        ignored("megatron_path", why="Megatron's code is not needed"),
    )


def _of_ranks(kind: str) -> tuple[str, ...]:
    """Flags of MindSpeed-LLM's and AscendSpeed's converters for a parallel degree of the output."""
    return tuple(f"--{start}{kind}-model-parallel-size" for start in ("target-", "tgt-", ""))


@dataclass(frozen=True, kw_only=True)
class MegatronTargetOptions:
    """Megatron checkpoint to write."""

    use_mcore_models: bool = option(False, "write Megatron-Core's format [the legacy format]")
    save_to_legacy: bool = option(False, "write the legacy format even with --use-mcore-models")
    load_from_legacy: bool = option(False, "require the legacy format of the input")
    transformer_impl: Literal["local", "transformer_engine", "mindspeed"] = option(
        "local", "tensor names of Megatron-Core's format: local layers', Transformer Engine's or MindSpeed-LLM's"
    )
    target_tensor_parallel_size: int = option(
        1, "tensor-parallel degree of the output: shards per weight", aliases=_of_ranks("tensor"), above=0
    )
    src_tensor_model_parallel_size: int | None = option(
        None, "require this tensor-parallel degree of the input [as detected]", above=0
    )
    src_pipeline_model_parallel_size: int | None = option(
        None, "require this pipeline-parallel degree of the input [as detected]", above=0
    )
    target_pipeline_parallel_size: int = option(
        1, "pipeline-parallel degree of the output: stages", aliases=_of_ranks("pipeline"), above=0
    )
    target_expert_parallel_size: int = option(
        1, "expert-parallel degree of the output", aliases=("--target-expert-model-parallel-size",), above=0
    )
    num_layer_list: str | None = option(None, "layers of each pipeline stage: 7,8,8,9 [equal]", metavar="N,N,...")
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers per virtual pipeline stage [no virtual stages]", above=0
    )
    moe_grouped_gemm: bool = option(False, "store the experts of a rank as grouped GEMM weights")
    make_vocab_size_divisible_by: int | None = option(
        None, "pad embedding rows to a multiple of this x TP [1; ascendspeed: 128]", above=0
    )
    true_vocab_size: int | None = option(
        None,
        "unpadded vocabulary size, where a Megatron checkpoint holds only the padded one",
        aliases=("--orig-vocab-size",),
        above=0,
    )
    vocab_file: str | None = option(None, "as --true-vocab-size: count the tokens of this vocab.json", metavar="FILE")
    tokenizer_model: str | None = option(None, "tokenizer path to record in the checkpoint's arguments", metavar="FILE")
    deepspeed: bool = option(False, "ascendspeed: DeepSpeed file names")
    merge_mlp: bool = option(False, "ascendspeed: fuse gate and up projection in one tensor")
    w_pack: bool | None = option(
        None, "require q, k and v fused in one W_pack in the Hugging Face model, or apart", shorthands={"--pse": True}
    )
    add_qkv_bias: bool | None = option(None, "require q, k and v biases in the model, or none")
    add_dense_bias: bool | None = option(None, "require a bias after attention in the model, or none")
    embed_layernorm: bool | None = option(None, "require a norm after the embedding in the model, or none")
    post_norm: bool | None = option(None, "require post-norms after attention and MLP in the model, or none")

    laws = (
        needs("save_to_legacy", use_mcore_models=True),
        excludes("vocab_file", "true_vocab_size"),
        needs("deepspeed", "merge_mlp", save_model_type="ascendspeed"),
    )


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """LoRA adapter to merge into the weights."""

    lora_load: str | None = option(
        None, "LoRA adapter to merge: PEFT directory, or Megatron checkpoint of LoRA training", metavar="DIR"
    )
    lora_r: int | None = option(None, "require this LoRA rank [as stored]", above=0)
    lora_alpha: float | None = option(None, "LoRA alpha: updates are scaled by alpha / r [as stored, else 32]", above=0)
    lora_target_modules: tuple[str, ...] | None = option(
        None, "require these LoRA target modules, such as linear_qkv or q_proj [as stored]", metavar="NAME"
    )

    laws = (needs("lora_r", "lora_alpha", "lora_target_modules", lora_load=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(ConvertOptions, MegatronTargetOptions, AdapterOptions):
    """Weights from one format to another."""


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measurement."""

    steps: int | None = option(None, "measured steps (tokens, files) per round [enough for a steady median]", above=0)
    rounds: int = option(5, "rounds of interleaved measurement of all peers; suites without peers run one", above=0)
    threads: int | None = option(None, "CPU threads [all cores]", above=0)
    compile: Literal["none", "blocks", "model"] = option(
        "none", "train: torch.compile of each transformer layer (blocks) or of the whole model"
    )
    load: str | None = option(None, "generate: model directory [a random Llama of 35 M parameters]", metavar="DIR")
    model: str | None = option(None, "convert: preset whose shapes the checkpoint has [llama2-13b]", metavar="PRESET")
    scratch: str | None = option(
        None, "convert: directory with room for the checkpoint [temporary directory]", metavar="DIR"
    )
    discard: bool = option(False, "convert: free the disk space of written output at once")
    output: str | None = option(None, "also write the report: Markdown to a .md, else JSON", metavar="FILE")


@dataclass(frozen=True, kw_only=True)
class BenchConfig(BenchOptions):
    """Speed and memory against peers."""

    suite: Literal["train", "generate", "preprocess", "convert", "parity", "resume"] = required(
        "what to measure", positional=True
    )


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Pipeline schedules, simulated."""

    schedule: tuple[PipelineSchedule, ...] = option(
        ("1f1b",), f"what to simulate; several are compared: {', '.join(get_args(PipelineSchedule))}", metavar="NAME"
    )
    pipeline_model_parallel_size: int | None = option(None, "pipeline-parallel ranks [4, or as --manual-mbs]", above=0)
    stages_per_rank: int | None = option(None, "virtual stages per rank, for schedules with a free choice [2]", above=0)
    num_layers: int | None = option(None, "transformer layers [one or more per stage, as few as possible]", above=0)
    num_layer_list: str | None = option(None, "layers of each pipeline stage: 7,8,8,9 [equal]", metavar="N,N,...")
    num_micro_batches: int | None = option(None, "gradient accumulation: micro-batches per step [8]", above=0)
    micro_batch_size: int | None = option(None, "samples per micro-batch [1, or as --manual-mbs]", above=0)
    manual_mbs: str | None = option(
        None, "compare 1f1b with such micro-batches: example-config-1, example-config-2, or 1,2,3,...", metavar="LIST"
    )
    forward_time: float = option(1.0, "forward time of one sample through one layer, in any unit of time", above=0)
    backward_time: float | None = option(
        None, "backward time (dgrad + wgrad) of one sample through one layer [2 x forward-time]", above=0
    )
    backward_input_time: float | None = option(
        None, "input-gradient (dgrad) part of --backward-time; the rest is weight-gradient (wgrad) [half]", above=0
    )
    fixed_time: float = option(0.0, "overhead per forward or backward, independent of its size", at_least=0)
    communication_time: float = option(0.0, "send/recv time of one sample's activations between stages", at_least=0)
    reduction_time: float = option(0.0, "gradient reduce-scatter of one layer over data-parallel ranks", at_least=0)
    timeline: str | None = option(
        None, "compare with a measured timeline: the JSON file of cordee train --pipeline-timeline", metavar="FILE"
    )
    output: str | None = option(None, "draw the schedules: .svg or .png", metavar="FILE")

    laws = (excludes("num_layers", "num_layer_list"),)


@dataclass(frozen=True, kw_only=True)
class QuickstartConfig:
    """Quickstart."""

    input: str | None = option(
        None, "training text: a file or a directory [the sources of Python's standard library]", metavar="PATH"
    )
    output: str = option("quickstart-run", "directory for all results", metavar="DIR")
    nproc_per_node: int = option(2, "training processes (ranks)", above=0)
    train_iters: int | None = option(None, "training iterations [as many as fit in --train-seconds]", above=0)
    train_seconds: float = option(100.0, "training time in seconds", above=0)
    seed: int = option(1234, "random seed of initial weights and sample order", at_least=0, below=2**32)
    overwrite: bool = option(False, "overwrite the results of an earlier quickstart")
