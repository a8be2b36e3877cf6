"""Mistral: LLaMA's form, in the first version with a window over the last 4096 tokens (Jiang et al. 2023)."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf, groups=8), common.read_norm(hf)
    attention = AttentionConfig(**heads, rope=read_rope(hf, heads["head_dim"]), window=common.read_window(hf, 4096))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification"),
    read=read,
    ignored=common.FREQUENCIES,
    keys=keys(sliding_window="sliding_window"),
)
