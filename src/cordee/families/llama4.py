"""Llama 4, the language model (Meta 2025): three of four layers attend within chunks, the others without positions.

Queries and keys are normed after they are turned; without positions, queries grow with the position instead. The
sigmoid of a token's best logit multiplies what its expert is given; a shared expert sees all tokens. Experts are stored
as stacks `[expert, in, out]`, rotary dims in neighbouring pairs.
"""

from __future__ import annotations

from dataclasses import replace

from cordee.families import common
from cordee.families.experts import expert_stack_weights, read_balance, read_choice, read_layer_numbers
from cordee.families.family import KEYS, Family, HFConfig, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule, module
from cordee.model.config import (
    AttentionConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    QKNormConfig,
    RouterConfig,
    TemperatureScaling,
)

CHUNKED = "chunked_attention"


def read(hf: ConfigReader) -> ModelConfig:
    norm, count = common.read_norm(hf), hf.integer("num_hidden_layers")
    expert, dense = common.read_swiglu(hf), common.read_swiglu(hf, key="intermediate_size_mlp")
    moe = MoEConfig(
        router=RouterConfig(**read_choice(hf, "num_local_experts"), score="sigmoid"),
        expert=expert,
        shared=expert,
        weight_input=True,
        balance=read_balance(hf),
    )
    step = hf.integer("interleave_moe_layer_step", 1)
    sparse = read_layer_numbers(hf, "moe_layers", list(range(step - 1, count, step)))
    layers = [
        LayerConfig(attention=attention, mlp=moe if i in sparse else dense, norm=norm)
        for i, attention in enumerate(read_attention(hf))
    ]
    return common.read_model(hf, layers, norm)


def read_attention(hf: ConfigReader) -> list[AttentionConfig]:
    """Attention of every layer."""
    heads, bias = common.read_heads(hf), hf.flag("attention_bias", False)
    plain = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias)
    growth = TemperatureScaling(scale=hf.number("attn_scale", 0.1), floor_scale=hf.positive("floor_scale", 8192))
    unplaced = replace(plain, query_scaling=growth if hf.value("attn_temperature_tuning", True) else None)
    norm = QKNormConfig(norm=NormConfig(kind="rms", eps=hf.number("rms_norm_eps"), affine=False), after_rope=True)
    rope = read_rope(hf, heads["head_dim"], theta=500000.0)
    placed = replace(plain, rope=rope, qk_norm=norm if hf.flag("use_qk_norm", True) else None)

    interval, chunk = hf.integer("no_rope_layer_interval", 4), hf.integer("attention_chunk_size", 8192)
    turned = [int((i + 1) % interval != 0) for i in range(hf.integer("num_hidden_layers"))]
    turned = common.read_of_layers(hf, "no_rope_layers", (0, 1), turned)  # 1 where there is rope, despite the name
    types = common.read_of_layers(
        hf, "layer_types", (CHUNKED, common.FULL), [CHUNKED if t else common.FULL for t in turned]
    )
    return [
        replace(placed if t else unplaced, chunk=chunk if kind == CHUNKED else None)
        for t, kind in zip(turned, types, strict=True)
    ]


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, layer_weights)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    attention, mlp = layer.attention, "feed_forward"
    assert isinstance(attention, AttentionConfig)
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return [
        *module("attention_norm", "input_layernorm"),
        *module("attention.qkv", *projections, op=common.paired_qkv(attention)),
        *module("attention.out", "self_attn.o_proj"),
        *module("mlp_norm", "post_attention_layernorm"),
        *common.mlp_weights("mlp", mlp),
        *module("mlp.router", f"{mlp}.router"),
        *expert_stack_weights(f"{mlp}.experts", branches="two f"),
        *common.mlp_weights("mlp.shared", f"{mlp}.shared_expert"),
    ]


def _preset(experts: int, step: int, context: int, qk_norm: bool, scaling: HFConfig | None) -> Preset:
    config = {
        "vocab_size": 202048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": step,
        "router_aux_loss_coef": 0.001,
        "attention_chunk_size": 8192,
        "use_qk_norm": qk_norm,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 200000,
        "eos_token_id": [200001, 200007, 200008],
        "pad_token_id": 200018,
        "torch_dtype": "bfloat16",
    }
    return Preset(config=config, licence="Llama 4 Community License")


_STRETCHED = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}

FAMILY = Family(
    name="llama4",
    architectures=("Llama4ForCausalLM", "Llama4TextModel"),
    model_types=("llama4_text",),
    read=read,
    weights=weights,
    base_prefix="model.",
    keys={name: key for name, key in KEYS.items() if name != "ffn_hidden_size"},
    presets={
        "llama4-scout": _preset(16, 1, 10485760, True, _STRETCHED),
        "llama4-maverick": _preset(128, 2, 1048576, False, None),
    },
)
