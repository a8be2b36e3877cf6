"""Gemma 3, text only.

As `gemma2.py`, with norms of queries and keys instead of caps, and after several layers with a window one without,
whose RoPE has a larger base (Gemma Team 2025, arXiv 2503.19786)."""

from dataclasses import replace

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.gemma import read_layers, read_model, read_norm
from cordee.families.gemma2 import layer_weights
from cordee.families.lenses import MODEL, at
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope, write_scaling
from cordee.model.config import ModelConfig, QKNormConfig, RopeScaling


def read(hf: ConfigReader) -> ModelConfig:
    heads, bias = common.read_heads(hf, head_dim=256, groups=4), hf.flag("attention_bias", False)
    far = read_rope(hf, heads["head_dim"], theta=1e6, layer_type="full_attention")
    near = read_rope(
        hf, heads["head_dim"], layer_type="sliding_attention", theta_key="rope_local_base_freq", scaling_key=None
    )
    scale = hf.positive("query_pre_attn_scalar", 256) ** -0.5
    every = hf.integer(hf.alias("sliding_window_pattern", "_sliding_window_pattern"), 6)
    windows = common.read_windows(hf, hf.integer("sliding_window", 4096), lambda layer: (layer + 1) % every != 0)
    attention = common.read_attention(hf, heads, bias, far, scale=scale, qk_norm=QKNormConfig(norm=read_norm(hf)))
    layers = [
        replace(layer, attention=replace(attention, window=window, rope=far if window is None else near))
        for layer, window in zip(read_layers(hf, attention, norm_placement="sandwich"), windows, strict=True)
    ]
    return read_model(hf, layers, logit_softcap=hf.positive("final_logit_softcapping", None))


def far_scaling(config: ModelConfig) -> RopeScaling | None:
    """That of the layers without a window; the others have none."""
    scalings = (layer.attention.rope.scaling for layer in config.layers if layer.attention.rope)
    return next((scaling for scaling in scalings if scaling), None)


FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel", "Gemma3TextForSequenceClassification"),
    model_types=("gemma3_text",),
    read=read,
    layer_weights=layer_weights,
    keys=keys(
        "rope_theta",  # it has two
        query_pre_attn_scalar="query_pre_attn_scalar",
        rope_scaling=lambda words: write_scaling(far_scaling(words[MODEL])),
        sliding_window=lambda words: at("layers.attention.window").get(words[MODEL]),
    ),
)
