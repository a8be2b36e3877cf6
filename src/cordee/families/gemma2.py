"""Gemma 2.

As `gemma.py`, with norms before and after each half of a layer, scores and logits capped by tanh, a window in every
other layer, and scores scaled by a number of its own (Gemma Team 2024, arXiv 2408.00118)."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.gemma import read_layers, read_model
from cordee.families.reader import ConfigReader
from cordee.model.config import LayerConfig, ModelConfig
from cordee.tensors.rules import Rule, module


def read(hf: ConfigReader) -> ModelConfig:
    heads, bias = common.read_heads(hf, head_dim=256, groups=4), hf.flag("attention_bias", False)
    scale = hf.positive("query_pre_attn_scalar", 256) ** -0.5
    window = hf.integer(hf.alias("sliding_window", "sliding_window_size"), 4096)
    cap = read_cap(hf, "attn_logit_softcapping", 50.0)
    attention = common.read_attention(hf, heads, bias, scale=scale, softcap=cap)
    layers = read_layers(hf, attention, norm_placement="sandwich")
    layers = common.windowed(layers, common.read_windows(hf, window, lambda layer: layer % 2 == 0))
    return read_model(hf, layers, logit_softcap=read_cap(hf, "final_logit_softcapping", 30.0))


def read_cap(hf: ConfigReader, key: str, default: float) -> float | None:
    """A cap, which null switches off; `default` stands in for a missing key."""
    return hf.positive(key, None if key in hf.hf else default)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "input_layernorm"),
        *common.attention_weights(layer),
        *module("attention_post_norm", "post_attention_layernorm"),
        *module("mlp_norm", "pre_feedforward_layernorm"),
        *common.mlp_weights(),
        *module("mlp_post_norm", "post_feedforward_layernorm"),
    ]


FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM", "Gemma2Model", "Gemma2ForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    keys=keys(
        attn_logit_softcapping="attn_logit_softcapping",
        final_logit_softcapping="output_logit_softcapping",
        query_pre_attn_scalar="query_pre_attn_scalar",
        sliding_window="interleave_sliding_window",
    ),
)
