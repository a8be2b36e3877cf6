"""Aquila and Aquila2: LLaMA's form, the largest with query groups (Zhang et al. 2024)."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_plain_heads(hf), common.read_norm(hf)
    attention = AttentionConfig(**heads, rope=read_rope(hf, heads["head_dim"]))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


FAMILY = Family(
    name="aquila",
    architectures=("AquilaForCausalLM", "AquilaModel"),
    read=read,
    ignored=common.FREQUENCIES,
    keys=keys("head_dim"),
)
