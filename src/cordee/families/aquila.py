"""Aquila and Aquila2: LLaMA's form, the largest with query groups (Zhang et al. 2024)."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.model.config import ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    attention = common.read_attention(hf, common.read_plain_heads(hf))
    return common.read_model(hf, common.read_layers(hf, attention))


FAMILY = Family(
    name="aquila",
    architectures=("AquilaForCausalLM", "AquilaModel"),
    read=read,
    ignored=common.FREQUENCIES,
    keys=keys("head_dim"),
)
