"""LLaMA and what is built like it: LLaMA 1, 2, 3, 3.1, 3.2, Code Llama, Yi.

RMS norm before each half of a layer, rotary positions, SwiGLU, query groups (Touvron et al. 2023; Grattafiori et al.
2024)."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.model.config import ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    attention = common.read_attention(hf, common.read_heads(hf), hf.flag("attention_bias", False))
    mlp = common.read_swiglu(hf, bias=hf.flag("mlp_bias", False))
    return common.read_model(hf, common.read_layers(hf, attention, mlp=mlp))


FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"),
    read=read,
    ignored=common.FREQUENCIES,
    plain=True,
    keys=keys(attention_bias="qkv_bias", mlp_bias="mlp_bias"),
)
