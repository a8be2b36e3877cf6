"""Qwen3, dense: LLaMA's form with a norm of each head's queries and keys (Yang et al. 2025)."""

from dataclasses import replace

from cordee.families import common
from cordee.families.family import Family
from cordee.families.qwen2 import read_windows
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig, QKNormConfig


def read_attention(hf: ConfigReader, **defaults: int) -> AttentionConfig:
    """Attention of Qwen3, with or without experts, windows left out; `defaults` as for `read_heads`."""
    heads, bias = common.read_heads(hf, **defaults), hf.flag("attention_bias", False)
    rope, qk_norm = read_rope(hf, heads["head_dim"]), QKNormConfig(norm=common.read_norm(hf))
    return AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, rope=rope, qk_norm=qk_norm)


def read(hf: ConfigReader) -> ModelConfig:
    attention, norm, mlp = read_attention(hf, head_dim=128, groups=32), common.read_norm(hf), common.read_swiglu(hf)
    layers = [LayerConfig(attention=replace(attention, window=w), mlp=mlp, norm=norm) for w in read_windows(hf)]
    return common.read_model(hf, layers, norm)


FAMILY = Family(
    name="qwen3", architectures=("Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification"), read=read
)
