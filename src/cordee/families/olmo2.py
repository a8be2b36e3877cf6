"""OLMo 2: norms after attention and MLP instead of before, and over all queries and all keys (OLMo team 2025)."""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule, module
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig, QKNormConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm, bias = common.read_heads(hf), common.read_norm(hf), hf.flag("attention_bias", False)
    attention = AttentionConfig(
        **heads,
        qkv_bias=bias,
        out_bias=bias,
        rope=read_rope(hf, heads["head_dim"]),
        qk_norm=QKNormConfig(norm=norm, over="all"),
    )
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm, norm_placement="post")
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, layer_weights)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.attention_weights(layer),
        *module("attention_norm", "post_attention_layernorm"),
        *common.mlp_weights(),
        *module("mlp_norm", "post_feedforward_layernorm"),
    ]


def _preset(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int) -> Preset:
    config = {
        "vocab_size": 100352,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "eos_token_id": 100257,
        "pad_token_id": 100277,
        "torch_dtype": "float32",
    }
    return Preset(config=config, licence="Apache-2.0")


PRESETS = {
    "olmo2-1b": _preset(16, 2048, 8192, 16, 16),
    "olmo2-7b": _preset(32, 4096, 11008, 32, 32),
    "olmo2-13b": _preset(40, 5120, 13824, 40, 40),
    "olmo2-32b": _preset(64, 5120, 27648, 40, 8),
}

FAMILY = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM", "Olmo2Model"),
    model_types=("olmo2",),
    read=read,
    weights=weights,
    base_prefix="model.",
    presets=PRESETS,
)
