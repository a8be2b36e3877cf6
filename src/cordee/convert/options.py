"""The options of `cordee convert`.

Owns their names, types, defaults and help texts, and what each needs of others."""

from dataclasses import dataclass
from typing import Literal

from cordee.config.laws import but, excludes, ignored, needs
from cordee.config.option import option, required
from cordee.model.options import DTYPE_SYNONYMS
from cordee.tune.options import MergeOptions

_NAMES_OF_HF = ("huggingface", "llama2_hf", "save_huggingface_llama", "loader_llama2_hf")
_FORMAT_SYNONYMS = {"megatron": "mg"} | dict.fromkeys(_NAMES_OF_HF, "hf")


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Conversion."""

    load_dir: str = required(
        "weights of any format: Hugging Face, Megatron (core, torch_dist, legacy, AscendSpeed, MindSpeed-LLM), "
        "DeepSpeed pipelines, MindFormers, DCP, GGUF, checkpoint of a run (also s3://bucket/run); the layout is "
        "detected",
        aliases=("--input-model-dir",),
        metavar="DIR|URL",
    )
    save_dir: str = required(
        "directory to write; mg to hf: the original's: DIR/mg2hf", aliases=("--output-model-dir",), metavar="DIR"
    )
    load_model_type: Literal["hf", "mg", "gguf"] | None = option(
        None, "require this input format [any]", aliases=("--loader",), synonyms=_FORMAT_SYNONYMS
    )
    save_model_type: Literal["hf", "mg", "ascendspeed", "mindformers", "dcp", "gguf", "peft"] | None = option(
        None, "output format; peft: adapters of a run [hf; mg with --saver megatron]", synonyms=_FORMAT_SYNONYMS
    )
    saver: Literal["megatron"] | None = option(None, "older name of --save-model-type mg")
    model_type: Literal["GPT", "BERT"] = option("GPT", "model architecture; only decoders (GPT) are supported")
    model_type_hf: str | None = option(None, "require this model of MindSpeed-LLM (llama2, ...) [any]", metavar="NAME")
    model: str | None = option(
        None, "model of a Megatron checkpoint: preset, or directory with config.json [in it]", metavar="PRESET|DIR"
    )
    params_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "dtype of the weights to write [as stored]", synonyms=DTYPE_SYNONYMS
    )
    overwrite: bool = option(False, "overwrite existing output")
    dry_run: bool = option(False, "only print which files would be written and the peak memory")
    verify: bool = option(False, "read the output back and compare every tensor, and logits if they fit in memory")
    checking: bool = option(True, "refuse a Megatron checkpoint with tensors that the model does not have (strict)")
    workers: int = option(1, "threads that read, convert and write, besides the main thread", above=0)
    max_queue_size: int | None = option(None, "ignored: there is no queue (an option of MindSpeed-LLM scripts)")
    megatron_path: str | None = option(None, "ignored: Megatron's code is not needed (of MindSpeed-LLM)", metavar="DIR")

    laws = (ignored("max_queue_size", why="there is no queue"), ignored("megatron_path", why="it is not needed"))


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
    src_tensor_model_parallel_size: int | None = option(None, "require this TP degree of the input [any]", above=0)
    src_pipeline_model_parallel_size: int | None = option(None, "require this PP degree of the input [any]", above=0)
    target_pipeline_parallel_size: int = option(
        1, "pipeline-parallel degree of the output: stages", aliases=_of_ranks("pipeline"), above=0
    )
    target_expert_parallel_size: int = option(
        1, "expert-parallel degree of the output", aliases=("--target-expert-model-parallel-size",), above=0
    )
    num_layer_list: str | None = option(None, "layers of each pipeline stage: 7,8,8,9 [equal]", metavar="N,N,...")
    num_layers_per_virtual_pipeline_stage: int | None = option(None, "layers per virtual stage (PP) [none]", above=0)
    moe_grouped_gemm: bool = option(False, "store the experts of a rank as grouped GEMM weights")
    make_vocab_size_divisible_by: int | None = option(
        None, "pad embedding rows to a multiple of this x TP [1; ascendspeed: 128]", above=0
    )
    true_vocab_size: int | None = option(None, "unpadded vocabulary size", aliases=("--orig-vocab-size",), above=0)
    vocab_file: str | None = option(None, "as --true-vocab-size: count the tokens of this vocab.json", metavar="FILE")
    tokenizer_model: str | None = option(None, "tokenizer path to record in the checkpoint's arguments", metavar="FILE")
    deepspeed: bool = option(False, "ascendspeed: DeepSpeed file names")
    merge_mlp: bool = option(False, "ascendspeed: fuse gate and up projection in one tensor")
    w_pack: bool | None = option(None, "require q, k, v of the HF model in W_pack or apart", shorthands={"--pse": True})
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
class ConvertConfig(ConvertOptions, MegatronTargetOptions, MergeOptions):
    """Weights from one format to another."""

    laws = (needs("verify", "lora_load", save_model_type=but("peft")),)
