"""The settings that a checkpoint of Megatron carries, `args`: made from a model, and a model made from them.

Owns which of Megatron's arguments say what a model is. Names of its arguments are given as Megatron and MindSpeed-LLM
read them from a checkpoint to check or to complete the command line.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import fields
from typing import Any

import torch

from cordee.config.load import config_from_dict
from cordee.config.model_options import FeatureOptions, ModelOptions
from cordee.errors import Problem, ProblemError
from cordee.families import described
from cordee.families.features import features_of
from cordee.families.registry import ModelSpec, spec_from_options
from cordee.model.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LinearScaling,
    Llama3Scaling,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnScaling,
)
from cordee.weights.megatron.layout import Layout

GIVE_MODEL = "give --model with a preset or a directory with the config.json that belongs to the weights"
OF_READING = ("model", "checking")  # options of a conversion that say how a Megatron checkpoint is read


def unclear(where: str, value: object, why: str, fix: str = GIVE_MODEL) -> Problem:
    """What a Megatron checkpoint does not tell of its model, and options of a conversion can."""
    return Problem(where, value, why, fix, "unclear", OF_READING)


# ---- from a model ----------------------------------------------------------------------------------------------------


def arguments(config: ModelConfig, layout: Layout, padded_vocab: int, **more: Any) -> Namespace:
    """Megatron's arguments for a model in a layout; `more` are what a dialect or a user adds."""
    stages = [sum(len(c.layers) for c in layout.chunks if c.pipeline == p) for p in range(layout.pipeline)]
    uneven = len(set(stages)) > 1
    attention = config.layers[0].attention
    rope = attention.rope
    if rope is not None:
        positions = "rope"
    elif config.learned_positions:
        positions = "learned_absolute"
    else:
        positions = "alibi" if isinstance(attention, AttentionConfig) and attention.alibi else "none"
    values: dict[str, Any] = {
        "num_layers": config.num_layers,
        "encoder_num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": attention.num_heads,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "position_embedding_type": positions,
        "add_position_embedding": config.learned_positions,
        "use_rotary_position_embeddings": rope is not None,
        "normalization": "RMSNorm" if config.final_norm.kind == "rms" else "LayerNorm",
        "norm_epsilon": config.final_norm.eps,
        "layernorm_epsilon": config.final_norm.eps,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "vocab_size": config.vocab_size,
        "padded_vocab_size": padded_vocab,
        "init_method_std": config.init_std,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.hidden_dropout,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "virtual_pipeline_model_parallel_size": len(layout.chunks) // layout.pipeline if layout.virtual else None,
        "num_layers_per_virtual_pipeline_stage": len(layout.first.layers) if layout.virtual else None,
        "num_layer_list": ",".join(map(str, stages)) if uneven else None,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.tensor,
        "sequence_parallel": False,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "data_parallel_random_init": False,
    }
    values |= _rope(rope, attention) if rope is not None else {}
    values |= _attention(attention)
    values |= _mlp(config)
    # Where Megatron has a form of its own for a feature, it stands.
    found = Namespace(**{**_features(config), **values, **more})
    setattr(found, UNTOLD, not _tells(found, config))
    return found


def _tells(args: Namespace, config: ModelConfig) -> bool:
    """Whether these settings, read back, give the model."""
    try:
        read = spec_of_arguments(args, config.vocab_size, "settings")
    except ProblemError:
        return False
    return described.canonical(read.config) == described.canonical(config)


def _features(config: ModelConfig) -> dict[str, Any]:
    """The features as the options call them, each said once: Megatron would multiply twice."""
    found = {**dict.fromkeys(FEATURES), **features_of(config)}
    if found["input_embeds_norm"]:
        found["scale_emb"] = None
    if found["dim_model_base"]:
        other = "output_multiplier_scale" if float(found["dim_model_base"]).is_integer() else "dim_model_base"
        found[other] = None
    return found


def _rope(rope: RopeConfig, attention: AttentionConfig | LatentAttentionConfig) -> dict[str, Any]:
    head_dim = attention.head_dim if isinstance(attention, AttentionConfig) else attention.rope_head_dim
    values: dict[str, Any] = {
        "rotary_base": rope.theta,
        "rotary_percent": (rope.rotary_dim or head_dim) / head_dim,
        "rotary_interleaved": False,
    }
    if isinstance(rope.scaling, YarnScaling):
        values |= {
            "rope_scaling_type": "yarn",
            "rope_scaling_factor": rope.scaling.factor,
            "rope_scaling_original_max_position_embeddings": rope.scaling.original_max_position_embeddings,
            "rope_scaling_beta_fast": rope.scaling.beta_fast,
            "rope_scaling_beta_slow": rope.scaling.beta_slow,
        }
    elif isinstance(rope.scaling, LinearScaling):
        values["rotary_seq_len_interpolation_factor"] = rope.scaling.factor
    elif isinstance(rope.scaling, Llama3Scaling):
        values |= {
            "rope_scaling_type": "llama3",
            "use_rope_scaling": True,
            "rope_scaling_factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low_freq_factor,
            "high_freq_factor": rope.scaling.high_freq_factor,
            "original_max_position_embeddings": rope.scaling.original_max_position_embeddings,
        }
    elif rope.scaling is not None:
        values["rope_scaling_type"] = type(rope.scaling).__name__  # not Megatron's: nobody shall take it for none
    return values


def _attention(attention: AttentionConfig | LatentAttentionConfig) -> dict[str, Any]:
    if isinstance(attention, AttentionConfig):
        return {
            "kv_channels": attention.head_dim,
            "group_query_attention": attention.num_kv_heads != attention.num_heads,
            "num_query_groups": attention.num_kv_heads,
            "qk_layernorm": attention.qk_norm is not None,
            "add_qkv_bias": attention.qkv_bias,
            "add_dense_bias": attention.out_bias,
        }
    return {
        "multi_latent_attention": True,
        "multi_head_latent_attention": True,  # as MindSpeed-LLM calls it
        "qk_layernorm": True,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_head_dim": attention.nope_head_dim,
        "qk_nope_head_dim": attention.nope_head_dim,
        "qk_pos_emb_head_dim": attention.rope_head_dim,
        "qk_rope_head_dim": attention.rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "kv_channels": attention.v_head_dim,
        "group_query_attention": False,
        "num_query_groups": attention.num_heads,
    }


def _mlp(config: ModelConfig) -> dict[str, Any]:
    mixtures = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MoEConfig)]
    dense = [layer.mlp for layer in config.layers if isinstance(layer.mlp, MLPConfig)]
    mlp = dense[0] if dense else mixtures[0].expert
    values: dict[str, Any] = {
        "ffn_hidden_size": mlp.ffn_hidden_size,
        "swiglu": mlp.activation == "silu" and mlp.gated,
        "openai_gelu": mlp.activation == "gelu_tanh" and not mlp.gated,
        "geglu": mlp.activation == "gelu" and mlp.gated,
        "gelu_tanh": mlp.activation == "gelu_tanh" and mlp.gated,
        "add_bias_linear": mlp.bias,
    }
    if not mixtures:
        return values
    router, shared = mixtures[0].router, mixtures[0].shared
    return {
        **values,
        "num_experts": router.num_experts,
        "moe_router_topk": router.top_k,
        "moe_router_score_function": router.score,
        # Softmax before the choice and weights normalised after it is softmax over the chosen.
        "moe_router_pre_softmax": router.score_when == "before" and not router.normalise,
        "moe_router_topk_scaling_factor": router.scale,
        "moe_router_enable_expert_bias": router.correction_bias,
        "moe_layer_freq": [int(isinstance(layer.mlp, MoEConfig)) for layer in config.layers],
        "moe_ffn_hidden_size": mixtures[0].expert.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": shared.ffn_hidden_size if shared else None,
    }


# ---- to a model ------------------------------------------------------------------------------------------------------

# Settings that change the mathematics and that nothing here would understand.
REFUSED = ("apply_layernorm_1p", "quick_geglu", "rotary_interleaved", "squared_relu", "use_glm_rope", "window_size")
UNTOLD = "cordee_model_untold"  # a setting of ours: the others do not tell all about the model
FEATURES = {field.name for field in fields(FeatureOptions)}
_FLAGS = {  # features that Megatron and MindSpeed-LLM keep in the same form, and that a dense model may have
    *("add_rmsnorm_offset", "apply_residual_connection_post_layernorm", "attn_logit_softcapping", "dim_model_base"),
    *("embed_layernorm", "input_embeds_norm", "interleave_sliding_window", "lm_norm_weight"),
    *("output_logit_softcapping", "output_multiplier_scale", "post_norm", "qk_layernorm", "query_pre_attn_scalar"),
    *("rotary_percent", "scale_depth", "scale_emb", "sliding_window"),
}
_SAME = (
    {field.name for field in fields(ModelOptions)}
    - FEATURES
    - {
        "model",
        "make_vocab_size_divisible_by",
        "padded_vocab_size",
        "group_query_attention",
        "num_query_groups",
        "openai_gelu",
        "rope_scaling_type",
        "rope_scaling_factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
        "rope_scaling_beta_fast",
        "rope_scaling_beta_slow",
        "rope_scaling_mscale",
    }
)
_ALSO = (  # what else is read
    *("rope_scaling_type", "rope_scaling_factor", "low_freq_factor", "high_freq_factor", "norm_epsilon"),
    *("layernorm_epsilon", "num_query_groups", "original_max_position_embeddings", "rope_scaling_beta_fast"),
    *("rope_scaling_beta_slow", "rope_scaling_mscale", "rope_scaling_original_max_position_embeddings"),
)


def spec_of_arguments(args: Namespace | None, vocab_size: int, where: str) -> ModelSpec:
    """The model that the arguments of a checkpoint describe, with `vocab_size` rows in its embedding.

    ProblemError if they do not, or if arguments alone do not tell the family.
    """
    if args is None:
        why = "it carries no settings, so that nothing tells which model it is"
        raise ProblemError([unclear(where, None, why)])
    if getattr(args, UNTOLD, False):
        raise ProblemError([unclear(where, None, "its settings do not tell all about the model")])
    if refused := [name for name in REFUSED if getattr(args, name, None) not in (None, False)]:
        why = f"its settings say what flags of cordee train do not: {', '.join(refused)}"
        raise ProblemError([unclear(where, None, why)])
    given = _given(args, where)
    if given.get("position_embedding_type") != "rope" and not given.get("use_rotary_position_embeddings"):
        for name in ("rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor"):
            given.pop(name, None)  # Megatron has defaults for them, whatever the positions are
    if given.get("num_experts") or given.get("multi_latent_attention") or given.get("multi_head_latent_attention"):
        why = "its settings do not tell all about a mixture of experts or latent attention"
        raise ProblemError([unclear(where, None, why)])
    if given.get("position_embedding_type") == "alibi" and not hasattr(args, "lm_norm_weight"):
        why = "its settings do not tell whether the head is normalised, as it is in some models with alibi"
        raise ProblemError([unclear(where, None, why)])
    values = {name: given[name] for name in _SAME & given.keys()}
    values |= {name: given[name] for name in _FLAGS & given.keys() if given[name]}
    values |= {"vocab_size": vocab_size, "padded_vocab_size": vocab_size}
    values["norm_epsilon"] = given.get("norm_epsilon", given.get("layernorm_epsilon", 1e-5))
    if given.get("use_rotary_position_embeddings"):
        values["position_embedding_type"] = "rope"
    if given.get("group_query_attention"):
        values |= {"group_query_attention": True, "num_query_groups": given.get("num_query_groups", 1)}
    if given.get("openai_gelu"):
        values["openai_gelu"] = True
    biased = given.get("add_bias_linear", True)  # Megatron's other two flags only add biases to it
    values["add_qkv_bias"] = bool(biased or given.get("add_qkv_bias"))
    values["add_dense_bias"] = bool(biased or given.get("add_dense_bias"))
    try:
        return spec_from_options(config_from_dict(ModelOptions, {**values, **_scaling(given, where)}))
    except ProblemError as error:
        raise ProblemError([unclear(where, p.option, f"by its settings: {p.why}") for p in error.problems]) from error


def _given(args: Namespace, where: str) -> dict[str, Any]:
    """The settings that are plain values."""
    given = {name: value for name, value in vars(args).items() if isinstance(value, str | int | float)}
    said = (_SAME | _FLAGS | set(_ALSO)) & given.keys()
    if endless := sorted(name for name in said if not _is_reasonable(given[name])):
        why = f"by its settings: no model has such values of {', '.join(endless)}"
        raise ProblemError([unclear(where, None, why)])
    return given


def _is_reasonable(value: str | int | float) -> bool:
    """Whether a value can be calculated with, and shown if it is wrong."""
    return len(value) <= 1000 if isinstance(value, str) else not isinstance(value, int) or abs(value) < 2**63


def _scaling(given: dict[str, Any], where: str) -> dict[str, Any]:
    kind = given.get("rope_scaling_type")
    if kind == "yarn":
        return {
            "rope_scaling_type": kind,
            "rope_scaling_factor": given.get("rope_scaling_factor"),
            "original_max_position_embeddings": given.get("rope_scaling_original_max_position_embeddings"),
            "rope_scaling_beta_fast": given.get("rope_scaling_beta_fast"),
            "rope_scaling_beta_slow": given.get("rope_scaling_beta_slow"),
            "rope_scaling_mscale": given.get("rope_scaling_mscale"),
        }
    if kind not in (None, "llama3"):
        raise ProblemError([unclear(where, kind, "its settings do not tell how positions are stretched")])
    if given.get("rope_scaling_type") != "llama3" and not given.get("use_rope_scaling"):
        return {}
    return {
        "rope_scaling_type": "llama3",
        "rope_scaling_factor": given.get("rope_scaling_factor", 8.0),
        "low_freq_factor": given.get("low_freq_factor", 1.0),
        "high_freq_factor": given.get("high_freq_factor", 4.0),
        "original_max_position_embeddings": given.get("original_max_position_embeddings", 8192),
    }


def dtype_arguments(dtype: torch.dtype | None) -> dict[str, Any]:
    """What the arguments say of the type of the weights."""
    return {"params_dtype": dtype, "fp16": dtype == torch.float16, "bf16": dtype == torch.bfloat16}
