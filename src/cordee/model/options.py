"""The options that set the architecture of a model, and how its experts are trained.

Owns their names, types, defaults and help texts; what they mean together is `families/options.py`'s matter."""

from dataclasses import dataclass
from typing import Literal

from cordee.config.laws import excludes, ignored
from cordee.config.option import option
from cordee.tokenizer.options import VocabularyOptions

DTYPE_SYNONYMS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Further model features: set by --model or --load, or they select a family that has them."""

    num_experts: int | None = option(None, "mixture of experts (MoE): experts per layer [dense]", above=0)
    moe_router_topk: int | None = option(None, "MoE router: experts per token (top-k) [2]", above=0)
    moe_router_load_balancing_type: Literal["aux_loss", "softmax_topk", "group_limited_greedy"] | None = option(
        None, "MoE router: softmax of top-k (aux_loss), of all, or of all with group-limited top-k [aux_loss]"
    )
    moe_router_num_groups: int | None = option(None, "group_limited_greedy: number of expert groups", above=0)
    topk_group: int | None = option(
        None, "group_limited_greedy: groups of a token", aliases=("--moe-router-group-topk",), above=0
    )
    norm_topk_prob: bool | None = option(None, "MoE router: top-k weights sum to one")
    routed_scaling_factor: float | None = option(
        None, "MoE router: scale of the top-k weights [1]", aliases=("--moe-router-topk-scaling-factor",), above=0
    )
    moe_intermediate_size: int | None = option(
        None, "FFN hidden size of an expert [ffn-hidden-size]", aliases=("--moe-ffn-hidden-size",), above=0
    )
    n_shared_experts: int | None = option(None, "MoE: shared experts, for every token [0]", above=0)
    first_k_dense_replace: int | None = option(None, "MoE: number of leading layers with a dense MLP [0]", at_least=0)
    moe_layer_freq: int | None = option(None, "MoE: every n-th layer has experts, the others a dense MLP [1]", above=0)
    multi_head_latent_attention: bool | None = option(
        None, "MLA: keys and values from one low-rank latent", aliases=("--multi-latent-attention",)
    )
    q_lora_rank: int | None = option(None, "MLA: rank of the compressed queries [not compressed]", above=0)
    kv_lora_rank: int | None = option(None, "MLA: rank of the KV latent", above=0)
    qk_nope_head_dim: int | None = option(None, "MLA: q, k dims without RoPE", aliases=("--qk-head-dim",), above=0)
    qk_rope_head_dim: int | None = option(None, "MLA: q, k dims with RoPE", aliases=("--qk-pos-emb-head-dim",), above=0)
    v_head_dim: int | None = option(None, "MLA: dims of a value head", above=0)
    rope_scaling_mscale_all_dim: float | None = option(
        None, "MLA with YaRN: mscale_all_dim of DeepSeek, by which the softmax scale grows [0]", at_least=0
    )
    qk_layernorm: bool | None = option(None, "QK-norm: normalise queries and keys before the scores")
    rotary_percent: float | None = option(None, "partial rotary factor: RoPE's share of dims [1]", above=0, at_most=1)
    sliding_window: int | None = option(None, "sliding window attention: tokens, all layers [full]", above=0)
    interleave_sliding_window: int | None = option(None, "the same in every second layer [full]", above=0)
    attn_logit_softcapping: float | None = option(None, "soft cap of attention scores: cap * tanh(score/cap)", above=0)
    output_logit_softcapping: float | None = option(None, "soft cap of the output logits", above=0)
    query_pre_attn_scalar: float | None = option(None, "attention scores are divided by sqrt(this) [head_dim]", above=0)
    post_norm: bool | None = option(None, "sandwich norms: post-norms after attention and MLP, besides the pre-norms")
    embed_layernorm: bool | None = option(None, "norm after the embedding")
    add_rmsnorm_offset: bool | None = option(None, "RMSNorm weight is stored as w - 1 (Gemma)")
    apply_residual_connection_post_layernorm: bool | None = option(None, "residual connection from the norm's output")
    lm_norm_weight: bool | None = option(None, "L2-normalise the rows of the output head (NormHead)")
    input_embeds_norm: bool | None = option(None, "scale embeddings by sqrt(hidden-size) (Gemma)")
    scale_emb: float | None = option(None, "embedding scale [1]", aliases=("--embedding-multiplier-scale",), above=0)
    output_multiplier_scale: float | None = option(None, "scale the output logits by this [1]", above=0)
    dim_model_base: float | None = option(None, "scale the output logits by this / hidden-size [not]", above=0)
    scale_depth: float | None = option(None, "scale residual branches by this / sqrt(num-layers) [not]", above=0)

    laws = (
        excludes("interleave_sliding_window", "sliding_window"),
        excludes("scale_emb", "input_embeds_norm"),
        excludes("output_multiplier_scale", "dim_model_base"),
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(FeatureOptions, VocabularyOptions):
    """Model: --model or --load set the architecture; without them these flags do, with Megatron's defaults."""

    model: str | None = option(
        None,
        "preset (`cordee models` lists them), or directory with the config.json of any family; defaults of the "
        "optimizer are then those that pretrain well: cosine to lr / 10, warm-up of 1%, weight decay 0.1, beta2 0.95",
        metavar="PRESET|DIR",
        reads="cordee.optim.recipe:entries",
    )
    num_layers: int | None = option(None, "decoder layers", aliases=("--encoder-num-layers",), above=0, at_most=10_000)
    hidden_size: int | None = option(None, "hidden size (model dimension)", above=0)
    ffn_hidden_size: int | None = option(
        None, "FFN (MLP) hidden size [4 x hidden; with --swiglu 8/3 x hidden, floored to a multiple of 64]", above=0
    )
    num_attention_heads: int | None = option(None, "number of attention (query) heads", above=0)
    kv_channels: int | None = option(None, "head_dim: size of an attention head [hidden / heads]", above=0)
    group_query_attention: bool | None = option(None, "GQA: several query heads share a KV head")
    num_query_groups: int | None = option(None, "GQA: KV heads [1]; ignored without --group-query-attention", above=0)
    max_position_embeddings: int | None = option(None, "context length of the model, in tokens", above=0)
    position_embedding_type: Literal["learned_absolute", "rope", "alibi"] | None = option(
        None,
        "position embedding type [learned_absolute]",
        shorthands={"--use-rotary-position-embeddings": "rope"},
        synonyms={"absolute": "learned_absolute"},
    )
    rotary_base: float | None = option(None, "RoPE base (theta) [10000]", above=0)
    rotary_seq_len_interpolation_factor: float | None = option(None, "RoPE linear interpolation factor [1]", at_least=1)
    rope_scaling_type: Literal["llama3", "yarn"] | None = option(None, "RoPE scaling for longer contexts [none]")
    rope_scaling_factor: float | None = option(None, "llama3 and yarn RoPE scaling: factor", above=0)
    low_freq_factor: float | None = option(None, "llama3: wavelengths above original / this are fully scaled", above=0)
    high_freq_factor: float | None = option(None, "llama3: wavelengths below original / this are not scaled", above=0)
    original_max_position_embeddings: int | None = option(
        None, "llama3, yarn: unscaled context", aliases=("--rope-scaling-original-max-position-embeddings",), above=0
    )
    rope_scaling_beta_fast: float | None = option(None, "yarn: more rotations than this are not scaled [32]", above=0)
    rope_scaling_beta_slow: float | None = option(None, "yarn: fewer rotations than this are fully scaled [1]", above=0)
    rope_scaling_mscale: float | None = option(None, "yarn: mscale, scale of queries and keys [1]", at_least=0)
    normalization: Literal["LayerNorm", "RMSNorm"] | None = option(None, "norm type [LayerNorm]")
    norm_epsilon: float | None = option(None, "epsilon of the norms [1e-5]", aliases=("--layernorm-epsilon",), above=0)
    swiglu: bool | None = option(None, "SwiGLU, gated MLP: down(silu(gate) * up) [off: GELU]")
    add_gate: bool | None = option(None, "AscendSpeed's gate matrix: as --swiglu; --no-add-gate: no separate one")
    openai_gelu: bool | None = option(None, "tanh approximation of GELU, as in GPT-2 [off: exact GELU]")
    geglu: bool | None = option(None, "GEGLU, gated MLP: down(gelu(gate) * up) [off]")
    gelu_tanh: bool | None = option(None, "GEGLU with the tanh approximation of GELU, as in Gemma [off]")
    add_bias_linear: bool | None = option(None, "biases of attention, MLP [on]", negations=("--disable-bias-linear",))
    add_qkv_bias: bool | None = option(None, "biases of the query, key and value projections [as add-bias-linear]")
    add_dense_bias: bool | None = option(None, "bias of the attention output projection [as add-bias-linear]")
    untie_embeddings_and_output_weights: bool | None = option(
        None, "untie the output head (lm_head) from the embedding: weights of its own [off: tied]"
    )
    make_vocab_size_divisible_by: int | None = option(
        None, "pad the embedding rows to a multiple of this [128 from flags, 1 otherwise]", above=0
    )
    padded_vocab_size: int | None = option(None, "embedding rows (padded)", aliases=("--pad-vocab-size-to",), above=0)
    init_method_std: float | None = option(None, "standard deviation of weight initialization [0.02]", above=0)
    attention_dropout: float | None = option(None, "dropout of attention weights [0.1]", at_least=0, below=1)
    hidden_dropout: float | None = option(None, "dropout of embedding and residual branches [0.1]", at_least=0, below=1)

    laws = (
        excludes("geglu", "swiglu"),
        excludes("gelu_tanh", "swiglu", "geglu"),
        excludes("openai_gelu", "swiglu", "geglu", "gelu_tanh", "add_gate"),
        excludes("rope_scaling_type", "rotary_seq_len_interpolation_factor"),
    )


@dataclass(frozen=True, kw_only=True)
class ExpertTrainingOptions:
    """Training of MoE experts."""

    moe_aux_loss_coeff: float | None = option(
        None, "weight of the load-balancing loss [the model's; 0 from flags]", aliases=("--moe-loss-coeff",), at_least=0
    )
    seq_aux: bool | None = option(None, "load-balancing auxiliary loss per sequence [the model's]")
    moe_device_level_aux_loss_coeff: float | None = option(None, "group balancing loss: coefficient [0]", at_least=0)
    moe_comm_aux_loss_coeff: float | None = option(None, "all-to-all balancing loss: coefficient [0]", at_least=0)
    moe_z_loss_coeff: float | None = option(None, "router z-loss: coefficient [0]", at_least=0)
    moe_expert_capacity_factor: float | None = option(
        None,
        "capacity factor: drop tokens above this x even share; < 0: none",
        aliases=("--moe-train-capacity-factor",),
    )
    moe_token_drop_policy: Literal["probs", "position"] | None = option(
        None, "beyond the capacity, drop by router weight (probs) or the last [probs]"
    )
    moe_pad_expert_input_to_capacity: bool | None = option(None, "pad the input of experts to their capacity [off]")


@dataclass(frozen=True, kw_only=True)
class PortedOptions:
    """Ignored: options of MindSpeed-LLM scripts for what always holds here."""

    use_glm_rope: bool = option(False, "RoPE rotates the dim pairs that the family's weights have")
    rotary_interleaved: bool = option(False, "as --use-glm-rope")
    square_alibi_mask: bool = option(False, "both forms of the ALiBi bias are equal")
    fill_neg_inf: bool = option(False, "as --square-alibi-mask")
    skip_bias_add: bool = option(False, "biases are added, fused or not")

    laws = (
        ignored("use_glm_rope", "rotary_interleaved", why="RoPE rotates the dim pairs that the family's weights have"),
        ignored("square_alibi_mask", "fill_neg_inf", why="both forms of the ALiBi bias are equal"),
        ignored("skip_bias_add", why="biases are added, fused or not"),
    )
