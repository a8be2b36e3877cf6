"""Grok-1 (xAI 2024): eight gated experts a layer, four norms around attention and experts, scaled scores and logits.

Attention scores are multiplied by a number of their own and capped at 30 by a tanh. A token's two experts are weighted
by the softmax over all eight, not normalised. GELU is the tanh form, as in the original. That was published as a JAX
program with its own files; names of tensors and keys are those of its conversions to PyTorch.
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.experts import expert_keys, expert_list_weights, read_balance, read_choice
from cordee.families.family import KEYS, Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule, each_layer, module, separate_qkv
from cordee.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, MoEConfig, RouterConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    attention = AttentionConfig(
        **heads,
        rope=read_rope(hf, heads["head_dim"]),
        scale=hf.positive("attn_output_multiplier"),
        softcap=hf.positive("max_attn_value", 30.0),
    )
    moe = MoEConfig(
        router=RouterConfig(**read_choice(hf, "num_experts")),
        expert=MLPConfig(ffn_hidden_size=hf.integer("intermediate_size"), activation="gelu_tanh", gated=True),
        balance=read_balance(hf),
    )
    layer = LayerConfig(attention=attention, mlp=moe, norm=norm, norm_placement="sandwich")
    return common.read_model(
        hf,
        [layer] * hf.integer("num_hidden_layers"),
        norm,
        embedding_scale=hf.positive("embedding_multiplier_scale"),
        logit_scale=hf.positive("output_multiplier_scale"),
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
    )


def weights(config: ModelConfig) -> list[Rule]:
    return [
        *module("embedding", "model.embed_tokens"),
        *each_layer(config, layer_weights, "model.layers.{i}."),
        scale("final_norm", "model.norm"),
        *module("head", "lm_head"),
    ]


def layer_weights(layer: LayerConfig) -> list[Rule]:
    attention = layer.attention
    assert isinstance(attention, AttentionConfig)
    qkv = separate_qkv(attention.num_kv_heads, attention.q_per_group, attention.head_dim)
    return [
        scale("attention_norm", "pre_attn_norm"),
        *module("attention.qkv", "attn.q_proj", "attn.k_proj", "attn.v_proj", op=qkv),
        *module("attention.out", "attn.o_proj"),
        scale("attention_post_norm", "post_attn_norm"),
        scale("mlp_norm", "pre_moe_norm"),
        *module("mlp.router", "moe_block.gate"),
        *expert_list_weights(layer, "moe_block.experts.{e}.", "linear", "linear_v", "linear_1"),
        scale("mlp_post_norm", "post_moe_norm"),
    ]


def scale(canonical: str, foreign: str) -> Rule:
    """The rule of a norm."""
    return Rule(f"{canonical}.weight", (f"{foreign}.scale",))


def _preset(licence: str, layers: int, **more: object) -> Preset:
    config = {
        "vocab_size": 131072,
        "hidden_size": 6144,
        "intermediate_size": 32768,
        "num_hidden_layers": layers,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "attn_output_multiplier": 0.08838834764831845,
        "embedding_multiplier_scale": 78.38367176906169,
        "output_multiplier_scale": 0.5773502691896257,
        "max_attn_value": 30.0,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence=licence)


# As the published training script has the model that is cut to 12 layers.
_CUT = {"router_aux_loss_coef": 0.01, "initializer_range": 0.01, "tie_word_embeddings": False}

FAMILY = Family(
    name="grok",
    architectures=("Grok1ModelForCausalLM", "Grok1Model"),
    model_types=("grok-1",),
    read=read,
    weights=weights,
    base_prefix="model.",
    keys={
        **KEYS,
        **expert_keys("num_experts"),
        "attn_logit_softcapping": "max_attn_value",
        "output_multiplier_scale": "output_multiplier_scale",
        "query_pre_attn_scalar": lambda number: {"attn_output_multiplier": number**-0.5},
        "scale_emb": "embedding_multiplier_scale",
    },
    presets={
        "grok-1": _preset("Apache-2.0", 64),
        "grok-1-8x5b": _preset("no weights published", 12, **_CUT),
    },
)
