"""OLMo 2: norms after attention and MLP instead of before, and over all queries and all keys (OLMo team 2025)."""

from cordee.families import common
from cordee.families.family import Family
from cordee.families.reader import ConfigReader
from cordee.model.config import LayerConfig, ModelConfig, QKNormConfig
from cordee.tensors.rules import Rule, module


def read(hf: ConfigReader) -> ModelConfig:
    bias, qk_norm = hf.flag("attention_bias", False), QKNormConfig(norm=common.read_norm(hf), over="all")
    attention = common.read_attention(hf, common.read_heads(hf), bias, qk_norm=qk_norm)
    return common.read_model(hf, common.read_layers(hf, attention, norm_placement="post"))


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.attention_weights(layer),
        *module("attention_norm", "post_attention_layernorm"),
        *common.mlp_weights(),
        *module("mlp_norm", "post_feedforward_layernorm"),
    ]


FAMILY = Family(
    name="olmo2",
    architectures=("Olmo2ForCausalLM", "Olmo2Model", "Olmo2ForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
)
