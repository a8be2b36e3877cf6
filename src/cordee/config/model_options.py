"""The options that say what a model is, and how its experts are trained: part of the schema.

Owns their names, types, defaults and help texts; what they mean together is `families/options.py`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cordee.config.laws import ignored
from cordee.config.option import option


@dataclass(frozen=True, kw_only=True)
class VocabularyOptions:
    """Vocabulary."""

    vocab_size: int | None = option(
        None, "number of tokens; not given: that of the checkpoint, the preset or the tokenizer", above=0
    )


@dataclass(frozen=True, kw_only=True)
class FeatureOptions:
    """Further properties of the model: what --model or --load has already, or leads to a family that has them."""

    num_experts: int | None = option(None, "experts in place of each MLP [one MLP]", above=0)
    moe_router_topk: int | None = option(None, "experts that each token visits [2]", above=0)
    moe_router_load_balancing_type: Literal["aux_loss", "softmax_topk", "group_limited_greedy"] | None = option(
        None,
        "weights of those experts: their own softmax (aux_loss), the softmax over all experts, or that with the choice "
        "limited to the best groups [aux_loss]",
    )
    moe_router_num_groups: int | None = option(None, "group_limited_greedy: groups of experts", above=0)
    topk_group: int | None = option(
        None, "group_limited_greedy: groups that a token chooses from", aliases=("--moe-router-group-topk",), above=0
    )
    norm_topk_prob: bool | None = option(None, "let the weights of the chosen experts add up to one")
    routed_scaling_factor: float | None = option(
        None, "multiply those weights [1]", aliases=("--moe-router-topk-scaling-factor",), above=0
    )
    moe_intermediate_size: int | None = option(
        None, "width inside an expert [ffn-hidden-size]", aliases=("--moe-ffn-hidden-size",), above=0
    )
    n_shared_experts: int | None = option(None, "experts that every token visits, as one MLP as wide [0]", above=0)
    first_k_dense_replace: int | None = option(None, "first layers without experts [0]", at_least=0)
    moe_layer_freq: int | None = option(None, "experts in every n-th layer only [1]", above=0)
    multi_head_latent_attention: bool | None = option(
        None, "keys and values from one compressed vector", aliases=("--multi-latent-attention",)
    )
    q_lora_rank: int | None = option(
        None, "latent attention: width of the compressed queries [not compressed]", above=0
    )
    kv_lora_rank: int | None = option(None, "latent attention: width of the compressed vector", above=0)
    qk_nope_head_dim: int | None = option(
        None, "latent attention: channels of a head without positions", aliases=("--qk-head-dim",), above=0
    )
    qk_rope_head_dim: int | None = option(
        None, "latent attention: channels of a head that turn", aliases=("--qk-pos-emb-head-dim",), above=0
    )
    v_head_dim: int | None = option(None, "latent attention: channels of a head's values", above=0)
    rope_scaling_mscale_all_dim: float | None = option(
        None, "latent attention with yarn scaling: how much sharper its scores become [0]", at_least=0
    )
    qk_layernorm: bool | None = option(None, "norms of queries and keys")
    rotary_percent: float | None = option(None, "part of a head's channels that turns [1]", above=0, at_most=1)
    sliding_window: int | None = option(None, "tokens that attention looks back, in all layers [all]", above=0)
    interleave_sliding_window: int | None = option(None, "the same in every second layer [all]", above=0)
    attn_logit_softcapping: float | None = option(None, "cap of attention's scores: cap * tanh(score / cap)", above=0)
    output_logit_softcapping: float | None = option(None, "cap of the logits", above=0)
    query_pre_attn_scalar: float | None = option(None, "scores are divided by its root [channels of a head]", above=0)
    post_norm: bool | None = option(None, "norms after attention and MLP too")
    embed_layernorm: bool | None = option(None, "a norm after the embedding")
    add_rmsnorm_offset: bool | None = option(None, "norms store the distance of their weights from one")
    apply_residual_connection_post_layernorm: bool | None = option(None, "add to what the norms give")
    lm_norm_weight: bool | None = option(None, "rows of the head are normalised (NormHead)")
    input_embeds_norm: bool | None = option(None, "multiply the embedding by the root of hidden-size")
    scale_emb: float | None = option(
        None, "multiply the embedding by this [1]", aliases=("--embedding-multiplier-scale",), above=0
    )
    output_multiplier_scale: float | None = option(None, "multiply the logits by this [1]", above=0)
    dim_model_base: float | None = option(None, "divide the logits by hidden-size / this [not]", above=0)
    scale_depth: float | None = option(
        None, "multiply what layers add by this, divided by the root of their number [not]", above=0
    )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(FeatureOptions, VocabularyOptions):
    """Model: --model or --load give the shape; without them these flags do, with Megatron's defaults."""

    model: str | None = option(
        None,
        "what to start from: a preset (`cordee models` lists them), or a directory with the config.json of any family",
        metavar="PRESET|DIR",
    )
    num_layers: int | None = option(
        None, "number of transformer layers", aliases=("--encoder-num-layers",), above=0, at_most=10_000
    )
    hidden_size: int | None = option(None, "width of the residual stream", above=0)
    ffn_hidden_size: int | None = option(
        None, "width inside the MLP [4 x hidden; with --swiglu 8/3 x hidden, rounded down to a multiple of 64]", above=0
    )
    num_attention_heads: int | None = option(None, "number of query heads", above=0)
    kv_channels: int | None = option(None, "width of one head [hidden / heads]", above=0)
    group_query_attention: bool | None = option(None, "let several query heads share keys and values")
    num_query_groups: int | None = option(
        None, "number of key and value heads [1]; ignored without --group-query-attention", above=0
    )
    max_position_embeddings: int | None = option(None, "longest sequence the model can hold, in tokens", above=0)
    position_embedding_type: Literal["learned_absolute", "rope", "alibi"] | None = option(
        None,
        "how positions enter [learned_absolute]",
        shorthands={"--use-rotary-position-embeddings": "rope"},
        synonyms={"absolute": "learned_absolute"},
    )
    rotary_base: float | None = option(None, "base (theta) of the rotary frequencies [10000]", above=0)
    rotary_seq_len_interpolation_factor: float | None = option(
        None, "divide all rotary positions by this [1]", at_least=1
    )
    rope_scaling_type: Literal["llama3", "yarn"] | None = option(None, "how rotary frequencies are stretched [not]")
    rope_scaling_factor: float | None = option(
        None, "llama3 and yarn scaling: stretch of the long wavelengths", above=0
    )
    low_freq_factor: float | None = option(
        None, "llama3 scaling: wavelengths above original length / this are fully stretched", above=0
    )
    high_freq_factor: float | None = option(
        None, "llama3 scaling: wavelengths below original length / this are left alone", above=0
    )
    original_max_position_embeddings: int | None = option(
        None,
        "llama3 and yarn scaling: length the frequencies were trained for, in tokens",
        aliases=("--rope-scaling-original-max-position-embeddings",),
        above=0,
    )
    rope_scaling_beta_fast: float | None = option(
        None, "yarn scaling: dims that turn more often within that length are left alone [32]", above=0
    )
    rope_scaling_beta_slow: float | None = option(
        None, "yarn scaling: dims that turn less often are fully stretched [1]", above=0
    )
    rope_scaling_mscale: float | None = option(
        None, "yarn scaling: how much sharper queries and keys become [1]", at_least=0
    )
    normalization: Literal["LayerNorm", "RMSNorm"] | None = option(None, "kind of norm [LayerNorm]")
    norm_epsilon: float | None = option(
        None, "added to the variance inside norms [1e-5]", aliases=("--layernorm-epsilon",), above=0
    )
    swiglu: bool | None = option(None, "gated MLP: down(silu(gate) * up) [off: gelu]")
    add_gate: bool | None = option(
        None, "AscendSpeed's switch of a gate that is a matrix of its own: as --swiglu; --no-add-gate leaves it to that"
    )
    openai_gelu: bool | None = option(None, "the tanh form of gelu, as GPT-2 has it [off: the exact form]")
    geglu: bool | None = option(None, "gated MLP: down(gelu(gate) * up) [off]")
    gelu_tanh: bool | None = option(None, "the same with the tanh form of gelu, as Gemma has it [off]")
    add_bias_linear: bool | None = option(
        None, "biases in all linear layers of attention and MLP [on]", negations=("--disable-bias-linear",)
    )
    add_qkv_bias: bool | None = option(None, "biases in the query, key and value projections [as add-bias-linear]")
    add_dense_bias: bool | None = option(None, "bias in the output projection of attention [as add-bias-linear]")
    untie_embeddings_and_output_weights: bool | None = option(
        None, "give the output head its own weight instead of the embedding's [off]"
    )
    make_vocab_size_divisible_by: int | None = option(
        None, "round the embedding's rows up to a multiple of this [128 from flags, 1 otherwise]", above=0
    )
    padded_vocab_size: int | None = option(
        None, "rows of the embedding, said exactly", aliases=("--pad-vocab-size-to",), above=0
    )
    init_method_std: float | None = option(None, "standard deviation of initial weights [0.02]", above=0)
    attention_dropout: float | None = option(None, "dropout of attention weights [0.1]", at_least=0, below=1)
    hidden_dropout: float | None = option(
        None, "dropout of embeddings and of what layers add [0.1]", at_least=0, below=1
    )


@dataclass(frozen=True, kw_only=True)
class ExpertTrainingOptions:
    """Training of experts."""

    moe_aux_loss_coeff: float | None = option(
        None,
        "weight of the loss that keeps experts evenly used [the model's; 0 for one of options alone]",
        aliases=("--moe-loss-coeff",),
        at_least=0,
    )
    seq_aux: bool | None = option(None, "take that loss of each sequence alone [the model's]")
    moe_device_level_aux_loss_coeff: float | None = option(
        None, "weight of the loss that keeps groups of experts evenly used [0]", at_least=0
    )
    moe_comm_aux_loss_coeff: float | None = option(
        None, "weight of the loss that keeps what groups are sent even [0]", at_least=0
    )
    moe_z_loss_coeff: float | None = option(
        None, "weight of the loss that keeps the router's logits small [0]", at_least=0
    )
    moe_expert_capacity_factor: float | None = option(
        None,
        "drop what an expert gets beyond this many times an even share; below 0: drop nothing [the model's]",
        aliases=("--moe-train-capacity-factor",),
    )
    moe_token_drop_policy: Literal["probs", "position"] | None = option(
        None, "whom to drop: the least weighted, or the last [probs]"
    )
    moe_pad_expert_input_to_capacity: bool | None = option(None, "compute as many tokens for every expert [off]")


@dataclass(frozen=True, kw_only=True)
class PortedOptions:
    """Without effect: what scripts of MindSpeed-LLM say and what is so here anyway."""

    use_glm_rope: bool = option(False, "channels turn in the pairs that the family's files have")
    rotary_interleaved: bool = option(False, "the same")
    square_alibi_mask: bool = option(False, "either form of the bias of alibi gives the same")
    fill_neg_inf: bool = option(False, "the same")
    skip_bias_add: bool = option(False, "biases are added where they belong")

    laws = (
        ignored("use_glm_rope", "rotary_interleaved", why="pairs of channels are as the family's files have them"),
        ignored("square_alibi_mask", "fill_neg_inf", why="either form of the bias of ALiBi gives the same"),
        ignored("skip_bias_add", why="biases are added where they belong"),
    )
