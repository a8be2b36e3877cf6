"""The options of layouts: one class a technique, and what a layout follows from.

Owns their names, types, defaults and help texts, and what those of a technique need of each other. Laws of model and
degrees are `laws.py`'s."""

from dataclasses import dataclass
from typing import Literal

from cordee.config.laws import GIVEN, POSITIVE, SEVERAL, but, excludes, ignored, needs
from cordee.config.option import option
from cordee.data.options import BatchOptions
from cordee.optim.options import OptimizerOptions, PrecisionOptions

PipelineSchedule = Literal[
    "gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev", "fold_aiao", "fold_fifo"
]


LONGEST = 365 * 24 * 60  # minutes of a time-out, a year: clocks of libraries overflow somewhere above

_PARALLELISM = "Parallelism: processes, sharding, ZeRO and communication overlap"


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Processes of a run."""

    group = _PARALLELISM
    nproc_per_node: int | None = option(
        None, "processes (ranks) to start here; torchrun and Slurm start their own [one per local device]", above=0
    )


@dataclass(frozen=True, kw_only=True)
class TensorOptions:
    """Tensor and sequence parallelism, overlapped with communication."""

    group = _PARALLELISM
    tensor_model_parallel_size: int = option(
        1, "tensor parallelism (TP): ranks that shard the weights: heads, MLP width, vocabulary", above=0
    )
    sequence_parallel: bool = option(False, "with TP, norms and dropout shard by tokens: all-gather, reduce-scatter")
    tp_comm_overlap: bool = option(
        False,
        "run the GEMMs of TP in chunks: all-gather or reduce-scatter of one chunk overlaps the GEMM of the next",
        aliases=("--use-mc2", "--use-ascend-mc2", "--use-ascend-coc"),
    )
    tp_comm_overlap_parts: int = option(4, "--tp-comm-overlap: GEMM chunks", aliases=("--coc-parallel-num",), above=0)

    laws = (ignored("tp_comm_overlap", "tp_comm_overlap_parts", tensor_model_parallel_size=SEVERAL),)


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """Pipeline parallelism."""

    group = _PARALLELISM
    pipeline_model_parallel_size: int = option(1, "pipeline parallelism (PP): ranks that shard the layers", above=0)
    pipeline_schedule: PipelineSchedule | None = option(
        None,
        "pipeline schedule; zero-bubble ones split backward in input-gradient (dgrad) and weight-gradient (wgrad)"
        " [1f1b, or interleaved with virtual stages]",
    )
    num_layers_per_virtual_pipeline_stage: int | None = option(
        None, "layers per virtual pipeline stage (model chunk), with several stages per rank", above=0
    )
    num_layer_list: str | None = option(
        None, "layers of each stage: 7,8,8,9 [by FLOPs]", aliases=("--manual-layers",), metavar="N,N,..."
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
        None, "virtual stages one by one (aiao) or in turns (fifo), reducing under backward", aliases=("--foldx-mode",)
    )
    pipeline_timeline: str | None = option(None, "JSON timeline of the second step, per pipeline rank", metavar="FILE")

    laws = (
        needs("pipeline_schedule", "num_layers_per_virtual_pipeline_stage", pipeline_model_parallel_size=SEVERAL),
        needs("num_layer_list", "noop_layers", "fold_mode", "pipeline_timeline", pipeline_model_parallel_size=SEVERAL),
        excludes("num_layer_list", "num_layers_per_virtual_pipeline_stage", "noop_layers"),
        needs("use_manual_layer_allocation", num_layer_list=GIVEN),
        needs("fold_mode", num_layers_per_virtual_pipeline_stage=GIVEN),
        needs("optimized_pipeline", manual_mbs=GIVEN),
        needs("manual_mbs", optimized_pipeline=True),
        excludes("manual_mbs", "rampup_batch_size"),
    )


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    """Context parallelism."""

    group = _PARALLELISM
    context_parallel_size: int = option(1, "context parallelism (CP): ranks that shard sequences by tokens", above=0)
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
    cp_attention_mask_type: Literal["causal", "full"] = option("causal", "attention mask under CP; full: bidirectional")

    laws = (
        ignored("context_parallel_algo", "ulysses_degree_in_cp", "cp_window_size", context_parallel_size=SEVERAL),
        ignored("cp_attention_mask_type", "use_cp_send_recv_overlap", context_parallel_size=SEVERAL),
        ignored("kv_head_repeat_before_uly_alltoall", context_parallel_size=SEVERAL),
        ignored("use_cp_send_recv_overlap", context_parallel_algo=but("ulysses_cp_algo")),
        ignored("kv_head_repeat_before_uly_alltoall", context_parallel_algo=but("megatron_cp_algo")),
    )


@dataclass(frozen=True, kw_only=True)
class ExpertOptions:
    """Expert parallelism."""

    group = _PARALLELISM
    expert_model_parallel_size: int = option(
        1, "expert parallelism (EP): ranks that shard experts", aliases=("--moe-expert-parallel-size",), above=0
    )
    moe_token_dispatcher_type: Literal["alltoall", "allgather"] = option(
        "alltoall", "MoE token dispatch over EP ranks: all-to-all, or all-gather and reduce-scatter"
    )
    moe_permutation_async_comm: bool = option(False, "overlap EP communication with token permutation; bit-identical")

    laws = (ignored("moe_token_dispatcher_type", "moe_permutation_async_comm", expert_model_parallel_size=SEVERAL),)


@dataclass(frozen=True, kw_only=True)
class ZeroOptions:
    """Data parallelism: ZeRO."""

    group = _PARALLELISM
    zero_stage: Literal[0, 1, 2, 3] = option(
        1,
        "ZeRO (FSDP): data-parallel ranks 0 replicate (DDP), 1 shard optimizer state, 2 gradients too, 3 "
        "parameters too",
        shorthands={"--use-distributed-optimizer": 1},
    )
    num_distributed_optimizer_instances: int = option(1, "HSDP: replicas of the state, each on fewer ranks", above=0)
    overlap_grad_reduce: bool = option(False, "two gradient buckets in flight, not one: more overlap of reduce-scatter")
    delay_grad_reduce: bool = option(False, "delay gradient reduce-scatter until all pipeline stages can start theirs")
    overlap_param_gather: bool = option(False, "prefetch two layers, not one: all-gather overlaps more; more memory")
    delay_param_gather: bool = option(False, "ZeRO 3: no prefetch in backward; all-gather when a layer needs it")

    laws = (
        ignored("overlap_grad_reduce", "overlap_param_gather", "delay_param_gather", nproc_per_node=SEVERAL),
        ignored("delay_grad_reduce", why="a layer's gradients are always reduced right after its last backward"),
        ignored("overlap_param_gather", zero_stage=POSITIVE),
        ignored("delay_param_gather", zero_stage=3),
        excludes("overlap_param_gather", "delay_param_gather"),
        needs("num_distributed_optimizer_instances", zero_stage=POSITIVE),
    )


@dataclass(frozen=True, kw_only=True)
class DeepSpeedOptions:
    """The file of DeepSpeed scripts."""

    group = _PARALLELISM
    deepspeed: bool = option(False, "switch of DeepSpeed scripts; needs --deepspeed-config")
    deepspeed_config: str | None = option(
        None,
        "DeepSpeed JSON file: ZeRO stage, precision, batch sizes, gradient clipping",
        reads="cordee.parallel.deepspeed:entries",
        aliases=("--deepspeed_config",),
        metavar="FILE",
    )

    laws = (needs("deepspeed", deepspeed_config=GIVEN),)


@dataclass(frozen=True, kw_only=True)
class CollectiveOptions:
    """Collectives."""

    group = _PARALLELISM
    distributed_backend: Literal["gloo", "nccl", "hccl"] | None = option(None, "library of collectives [the device's]")
    distributed_timeout_minutes: float = option(45, "minutes for a collective or rendezvous", above=0, at_most=LONGEST)


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(
    ProcessOptions,
    TensorOptions,
    PipelineOptions,
    ContextOptions,
    ExpertOptions,
    ZeroOptions,
    DeepSpeedOptions,
    CollectiveOptions,
):
    """How a run is spread over processes."""


@dataclass(frozen=True, kw_only=True)
class CompileOptions:
    """`torch.compile`."""

    group = "Performance"

    compile: Literal["none", "blocks", "model"] = option("none", "torch.compile of layers (blocks) or the whole model")


@dataclass(frozen=True, kw_only=True)
class LayoutOptions(BatchOptions, OptimizerOptions, PrecisionOptions, ParallelOptions, CompileOptions):
    """What decides where a run computes, and in which parts."""


@dataclass(frozen=True, kw_only=True)
class InferenceLayoutOptions:
    """Parallelism of the model: tensor x pipeline processes."""

    tensor_model_parallel_size: int = option(1, "tensor parallelism: processes that shard the weights", above=0)
    pipeline_model_parallel_size: int = option(1, "pipeline parallelism: processes that shard the layers", above=0)
    distributed_backend: Literal["gloo", "nccl", "hccl"] | None = option(None, "library of collectives [the device's]")
    distributed_timeout_minutes: float = option(45, "minutes until a collective times out", above=0, at_most=LONGEST)
