"""Aquila and Aquila2: LLaMA's form, the largest with query groups (Zhang et al. 2024)."""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_plain_heads(hf), common.read_norm(hf)
    attention = AttentionConfig(**heads, rope=read_rope(hf, heads["head_dim"]))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, common.layer_weights)


def _preset(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, eps: float, length: int) -> Preset:
    config = {
        "vocab_size": 100008,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "initializer_range": 0.02,
        "rms_norm_eps": eps,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 100006,
        "eos_token_id": 100007,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    return Preset(config=config, licence="BAAI Aquila Model License Agreement")


FAMILY = Family(
    name="aquila",
    architectures=("AquilaForCausalLM", "AquilaModel"),
    model_types=("aquila",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=common.FREQUENCIES,
    keys=common.PLAIN_KEYS,
    presets={
        "aquila-7b": _preset(32, 4096, 11008, 32, 32, 1e-6, 2048),
        "aquila2-7b": _preset(32, 4096, 11008, 32, 32, 1e-5, 2048),
        "aquila2-34b": _preset(60, 6144, 24576, 48, 8, 1e-5, 4096),
    },
)
