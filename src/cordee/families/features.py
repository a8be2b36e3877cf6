"""What the options say of a model beyond its sizes: experts, latent attention, windows, caps, scales, further norms.

Owns one word for each such option, read off a model, so that options can be compared with any model whatever its family
calls things; and which properties no option has a word for. Knows no family and nothing of how a word is changed: that
is the key which a family's `keys` have under the option's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields

from cordee.config.schema import FeatureOptions, ModelOptions
from cordee.families.rope import mscale
from cordee.model.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    YarnScaling,
)

Word = bool | int | float | str
Features = dict[str, Word]

TOP_K = 2  # Megatron's default


def given_features(options: ModelOptions) -> Features:
    """The features that `options` give, by name; there are options of models that know no features."""
    given = {field.name: getattr(options, field.name, None) for field in fields(FeatureOptions)}
    return {name: value for name, value in given.items() if value is not None}


def with_defaults(given: Features) -> Features:
    """`given` with Megatron's defaults for what goes with it, in a model that options describe alone."""
    if "num_experts" not in given:
        return given
    return {"moe_router_topk": TOP_K, "moe_router_load_balancing_type": "aux_loss", **given}


def features_of(config: ModelConfig) -> Features:
    """What `config` has of the features, by the name of the option. What is not there has no entry."""
    words = {**_of_model(config), **_of_layers(config), **_of_attention(config), **_of_experts(config)}
    absent = _absent(config)
    return {name: value for name, value in words.items() if not same(value, absent.get(name))}


def missing(config: ModelConfig, wanted: Features) -> Features:
    """What is `wanted` and not so in `config`."""
    there = {**_absent(config), **features_of(config)}
    return {name: value for name, value in wanted.items() if not same(there.get(name), value)}


def unwanted(config: ModelConfig, wanted: Features) -> list[str]:
    """What `config` has though it is not `wanted`, properties without a word among them."""
    there = features_of(config)
    for name, others in _SAID_BY.items():
        if not wanted.keys().isdisjoint(others):
            there.pop(name, None)
    if there.get("moe_intermediate_size") == _first_width(config):
        there.pop("moe_intermediate_size")
    if there.get("moe_router_load_balancing_type") == "aux_loss":
        there.pop("norm_topk_prob", None)  # it is how such weights are made
    return [*(name for name in there if name not in wanted), *_without_words(config)]


def same(ours: Word | None, theirs: Word | None) -> bool:
    """Whether two values of a word are equal; numbers up to rounding, and False is not there, as None is."""
    if ours and theirs and not isinstance(ours, str) and not isinstance(theirs, str):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return (ours or None) == (theirs or None)


# Properties with several words, each of which is implied where another is given.
_SAID_BY = {
    "dim_model_base": ("output_multiplier_scale",),
    "input_embeds_norm": ("scale_emb",),
    "output_multiplier_scale": ("dim_model_base",),
    "qk_layernorm": ("multi_head_latent_attention",),
    "scale_emb": ("input_embeds_norm",),
}


def _absent(config: ModelConfig) -> Features:
    """Values with which a feature is as good as not there."""
    attention = config.layers[0].attention
    neutral: Features = dict.fromkeys(
        ("moe_layer_freq", "output_multiplier_scale", "rotary_percent", "routed_scaling_factor", "scale_emb"), 1
    )
    return neutral | ({"query_pre_attn_scalar": attention.head_dim} if isinstance(attention, AttentionConfig) else {})


def _of_model(config: ModelConfig) -> Features:
    return {
        "dim_model_base": config.logit_scale * config.hidden_size if config.logit_scale != 1.0 else False,
        "embed_layernorm": config.embedding_norm is not None,
        "input_embeds_norm": math.isclose(config.embedding_scale, math.sqrt(config.hidden_size)),
        "lm_norm_weight": config.norm_head,
        "output_logit_softcapping": config.logit_softcap or False,
        "output_multiplier_scale": config.logit_scale,
        "scale_emb": config.embedding_scale,
    }


def _of_layers(config: ModelConfig) -> Features:
    first = config.layers[0]
    scale = first.residual_scale
    return {
        "add_rmsnorm_offset": first.norm.unit_offset,
        "post_norm": first.norm_placement == "sandwich",
        "apply_residual_connection_post_layernorm": first.residual_from_norm,
        "scale_depth": scale * math.sqrt(config.num_layers) if scale != 1.0 else False,
    }


def _of_attention(config: ModelConfig) -> Features:
    first = config.layers[0].attention
    if isinstance(first, LatentAttentionConfig):
        return {
            "multi_head_latent_attention": True,
            "rope_scaling_mscale_all_dim": _mscale_all_dim(first),
            "q_lora_rank": first.q_lora_rank or False,
            "kv_lora_rank": first.kv_lora_rank,
            "qk_nope_head_dim": first.nope_head_dim,
            "qk_rope_head_dim": first.rope_head_dim,
            "v_head_dim": first.v_head_dim,
            "qk_layernorm": True,
        }
    rotary_dim = first.rope.rotary_dim if first.rope else None
    return {
        **_windows(config),
        "attn_logit_softcapping": first.softcap or False,
        "qk_layernorm": first.qk_norm is not None,
        "query_pre_attn_scalar": first.head_dim if first.scale is None else first.scale**-2,
        "rotary_percent": (rotary_dim or first.head_dim) / first.head_dim,
    }


def _mscale_all_dim(attention: LatentAttentionConfig) -> float:
    """The strength by which scores are sharper than without YaRN; 0.0 if they are not."""
    plain = (attention.nope_head_dim + attention.rope_head_dim) ** -0.5
    if not isinstance(attention.rope.scaling, YarnScaling) or math.isclose(attention.scale, plain):
        return 0.0
    return (math.sqrt(attention.scale / plain) - 1.0) / (mscale(attention.rope.scaling.factor) - 1.0)


def _windows(config: ModelConfig) -> Features:
    windows = [layer.attention.window for layer in config.layers if isinstance(layer.attention, AttentionConfig)]
    width = windows[0]
    if width is None:
        return {}
    if windows == [width] * len(windows):
        return {"sliding_window": width}
    alternating = [None if i % 2 else width for i in range(len(windows))]
    return {"interleave_sliding_window": width} if windows == alternating else {}


def _of_experts(config: ModelConfig) -> Features:
    sparse = [i for i, layer in enumerate(config.layers) if isinstance(layer.mlp, MoEConfig)]
    if not sparse:
        return {}
    moe = config.layers[sparse[0]].mlp
    assert isinstance(moe, MoEConfig)
    router, width = moe.router, moe.expert.ffn_hidden_size
    balancing = _balancing(router)
    step = sparse[1] - sparse[0] if len(sparse) > 1 else 1
    return {
        "num_experts": router.num_experts,
        "moe_router_topk": router.top_k,
        "moe_router_load_balancing_type": balancing,
        "moe_intermediate_size": width,
        "n_shared_experts": _whole(moe.shared.ffn_hidden_size / width) if moe.shared else False,
        "first_k_dense_replace": sparse[0] or False,
        "moe_layer_freq": step,
        "moe_router_num_groups": router.num_groups if router.num_groups > 1 else False,
        "topk_group": router.top_groups if router.num_groups > 1 else False,
        "norm_topk_prob": router.normalise,
        "routed_scaling_factor": router.scale,
    }


def _whole(number: float) -> int | float:
    return int(number) if number.is_integer() else number


def _balancing(router: RouterConfig) -> str:
    """Megatron's name of a way to choose: it takes the softmax over the chosen, which is that over all, normalised."""
    if router.num_groups > 1:
        return "group_limited_greedy"
    return "aux_loss" if router.score_when == "after" or router.normalise else "softmax_topk"


def _first_width(config: ModelConfig) -> int:
    mlp = config.layers[0].mlp
    return (mlp.expert if isinstance(mlp, MoEConfig) else mlp).ffn_hidden_size


# ---- properties without a word ---------------------------------------------------------------------------------------


def _without_words(config: ModelConfig) -> Iterator[str]:
    """Properties of `config` that no option asks for, as people call them."""
    layers = [layer.attention for layer in config.layers if isinstance(layer.attention, AttentionConfig)]
    checks: Mapping[str, Callable[[AttentionConfig], bool]] = {
        "attention sinks": lambda attention: attention.sinks,
        "scaled queries": lambda attention: attention.query_scaling is not None,
        "chunks of attention": lambda attention: attention.chunk is not None,
        "a norm over all queries": lambda attention: attention.qk_norm is not None and attention.qk_norm.over == "all",
    }
    yield from (name for name, check in checks.items() if any(map(check, layers)))
    if any(attention.window for attention in layers) and not _windows(config):
        yield "sliding windows of some layers"
    if len({attention.rope for attention in layers}) > 1:
        yield "rotary positions that differ between layers"
    if config.layers[0].norm_placement == "post":
        yield "norms after attention and MLP only"
    yield from dict.fromkeys(name for layer in config.layers for name in _of_mlp_without_words(layer))


def _of_mlp_without_words(layer: LayerConfig) -> Iterator[str]:
    mlp = layer.mlp
    dense: MLPConfig = mlp.expert if isinstance(mlp, MoEConfig) else mlp
    if dense.limit is not None:
        yield "clamped activations"
    if isinstance(mlp, MoEConfig):
        if mlp.shared_gate:
            yield "a gate of the shared experts"
        if mlp.weight_input:
            yield "weighted inputs of experts"
        if mlp.router.score == "sigmoid" or mlp.router.correction_bias or mlp.router.bias:
            yield "a router with sigmoid or biases"
