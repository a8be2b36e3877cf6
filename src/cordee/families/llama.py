"""LLaMA and what is built like it: LLaMA 1, 2, 3, 3.1, 3.2, Code Llama, Yi.

RMS norm before each half of a layer, rotary positions, SwiGLU, query groups (Touvron et al. 2023; Grattafiori et al.
2024)."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    bias = hf.flag("attention_bias", False)
    attention = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, rope=read_rope(hf, heads["head_dim"]))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf, bias=hf.flag("mlp_bias", False)), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"),
    read=read,
    ignored=common.FREQUENCIES,
    plain=True,
    keys=keys(attention_bias="qkv_bias", mlp_bias="mlp_bias"),
)
