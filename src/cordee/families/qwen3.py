"""Qwen3, dense: LLaMA's form with a norm of each head's queries and keys (Yang et al. 2025)."""

from cordee.families import common
from cordee.families.family import Family
from cordee.families.qwen2 import read_windows
from cordee.families.reader import ConfigReader
from cordee.model.config import AttentionConfig, ModelConfig, QKNormConfig


def read_attention(hf: ConfigReader, **defaults: int) -> AttentionConfig:
    """Attention of Qwen3, with or without experts, windows left out; `defaults` as for `read_heads`."""
    bias, qk_norm = hf.flag("attention_bias", False), QKNormConfig(norm=common.read_norm(hf))
    return common.read_attention(hf, common.read_heads(hf, **defaults), bias, qk_norm=qk_norm)


def read(hf: ConfigReader) -> ModelConfig:
    attention = read_attention(hf, head_dim=128, groups=32)
    return common.read_model(hf, common.windowed(common.read_layers(hf, attention), read_windows(hf)))


FAMILY = Family(
    name="qwen3", architectures=("Qwen3ForCausalLM", "Qwen3Model", "Qwen3ForSequenceClassification"), read=read
)
