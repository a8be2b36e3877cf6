"""GLM-4-9B in the form of transformers.

Like LLaMA, with gate and up in one tensor, biases of q, k and v, and rotary positions of half of each head, in
neighbouring pairs of dims (GLM Team 2024). Its own form is in `chatglm.py`."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig
from cordee.tensors.rules import Rule


def read(hf: ConfigReader) -> ModelConfig:
    return common.read_model(hf, common.read_layers(hf, read_attention(hf)))


def read_attention(hf: ConfigReader) -> AttentionConfig:
    heads = common.read_heads(hf, head_dim=128, groups=2)
    rope = read_rope(hf, heads["head_dim"], partial=0.5)
    return AttentionConfig(**heads, qkv_bias=hf.flag("attention_bias", True), rope=rope)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    attention = common.attention_weights(layer, common.paired_qkv(layer))
    return common.layer_weights(layer, attention, common.packed_mlp_weights())


FAMILY = Family(
    name="glm",
    architectures=("GlmForCausalLM", "GlmModel", "GlmForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    keys=keys(attention_bias="qkv_bias", partial_rotary_factor="rotary_percent"),
)
