"""Mistral: LLaMA's form, in the first version with a window over the last 4096 tokens (Jiang et al. 2023)."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.model.config import ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads = common.read_heads(hf, groups=8)
    attention = common.read_attention(hf, heads, window=common.read_window(hf, 4096))
    return common.read_model(hf, common.read_layers(hf, attention))


FAMILY = Family(
    name="mistral",
    architectures=("MistralForCausalLM", "MistralModel", "MistralForSequenceClassification"),
    read=read,
    ignored=common.FREQUENCIES,
    keys=keys(sliding_window="sliding_window"),
)
