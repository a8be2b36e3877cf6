"""Mistral: LLaMA's form, in the first version with a window over the last 4096 tokens (Jiang et al. 2023)."""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import KEYS, Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    attention = AttentionConfig(**heads, rope=read_rope(hf, heads["head_dim"]), window=common.read_window(hf, 4096))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, common.layer_weights)


def _preset(layers: int, hidden: int, ffn: int, **more: object) -> Preset:
    config = {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence="Apache-2.0")


PRESETS = {
    "mistral-7b": _preset(32, 4096, 14336, rope_theta=10000.0, sliding_window=4096),
    "mistral-7b-v0.2": _preset(32, 4096, 14336),
    "mistral-7b-v0.3": _preset(32, 4096, 14336, vocab_size=32768),
    "mistral-nemo-12b": _preset(40, 5120, 14336, vocab_size=131072, max_position_embeddings=131072),
    "mistral-small-24b": _preset(40, 5120, 32768, vocab_size=131072, rope_theta=1e8),
}

FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM", "MistralModel"),
    model_types=("mistral",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=common.FREQUENCIES,
    keys={**KEYS, "sliding_window": "sliding_window"},
    presets=PRESETS,
)
