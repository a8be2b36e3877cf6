"""The model that options describe alone, as a `ModelConfig`: what Megatron's flags mean together.

Owns that meaning, and in what two configurations may differ and still compute the same. Whatever no option can say is
as in the plainest model, so a family that adds something unasked for does not match. Knows no family.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cordee.config.option import to_flag
from cordee.errors import Problem
from cordee.families.features import Features, sparse_layers
from cordee.families.options import Shape
from cordee.families.rope import mscale
from cordee.model.config import (
    AttentionConfig,
    BalanceConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    QKNormConfig,
    RopeConfig,
    RouterConfig,
    YarnScaling,
)

LATENT_EPS = 1e-6  # of the norms of compressed vectors, in every model that has them
DIGITS = 12  # of scales: they are products and roots, which families take in another order


def describe(shape: Shape, features: Features) -> ModelConfig:
    """The model of this shape with these features, which `check` finds complete."""
    norm = replace(_plain_norm(shape), unit_offset=bool(features.get("add_rmsnorm_offset")))
    depth = features.get("scale_depth")
    attention = _latent(shape, features) if features.get("multi_head_latent_attention") else _attention(shape, features)
    layer = LayerConfig(
        attention=attention,
        mlp=MLPConfig(
            ffn_hidden_size=shape.ffn_hidden_size, activation=shape.activation, gated=shape.gated, bias=shape.mlp_bias
        ),
        norm=norm,
        norm_placement="sandwich" if features.get("post_norm") else "pre",
        residual_from_norm=bool(features.get("apply_residual_connection_post_layernorm")),
        residual_scale=depth / shape.num_layers**0.5 if depth else 1.0,
    )
    return ModelConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        max_position_embeddings=shape.max_position_embeddings,
        layers=tuple(_layers(layer, shape, features)),
        final_norm=norm,
        learned_positions=shape.position_embedding_type == "learned_absolute",
        embedding_norm=norm if features.get("embed_layernorm") else None,
        embedding_scale=shape.hidden_size**0.5 if features.get("input_embeds_norm") else features.get("scale_emb", 1.0),
        tie_word_embeddings=shape.tied,
        norm_head=bool(features.get("lm_norm_weight")),
        logit_scale=_logit_scale(shape, features),
        logit_softcap=features.get("output_logit_softcapping"),
        embedding_dropout=shape.hidden_dropout,
        attention_dropout=shape.attention_dropout,
        hidden_dropout=shape.hidden_dropout,
        init_std=shape.init_method_std,
    )


def _logit_scale(shape: Shape, features: Features) -> float:
    base = features.get("dim_model_base")
    return base / shape.hidden_size if base else features.get("output_multiplier_scale", 1.0)


def _attention(shape: Shape, features: Features) -> AttentionConfig:
    scalar = features.get("query_pre_attn_scalar")
    return AttentionConfig(
        num_heads=shape.num_attention_heads,
        num_kv_heads=shape.num_query_groups,
        head_dim=shape.kv_channels,
        qkv_bias=shape.qkv_bias,
        out_bias=shape.dense_bias,
        rope=_rope(shape, round(shape.kv_channels * features.get("rotary_percent", 1.0))),
        alibi=shape.position_embedding_type == "alibi",
        scale=scalar**-0.5 if scalar else None,
        softcap=features.get("attn_logit_softcapping"),
        qk_norm=QKNormConfig(norm=_plain_norm(shape)) if features.get("qk_layernorm") else None,
    )


def _plain_norm(shape: Shape) -> NormConfig:
    return NormConfig(kind="rms" if shape.normalization == "RMSNorm" else "layer", eps=shape.norm_epsilon)


def _rope(shape: Shape, rotary_dim: int) -> RopeConfig | None:
    if shape.position_embedding_type != "rope":
        return None
    partial = None if rotary_dim == shape.kv_channels else rotary_dim
    return RopeConfig(theta=shape.rotary_base, rotary_dim=partial, scaling=shape.rope_scaling)


def _latent(shape: Shape, features: Features) -> LatentAttentionConfig:
    sharper = 1.0
    if isinstance(shape.rope_scaling, YarnScaling):
        sharper = mscale(shape.rope_scaling.factor, features.get("rope_scaling_mscale_all_dim", 0.0))
    nope, rope = features["qk_nope_head_dim"], features["qk_rope_head_dim"]
    return LatentAttentionConfig(
        num_heads=shape.num_attention_heads,
        q_lora_rank=features.get("q_lora_rank"),
        kv_lora_rank=features["kv_lora_rank"],
        nope_head_dim=nope,
        rope_head_dim=rope,
        v_head_dim=features["v_head_dim"],
        norm=NormConfig(kind="rms", eps=LATENT_EPS),
        rope=RopeConfig(theta=shape.rotary_base, scaling=shape.rope_scaling),
        scale=(nope + rope) ** -0.5 * sharper**2,
        bias=shape.qkv_bias,
    )


def _layers(layer: LayerConfig, shape: Shape, features: Features) -> Iterator[LayerConfig]:
    window, alternating = features.get("sliding_window"), features.get("interleave_sliding_window")
    mixture = _mixture(shape, features) if features.get("num_experts") else None
    for number, sparse in enumerate(sparse_layers(shape.num_layers, features)):
        width = window or (alternating if number % 2 == 0 else None)
        attention = layer.attention
        if width and isinstance(attention, AttentionConfig):
            attention = replace(attention, window=width)
        yield replace(layer, attention=attention, mlp=mixture if mixture and sparse else layer.mlp)


def _mixture(shape: Shape, features: Features) -> MoEConfig:
    balancing = features.get("moe_router_load_balancing_type", "aux_loss")
    normalise = balancing == "aux_loss" or bool(features.get("norm_topk_prob"))
    limited = balancing == "group_limited_greedy"
    expert = MLPConfig(
        ffn_hidden_size=features.get("moe_intermediate_size", shape.ffn_hidden_size),
        activation=shape.activation,
        gated=shape.gated,
        bias=shape.mlp_bias,
    )
    shared = features.get("n_shared_experts")
    return MoEConfig(
        router=RouterConfig(
            num_experts=features["num_experts"],
            top_k=features["moe_router_topk"],
            normalise=normalise,
            scale=1.0 if limited and normalise else features.get("routed_scaling_factor", 1.0),
            num_groups=features["moe_router_num_groups"] if limited else 1,
            top_groups=features["topk_group"] if limited else 1,
        ),
        expert=expert,
        shared=replace(expert, ffn_hidden_size=shared * expert.ffn_hidden_size) if shared else None,
    )


# ---- what is missing -------------------------------------------------------------------------------------------------

_OF_EXPERTS = (
    *("first_k_dense_replace", "moe_intermediate_size", "moe_layer_freq", "moe_router_load_balancing_type"),
    *("moe_router_num_groups", "moe_router_topk", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor"),
    "topk_group",
)
_OF_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_WITH_LATENT = (*_OF_LATENT, "q_lora_rank", "rope_scaling_mscale_all_dim")


def check(shape: Shape, features: Features) -> Iterator[Problem]:
    """What a model that options describe alone lacks, or cannot have together."""
    yield from _experts(shape, features)
    yield from _positions(shape, features)
    yield from _alone(features, _OF_EXPERTS, "num_experts")
    yield from _alone(features, _WITH_LATENT, "multi_head_latent_attention")
    if features.get("multi_head_latent_attention"):
        yield from _needed(features, _OF_LATENT, "multi_head_latent_attention")
    if features.get("moe_router_load_balancing_type") == "group_limited_greedy":
        # MindSpeed-LLM takes the expert-parallel ranks; here a model is the same on any.
        yield from _needed(features, ("moe_router_num_groups", "topk_group"), "moe_router_load_balancing_type")
    for one, other in (
        ("sliding_window", "interleave_sliding_window"),
        ("input_embeds_norm", "scale_emb"),
        ("dim_model_base", "output_multiplier_scale"),
    ):
        if features.get(one) and features.get(other):
            yield Problem(to_flag(other), features[other], f"{to_flag(one)} says it too", "give one of the two")


def _experts(shape: Shape, features: Features) -> Iterator[Problem]:
    experts, top_k = features.get("num_experts"), features.get("moe_router_topk", 0)
    if not experts:
        return
    if top_k > experts:
        yield Problem("--moe-router-topk", top_k, f"there are {experts} experts", f"give at most {experts}")
    if not any(sparse_layers(shape.num_layers, features)):
        first = features.get("first_k_dense_replace")
        why = f"of {shape.num_layers} layers none is left to have experts"
        yield Problem("--first-k-dense-replace", first, why, "give less, or leave --num-experts out")
    groups, top_groups = features.get("moe_router_num_groups", 1), features.get("topk_group", 1)
    if features.get("moe_router_load_balancing_type") != "group_limited_greedy":
        for name, count in (("moe_router_num_groups", groups), ("topk_group", top_groups)):
            if count > 1:
                fix = "give --moe-router-load-balancing-type group_limited_greedy"
                yield Problem(to_flag(name), count, "experts are not chosen by groups", fix)
    elif experts % groups or top_groups > groups or top_k > experts // groups * top_groups:
        why = f"{top_k} of {experts} experts are not to be found in {top_groups} of {groups} groups"
        yield Problem("--moe-router-num-groups", groups, why, "let groups divide the experts and hold enough of them")


def _positions(shape: Shape, features: Features) -> Iterator[Problem]:
    rotary = shape.position_embedding_type == "rope"
    if features.get("rotary_percent", 1.0) != 1.0 and not rotary:
        why, fix = "positions are not rotary", "add --position-embedding-type rope"
        yield Problem("--rotary-percent", features["rotary_percent"], why, fix)
    if features.get("multi_head_latent_attention"):
        if not rotary:
            why, fix = "latent attention has rotary positions", "give --position-embedding-type rope"
            yield Problem("--position-embedding-type", shape.position_embedding_type, why, fix)
        if shape.qkv_bias != shape.dense_bias:
            why = "latent attention has biases in all of its projections or in none"
            yield Problem("--add-dense-bias", shape.dense_bias, why, "give --add-qkv-bias the same")


def _alone(features: Features, names: tuple[str, ...], needed: str) -> Iterator[Problem]:
    if not features.get(needed):
        for name in names:
            if features.get(name):
                yield Problem(
                    to_flag(name), features[name], f"there is no {to_flag(needed)}", f"give {to_flag(needed)}"
                )


def _needed(features: Features, names: tuple[str, ...], by: str) -> Iterator[Problem]:
    for name in names:
        if not features.get(name):
            yield Problem(to_flag(name), None, f"{to_flag(by)} {features[by]} needs it", f"give {to_flag(name)}")


# ---- when two are the same -------------------------------------------------------------------------------------------


def canonical(config: ModelConfig) -> ModelConfig:
    """`config` in the one form of all that compute the same; losses without a coefficient are left out."""
    layers = {layer: _canonical_layer(layer) for layer in config.layers}
    return replace(
        config,
        layers=tuple(layers[layer] for layer in config.layers),
        embedding_scale=_rounded(config.embedding_scale),
        logit_scale=_rounded(config.logit_scale),
    )


def _canonical_layer(layer: LayerConfig) -> LayerConfig:
    attention, mlp = layer.attention, layer.mlp
    if isinstance(attention, AttentionConfig):
        attention = replace(attention, scale=_rounded(attention.scale or attention.head_dim**-0.5))
    else:
        attention = replace(attention, scale=_rounded(attention.scale))
    if isinstance(mlp, MoEConfig):
        router = mlp.router
        if router.score == "softmax" and router.score_when == "after":  # is that over all experts, normalised
            router = replace(router, score_when="before", normalise=True)
        trained = any((mlp.balance.expert, mlp.balance.device, mlp.balance.communication, mlp.balance.z))
        mlp = replace(mlp, router=router, balance=mlp.balance if trained else BalanceConfig())
    return replace(layer, attention=attention, mlp=mlp, residual_scale=_rounded(layer.residual_scale))


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")
