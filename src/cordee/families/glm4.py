"""GLM-4-0414: as `glm.py`, with a further norm after attention and one after the MLP."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.glm import layer_weights, read_attention
from cordee.families.reader import ConfigReader
from cordee.model.config import LayerConfig, ModelConfig
from cordee.tensors.rules import Rule, module


def read(hf: ConfigReader) -> ModelConfig:
    return common.read_model(hf, common.read_layers(hf, read_attention(hf), norm_placement="sandwich"))


def sandwich_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *layer_weights(layer),
        *module("attention_post_norm", "post_self_attn_layernorm"),
        *module("mlp_post_norm", "post_mlp_layernorm"),
    ]


FAMILY = Family(
    name="glm4",
    architectures=("Glm4ForCausalLM", "Glm4Model", "Glm4ForSequenceClassification"),
    read=read,
    layer_weights=sandwich_weights,
    keys=keys(attention_bias="qkv_bias"),
)
