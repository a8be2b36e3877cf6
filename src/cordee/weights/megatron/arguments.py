"""The settings that a checkpoint of Megatron carries, `args`: made from a model, and a model made from them.

Owns which of Megatron's arguments say what a model is. Names of its arguments are given as Megatron and MindSpeed-LLM
read them from a checkpoint to check or to complete the command line."""

from argparse import Namespace
from dataclasses import fields
from typing import Any

import torch

from cordee.config.load import config_from_dict
from cordee.errors import Problem, ProblemError
from cordee.families.lenses import FEATURES, Words, differences, features_of, words_of
from cordee.families.options import ACTIVATIONS, SCALED_BY
from cordee.families.registry import ModelSpec, spec_from_options
from cordee.families.rope import SCALINGS
from cordee.model import config as configs
from cordee.model.compare import canonical
from cordee.model.config import AttentionConfig, LatentAttentionConfig, ModelConfig, MoEConfig
from cordee.model.options import ModelOptions
from cordee.weights.megatron.layout import MegatronLayout

GIVE_MODEL = "give --model with a preset or a directory with the config.json that belongs to the weights"
OF_READING = ("model", "checking")  # options of a conversion that say how a Megatron checkpoint is read


def unclear(where: str, value: object, why: str, fix: str = GIVE_MODEL, limit: object = None) -> Problem:
    """What a Megatron checkpoint does not define of its model, and options of a conversion can."""
    return Problem(where, value, why, fix, "unclear", OF_READING, limit)


# What Megatron calls as the options do, in every model and, besides, where attention is not latent.
_ALIKE = (
    *("num_layers", "hidden_size", "num_attention_heads", "max_position_embeddings", "normalization", "norm_epsilon"),
    *("vocab_size", "init_method_std", "attention_dropout", "hidden_dropout", "ffn_hidden_size", "num_query_groups"),
)
_LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_OF_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")


def arguments(config: ModelConfig, layout: MegatronLayout, padded_vocab: int, **more: Any) -> Namespace:
    """Megatron's arguments for a model in a layout; `more` are what a dialect or a user adds."""
    stages = [sum(len(c.layers) for c in layout.chunks if c.pipeline == p) for p in range(layout.pipeline)]
    uneven = len(set(stages)) > 1
    words, rope = words_of(config), config.layers[0].attention.rope
    placed = rope is not None or words["position_embedding_type"] != "rope"
    values: dict[str, Any] = {
        **{name: words[name] for name in _ALIKE},
        "encoder_num_layers": config.num_layers,
        "seq_length": config.max_position_embeddings,
        "position_embedding_type": words["position_embedding_type"] if placed else "none",
        "add_position_embedding": config.learned_positions,
        "use_rotary_position_embeddings": rope is not None,
        "layernorm_epsilon": words["norm_epsilon"],
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "padded_vocab_size": padded_vocab,
        "add_bias_linear": words["mlp_bias"],
        **{name: form == (words["activation"], words["gated"]) for name, form in ACTIVATIONS.items()},
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
    values |= _rope(rope, config.layers[0].attention) if rope is not None else {}
    values |= _attention(words)
    values |= _experts(config, words) if words["num_experts"] else {}
    # Where Megatron has a form of its own for a feature, it stands.
    found = Namespace(**{**_features(config), **values, **more})
    setattr(found, INCOMPLETE, not _define(found, config))
    return found


def _define(args: Namespace, config: ModelConfig) -> bool:
    """Whether these settings, read back, give the model."""
    try:
        read = spec_of_arguments(args, config.vocab_size, "settings")
    except ProblemError:
        return False
    return not differences(canonical(read.config), canonical(config))


def _features(config: ModelConfig) -> dict[str, Any]:
    """The features as the options call them, each set once: Megatron would multiply twice."""
    found = {**dict.fromkeys(FEATURES), **features_of(config)}
    if found["input_embeds_norm"]:
        found["scale_emb"] = None
    if found["dim_model_base"]:
        other = "output_multiplier_scale" if float(found["dim_model_base"]).is_integer() else "dim_model_base"
        found[other] = None
    return found


def _rope(rope: configs.RopeConfig, attention: AttentionConfig | LatentAttentionConfig) -> dict[str, Any]:
    head_dim = attention.head_dim if isinstance(attention, AttentionConfig) else attention.rope_head_dim
    values: dict[str, Any] = {
        "rotary_base": rope.theta,
        "rotary_percent": (rope.rotary_dim or head_dim) / head_dim,
        "rotary_interleaved": False,
    }
    scaling = rope.scaling
    if isinstance(scaling, configs.LinearScaling):
        return {**values, "rotary_seq_len_interpolation_factor": scaling.factor}
    if scaling is None or type(scaling) not in SCALINGS:  # else not Megatron's: nobody shall take it for none
        return {**values, **({} if scaling is None else {"rope_scaling_type": type(scaling).__name__})}
    yarn, original = isinstance(scaling, configs.YarnScaling), scaling.original_max_position_embeddings
    own = {name: getattr(scaling, name) for name in _OF_SCALING if hasattr(scaling, name)}
    return {
        **values,
        "rope_scaling_type": SCALINGS[type(scaling)],
        **({} if yarn else {"use_rope_scaling": True}),
        **{name if name.endswith("freq_factor") else f"rope_scaling_{name}": value for name, value in own.items()},
        f"{'rope_scaling_' if yarn else ''}original_max_position_embeddings": original,
    }


def _attention(words: Words) -> dict[str, Any]:
    if not words["multi_head_latent_attention"]:
        return {
            "kv_channels": words["kv_channels"],
            "group_query_attention": words["num_query_groups"] != words["num_attention_heads"],
            "qk_layernorm": words["qk_layernorm"],
            "add_qkv_bias": words["qkv_bias"],
            "add_dense_bias": words["dense_bias"],
        }
    return {
        **{name: words[name] for name in _LATENT},
        "multi_latent_attention": True,
        "multi_head_latent_attention": True,  # as MindSpeed-LLM calls it
        "qk_layernorm": True,
        "qk_head_dim": words["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": words["qk_rope_head_dim"],
        "kv_channels": words["v_head_dim"],
        "group_query_attention": False,
    }


def _experts(config: ModelConfig, words: Words) -> dict[str, Any]:
    moe = next(layer.mlp for layer in config.layers if isinstance(layer.mlp, MoEConfig))
    router, shared = moe.router, moe.shared
    return {
        "num_experts": router.num_experts,
        "moe_router_topk": router.top_k,
        "moe_router_score_function": router.score,
        # Softmax before the choice and weights normalised after it is softmax over the chosen.
        "moe_router_pre_softmax": router.score_when == "before" and not router.normalise,
        "moe_router_topk_scaling_factor": router.scale,
        "moe_router_enable_expert_bias": router.correction_bias,
        "moe_layer_freq": [int(isinstance(layer.mlp, MoEConfig)) for layer in config.layers],
        "moe_ffn_hidden_size": words["moe_intermediate_size"],
        "moe_shared_expert_intermediate_size": shared.ffn_hidden_size if shared else None,
    }


# Settings that change the mathematics and that nothing here would understand.
REFUSED = ("apply_layernorm_1p", "quick_geglu", "rotary_interleaved", "squared_relu", "use_glm_rope", "window_size")
INCOMPLETE = "cordee_model_untold"  # a setting of ours: the others do not define the model
_WHERE_ON = {  # what Megatron and MindSpeed-LLM call as the options do, of which any may be in a dense model, or off
    *("add_rmsnorm_offset", "apply_residual_connection_post_layernorm", "attn_logit_softcapping", "dim_model_base"),
    *("embed_layernorm", "group_query_attention", "input_embeds_norm", "interleave_sliding_window", "lm_norm_weight"),
    *("openai_gelu", "output_logit_softcapping", "output_multiplier_scale", "post_norm", "qk_layernorm"),
    *("query_pre_attn_scalar", "rotary_percent", "scale_depth", "scale_emb", "sliding_window"),
}
_ELSEWHERE = {"make_vocab_size_divisible_by", "model", "num_query_groups"}
_SAME = {field.name for field in fields(ModelOptions)} - FEATURES.keys() - SCALED_BY.keys() - _ELSEWHERE - _WHERE_ON
_YARN_LENGTH = "rope_scaling_original_max_position_embeddings"
_ALSO = {*SCALED_BY, "layernorm_epsilon", "num_query_groups", "rope_scaling_type", _YARN_LENGTH}
_LLAMA3 = {  # Megatron's defaults
    "rope_scaling_factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def spec_of_arguments(args: Namespace | None, vocab_size: int, where: str) -> ModelSpec:
    """The model that the arguments of a checkpoint describe, with `vocab_size` rows in its embedding.

    ProblemError if they do not, or if arguments alone do not define the family."""
    if args is None:
        raise _undefined(where, "it carries no settings that define the model")
    if getattr(args, INCOMPLETE, False):
        raise _undefined(where, "its settings do not define the model completely")
    if refused := [name for name in REFUSED if getattr(args, name, None) not in (None, False)]:
        raise _undefined(where, f"cordee train has no flags for these settings: {', '.join(refused)}", refused)
    given = _given(args, where)
    if given.get("position_embedding_type") != "rope" and not given.get("use_rotary_position_embeddings"):
        for name in ("rotary_base", "rotary_percent", "rotary_seq_len_interpolation_factor"):
            given.pop(name, None)  # Megatron has defaults for them, whatever the positions are
    if given.get("num_experts") or given.get("multi_latent_attention") or given.get("multi_head_latent_attention"):
        raise _undefined(where, "its settings do not define a mixture of experts or latent attention completely")
    if given.get("position_embedding_type") == "alibi" and not hasattr(args, "lm_norm_weight"):
        raise _undefined(where, "its settings do not define whether the head is normalised, as some with alibi do")
    values = {name: given[name] for name in _SAME & given.keys()}
    values |= {name: given[name] for name in _WHERE_ON & given.keys() if given[name]}
    values |= {"vocab_size": vocab_size, "padded_vocab_size": vocab_size}
    values.setdefault("norm_epsilon", given.get("layernorm_epsilon", 1e-5))
    if given.get("use_rotary_position_embeddings"):
        values["position_embedding_type"] = "rope"
    if "group_query_attention" in values:
        values["num_query_groups"] = given.get("num_query_groups", 1)
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
    used = (_SAME | _WHERE_ON | _ALSO) & given.keys()
    if endless := sorted(name for name in used if not _is_reasonable(given[name])):
        raise _undefined(where, f"by its settings: no model has such values of {', '.join(endless)}")
    return given


def _undefined(where: str, why: str, limit: object = None) -> ProblemError:
    return ProblemError([unclear(where, None, why, limit=limit)])


def _is_reasonable(value: str | int | float) -> bool:
    """Whether a value can be calculated with, and shown if it is wrong."""
    return len(value) <= 1000 if isinstance(value, str) else not isinstance(value, int) or abs(value) < 2**63


def _scaling(given: dict[str, Any], where: str) -> dict[str, Any]:
    kind = given.get("rope_scaling_type", "llama3" if given.get("use_rope_scaling") else None)
    if kind not in (None, "llama3", "yarn"):
        raise ProblemError([unclear(where, kind, "its settings do not define the RoPE scaling")])
    usual = _LLAMA3 if kind == "llama3" else {}
    values = {name: given.get(name, usual.get(name)) for name, kinds in SCALED_BY.items() if kind in kinds}
    if kind == "yarn":
        values["original_max_position_embeddings"] = given.get(_YARN_LENGTH)
    return {"rope_scaling_type": kind, **values} if kind else {}


def dtype_arguments(dtype: torch.dtype | None) -> dict[str, Any]:
    """What the arguments say of the type of the weights."""
    return {"params_dtype": dtype, "fp16": dtype == torch.float16, "bf16": dtype == torch.bfloat16}
