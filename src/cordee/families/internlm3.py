"""InternLM3: LLaMA's form; past the length trained on, the base of the rotary positions grows with the text."""

from cordee.families import common
from cordee.families.family import Family
from cordee.families.reader import ConfigReader
from cordee.model.config import ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    qkv_bias = hf.flag(hf.alias("qkv_bias", "attention_bias"), False)
    bias = hf.flag(hf.alias("bias", "mlp_bias"), False)  # of all other matrices
    attention = common.read_attention(hf, common.read_heads(hf, head_dim=128, groups=2), bias, qkv_bias=qkv_bias)
    return common.read_model(hf, common.read_layers(hf, attention, mlp=common.read_swiglu(hf, bias)))


FAMILY = Family(name="internlm3", architectures=("InternLM3ForCausalLM", "InternLM3Model"), read=read)
