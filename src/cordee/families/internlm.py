"""InternLM: LLaMA's form with biases on q, k, v and o (InternLM team 2023).

Past the length trained on, the base of the rotary positions grows with the text."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.model.config import DynamicNTKScaling, ModelConfig, RopeConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads = common.read_plain_heads(hf, grouped=False)
    attention = common.read_attention(hf, heads, hf.flag("bias", True), rope=read_rotary(hf))
    return common.read_model(hf, common.read_layers(hf, attention))


def read_rotary(hf: ConfigReader) -> RopeConfig:
    """Rotary positions; files older than the key mean its default."""
    section = ConfigReader(hf.section("rotary"), f"{hf.where}: rotary")
    theta = float(section.positive("base", 10000.0))
    kind = section.choice("type", {"dynamic": "dynamic", "origin": "origin"}, "dynamic")
    length = hf.integer("max_position_embeddings")
    scaling = DynamicNTKScaling(factor=section.positive("scaling_factor", 1.0), original_max_position_embeddings=length)
    hf.problems += section.problems + section.not_understood()
    return RopeConfig(theta=theta, scaling=scaling if kind == "dynamic" else None)


FAMILY = Family(
    name="internlm",
    architectures=("InternLMForCausalLM", "InternLMModel"),
    read=read,
    ignored=common.FREQUENCIES,
    keys=keys("head_dim num_key_value_heads rope_theta rope_scaling", bias="qkv_bias"),
)
