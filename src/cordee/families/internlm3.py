"""InternLM3: LLaMA's form; past the length trained on, the base of the rotary positions grows with the text."""

from cordee.families import common
from cordee.families.family import Family
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf, head_dim=128, groups=2), common.read_norm(hf)
    qkv_bias = hf.flag(hf.alias("qkv_bias", "attention_bias"), False)
    bias = hf.flag(hf.alias("bias", "mlp_bias"), False)  # of all other matrices
    attention = AttentionConfig(**heads, qkv_bias=qkv_bias, out_bias=bias, rope=read_rope(hf, heads["head_dim"]))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf, bias), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


FAMILY = Family(name="internlm3", architectures=("InternLM3ForCausalLM", "InternLM3Model"), read=read)
