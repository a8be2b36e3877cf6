"""Megatron-Core: names of its parameters, with its own layers, with Transformer Engine's, and in MindSpeed-LLM.

Owns the names and nothing else. Transformer Engine joins a norm with the linear layer that follows it. MindSpeed-LLM
(1.0.RC3) packs the first projections of latent attention and leaves shared experts whole."""

from dataclasses import replace

from cordee.model.config import LatentAttentionConfig, LayerConfig, MoEConfig
from cordee.weights.megatron.dialect import Dialect, Experts, Names

NAMES: Names = {
    "embedding": "embedding.word_embeddings.{part}",
    "position_embedding": "embedding.position_embeddings.{part}",
    "embedding_norm": "embedding.word_embeddings.norm.{part}",
    "final_norm": "decoder.final_layernorm.{part}",
    "head": "output_layer.{part}",
}
LAYER: Names = {
    "attention_norm": "input_layernorm.{part}",
    "attention.qkv": "self_attention.linear_qkv.{part}",
    "attention.q_norm": "self_attention.q_layernorm.{part}",
    "attention.k_norm": "self_attention.k_layernorm.{part}",
    "attention.sinks": "self_attention.core_attention.softmax_offset",
    "attention.q": "self_attention.linear_q_proj.{part}",
    "attention.q_down": "self_attention.linear_q_down_proj.{part}",
    "attention.q_up": "self_attention.linear_q_up_proj.{part}",
    "attention.kv_down": "self_attention.linear_kv_down_proj.{part}",
    "attention.kv_norm": "self_attention.kv_layernorm.{part}",
    "attention.kv_up": "self_attention.linear_kv_up_proj.{part}",
    "attention.out": "self_attention.linear_proj.{part}",
    "attention_post_norm": "post_attn_norm.{part}",
    "mlp_norm": "pre_mlp_layernorm.{part}",
    "mlp.gate_up": "mlp.linear_fc1.{part}",
    "mlp.up": "mlp.linear_fc1.{part}",
    "mlp.down": "mlp.linear_fc2.{part}",
    "mlp.router": "mlp.router.{part}",
    "mlp.router.correction_bias": "mlp.router.expert_bias",
    "mlp.shared.gate_up": "mlp.shared_experts.linear_fc1.{part}",
    "mlp.shared.up": "mlp.shared_experts.linear_fc1.{part}",
    "mlp.shared.down": "mlp.shared_experts.linear_fc2.{part}",
    "mlp.shared_gate.weight": "mlp.shared_experts.gate_weight",
    "mlp_post_norm": "post_mlp_layernorm.{part}",
}


def _experts(up: str, down: str) -> Names:
    return {"mlp.experts.gate_up": up, "mlp.experts.up": up, "mlp.experts.down": down}


_LOCAL = "mlp.experts.local_experts.{e}.linear_fc"
EXPERTS: dict[Experts, Names] = {
    "sequential": _experts(f"{_LOCAL}1.{{part}}", f"{_LOCAL}2.{{part}}"),
    "grouped": _experts("mlp.experts.{part}1", "mlp.experts.{part}2"),
    "numbered": _experts("mlp.experts.linear_fc1.{part}{e}", "mlp.experts.linear_fc2.{part}{e}"),
}
MINDSPEED: Names = {
    "attention.q": "self_attention.linear_qkv.{part}",
    "attention.q_down": "self_attention.linear_qkv.{part}",
    "attention.q_up": "self_attention.linear_qb.{part}",
    "attention.kv_down": "self_attention.linear_qkv.{part}",
    "attention.kv_norm": "self_attention.k_layernorm.{part}",
    "attention.kv_up": "self_attention.linear_kvb.{part}",
}


def _fused_names(layer: LayerConfig) -> Names:
    """Norms under the names of the linear layers that Transformer Engine joins them with."""
    names: dict[str, str | tuple[str, ...]] = {}
    if isinstance(layer.attention, LatentAttentionConfig):
        names["attention.q_norm"] = "self_attention.linear_q_up_proj.layer_norm_{part}"
        names["attention.kv_norm"] = "self_attention.linear_kv_up_proj.layer_norm_{part}"
    else:
        names["attention_norm"] = "self_attention.linear_qkv.layer_norm_{part}"
    if not isinstance(layer.mlp, MoEConfig):
        names["mlp_norm"] = "mlp.linear_fc1.layer_norm_{part}"
    return names


def local(experts: Experts = "sequential") -> Dialect:
    """Megatron-Core with its own layers."""
    return Dialect(
        title="Megatron-Core",
        names=NAMES,
        layer_names=lambda layer: {**LAYER, **EXPERTS[experts]},
        layer_prefix="decoder.layers.{n}.",
        tied_head="output_layer.weight",
        experts=experts,
    )


def transformer_engine(experts: Experts = "sequential") -> Dialect:
    """Megatron-Core with the layers of Transformer Engine."""
    return replace(
        local(experts),
        title="Megatron-Core with Transformer Engine",
        layer_names=lambda layer: {**LAYER, **EXPERTS[experts], **_fused_names(layer)},
        latent_split=False,
    )


def mindspeed(experts: Experts = "sequential") -> Dialect:
    """Megatron-Core as MindSpeed-LLM 1.0.RC3 extends it."""
    return replace(
        local(experts),
        title="MindSpeed-LLM",
        layer_names=lambda layer: {
            **LAYER,
            **EXPERTS[experts],
            **(MINDSPEED if isinstance(layer.attention, LatentAttentionConfig) else {}),
        },
        latent_split=False,
        shared_split=False,
        packed_latent=True,
    )


def recognise(names: set[str]) -> Dialect | None:
    """The dialect in which a checkpoint's names are; None if they are none of Megatron-Core's."""
    if not any(name.startswith(("decoder.", "embedding.", "output_layer.")) for name in names):
        return None
    if any(".mlp.experts.weight1" in name for name in names):
        experts: Experts = "grouped"
    else:
        experts = "numbered" if any(".mlp.experts.linear_fc1." in name for name in names) else "sequential"
    if any(".layer_norm_weight" in name for name in names):
        return transformer_engine(experts)
    if any(".self_attention.linear_kvb." in name for name in names):
        return mindspeed(experts)
    return local(experts)
