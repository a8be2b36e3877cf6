"""OLMo 2: norms after attention and MLP instead of before, and over all queries and all keys (OLMo team 2025)."""

from cordee.families import common
from cordee.families.family import Family
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig, QKNormConfig
from cordee.tensors.rules import Rule, module


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm, bias = common.read_heads(hf), common.read_norm(hf), hf.flag("attention_bias", False)
    rope, qk_norm = read_rope(hf, heads["head_dim"]), QKNormConfig(norm=norm, over="all")
    attention = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, rope=rope, qk_norm=qk_norm)
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm, norm_placement="post")
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


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
