"""Qwen3, dense: LLaMA's form with a norm of each head's queries and keys (Yang et al. 2025)."""

from __future__ import annotations

from dataclasses import replace

from cordee.families import common
from cordee.families.family import Family, Preset
from cordee.families.qwen2 import read_windows
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig, QKNormConfig


def read_attention(hf: ConfigReader) -> AttentionConfig:
    """Attention of Qwen3, with or without experts, windows left out."""
    heads, bias = common.read_heads(hf, head_dim=128), hf.flag("attention_bias", False)
    return AttentionConfig(
        **heads,
        qkv_bias=bias,
        out_bias=bias,
        rope=read_rope(hf, heads["head_dim"]),
        qk_norm=QKNormConfig(norm=common.read_norm(hf)),
    )


def read(hf: ConfigReader) -> ModelConfig:
    attention, norm, mlp = read_attention(hf), common.read_norm(hf), common.read_swiglu(hf)
    layers = [
        LayerConfig(attention=replace(attention, window=window), mlp=mlp, norm=norm) for window in read_windows(hf)
    ]
    return common.read_model(hf, layers, norm)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, common.layer_weights)


def _preset(layers: int, hidden: int, ffn: int, heads: int, tied: bool) -> Preset:
    config = {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }
    return Preset(config=config, licence="Apache-2.0")


PRESETS = {
    "qwen3-0.6b": _preset(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _preset(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _preset(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _preset(36, 4096, 12288, 32, tied=False),
    "qwen3-14b": _preset(40, 5120, 17408, 40, tied=False),
    "qwen3-32b": _preset(64, 5120, 25600, 64, tied=False),
}

FAMILY = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    model_types=("qwen3",),
    read=read,
    weights=weights,
    base_prefix="model.",
    presets=PRESETS,
)
