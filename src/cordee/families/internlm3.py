"""InternLM3: LLaMA's form; past the length trained on, the base of the rotary positions grows with the text."""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    qkv_bias = hf.flag(hf.alias("qkv_bias", "attention_bias"), False)
    bias = hf.flag(hf.alias("bias", "mlp_bias"), False)  # of all other matrices
    attention = AttentionConfig(**heads, qkv_bias=qkv_bias, out_bias=bias, rope=read_rope(hf, heads["head_dim"]))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf, bias), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, common.layer_weights)


PRESETS = {
    "internlm3-8b": Preset(
        config={
            "vocab_size": 128512,
            "hidden_size": 4096,
            "intermediate_size": 10240,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "hidden_act": "silu",
            "max_position_embeddings": 32768,
            "initializer_range": 0.02,
            "rms_norm_eps": 1e-5,
            "rope_theta": 50000000,
            "rope_scaling": {"rope_type": "dynamic", "factor": 6.0},
            "qkv_bias": False,
            "bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "torch_dtype": "bfloat16",
        },
        licence="Apache-2.0",
    ),
}

FAMILY = Family(
    name="internlm3",
    architectures=("InternLM3ForCausalLM", "InternLM3Model"),
    model_types=("internlm3",),
    read=read,
    weights=weights,
    base_prefix="model.",
    presets=PRESETS,
)
