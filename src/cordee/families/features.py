"""What the options say of a model beyond its sizes: experts, latent attention, windows, caps, scales, further norms.

Owns one word for each such option, read off a model, so that options can be compared with a model whatever its family
calls things. Of layers that differ it tells the first, or the first with experts. Knows no family and nothing of how a
word is changed: that is the key which a family's `keys` have under the option's name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from cordee.config.model_options import FeatureOptions
from cordee.families.rope import mscale
from cordee.model.config import (
    AttentionConfig,
    LatentAttentionConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    YarnScaling,
)

Features = Mapping[str, Any]  # values of `FeatureOptions` by name

TOP_K = 2  # Megatron's default
PATTERN = ("first_k_dense_replace", "moe_layer_freq")  # which layers have experts, together


def given_features(options: FeatureOptions) -> dict[str, Any]:
    """The features that `options` give, by name."""
    values = {field.name: getattr(options, field.name) for field in fields(FeatureOptions)}
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("moe_router_load_balancing_type") == "softmax_topk" and given.get("norm_topk_prob"):
        given["moe_router_load_balancing_type"] = "aux_loss"  # which is the same
    return given


def with_defaults(given: Features) -> dict[str, Any]:
    """`given` with Megatron's defaults for what goes with experts, in a model that has none by itself."""
    if not given.get("num_experts"):
        return dict(given)
    return {"moe_router_topk": TOP_K, "moe_router_load_balancing_type": "aux_loss", **given}


def sparse_layers(num_layers: int, features: Features) -> list[bool]:
    """Which layers have experts where any have: from the first few on, those whose number the frequency divides."""
    first, every = features.get("first_k_dense_replace") or 0, features.get("moe_layer_freq") or 1
    return [number >= first and number % every == 0 for number in range(num_layers)]


def features_of(config: ModelConfig) -> dict[str, Any]:
    """What `config` has of the features, by the name of the option. What is not there has no entry."""
    words = {**_of_model(config), **_of_layers(config), **_of_attention(config), **_of_experts(config)}
    absent = _absent(config)
    return {name: value for name, value in words.items() if not same(value, absent.get(name))}


def missing(config: ModelConfig, wanted: Features) -> dict[str, Any]:
    """What is `wanted` and not so in `config`."""
    there = {**_absent(config), **features_of(config)}
    found = {name: value for name, value in wanted.items() if not same(there.get(name), value)}
    if wanted.get("norm_topk_prob") and there["moe_router_num_groups"] != 1:
        found.pop("routed_scaling_factor", None)  # DeepSeek-V2 scales only weights that are not normalised
    pattern = {name: wanted[name] for name in PATTERN if name in wanted}
    if pattern:
        found = {name: value for name, value in found.items() if name not in PATTERN}
        have = [isinstance(layer.mlp, MoEConfig) for layer in config.layers]
        asked = sparse_layers(config.num_layers, {**{name: there.get(name) for name in PATTERN}, **pattern})
        dense = not any(have) and all(asked)  # values that say nothing of a model without experts
        found |= {} if have == asked or dense else pattern
    return found


def lost(before: ModelConfig, after: ModelConfig, wanted: Features) -> set[str]:
    """Properties that `after` has and `before` has not, or the other way, though nobody asked for it.

    Experts may go: with few layers, the first of which have none.
    """
    ours, theirs = features_of(before), features_of(after)
    names = {name for words in (ours, theirs) for name, value in words.items() if value is True}
    return {name for name in names - wanted.keys() - {"norm_topk_prob"} if ours.get(name) != theirs.get(name)}


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a word are equal; numbers up to rounding, and False is not there, as None is."""
    if isinstance(ours, int | float) and isinstance(theirs, int | float) and ours and theirs:
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return (ours or None) == (theirs or None)


def _absent(config: ModelConfig) -> dict[str, Any]:
    """Values with which a feature is as good as not there."""
    attention = config.layers[0].attention
    ones = ("moe_layer_freq", "moe_router_num_groups", "output_multiplier_scale", "rotary_percent")
    neutral = dict.fromkeys((*ones, "routed_scaling_factor", "scale_emb", "topk_group"), 1)
    return neutral | ({"query_pre_attn_scalar": attention.head_dim} if isinstance(attention, AttentionConfig) else {})


def _of_model(config: ModelConfig) -> dict[str, Any]:
    return {
        "dim_model_base": config.logit_scale * config.hidden_size if config.logit_scale != 1.0 else False,
        "embed_layernorm": config.embedding_norm is not None,
        "input_embeds_norm": math.isclose(config.embedding_scale, math.sqrt(config.hidden_size)),
        "lm_norm_weight": config.norm_head,
        "output_logit_softcapping": config.logit_softcap or False,
        "output_multiplier_scale": config.logit_scale,
        "scale_emb": config.embedding_scale,
    }


def _of_layers(config: ModelConfig) -> dict[str, Any]:
    first = config.layers[0]
    scale = first.residual_scale
    return {
        "add_rmsnorm_offset": first.norm.unit_offset,
        "post_norm": first.norm_placement == "sandwich",
        "apply_residual_connection_post_layernorm": first.residual_from_norm,
        "scale_depth": scale * math.sqrt(config.num_layers) if scale != 1.0 else False,
    }


def _of_attention(config: ModelConfig) -> dict[str, Any]:
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


def _windows(config: ModelConfig) -> dict[str, Any]:
    windows = [layer.attention.window for layer in config.layers if isinstance(layer.attention, AttentionConfig)]
    width = windows[0]
    alternating = [None if i % 2 else width for i in range(len(windows))]
    return {
        "sliding_window": width if windows == [width] * len(windows) else False,
        "interleave_sliding_window": width if windows == alternating else False,
    }


def _of_experts(config: ModelConfig) -> dict[str, Any]:
    sparse = [i for i, layer in enumerate(config.layers) if isinstance(layer.mlp, MoEConfig)]
    if not sparse:
        return {}
    moe = config.layers[sparse[0]].mlp
    assert isinstance(moe, MoEConfig)
    router, width = moe.router, moe.expert.ffn_hidden_size
    return {
        **_pattern(config, sparse),
        "num_experts": router.num_experts,
        "moe_router_topk": router.top_k,
        "moe_router_load_balancing_type": _balancing(router),
        "moe_intermediate_size": width,
        "n_shared_experts": _whole(moe.shared.ffn_hidden_size / width) if moe.shared else False,
        "moe_router_num_groups": router.num_groups,
        "topk_group": router.top_groups,
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


def _pattern(config: ModelConfig, sparse: list[int]) -> dict[str, Any]:
    """Where experts begin and how often they come, if such a rule gives these layers."""
    have = [isinstance(layer.mlp, MoEConfig) for layer in config.layers]
    steps = (sparse[1] - sparse[0],) if len(sparse) > 1 else range(1, 1 + config.num_layers)
    rules = ({PATTERN[0]: sparse[0], PATTERN[1]: every} for every in steps)
    return next((rule for rule in rules if sparse_layers(config.num_layers, rule) == have), {})
