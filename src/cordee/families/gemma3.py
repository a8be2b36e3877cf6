"""Gemma 3, text only.

As `gemma2.py`, with norms of queries and keys instead of caps, and after several layers with a window one without,
whose rotary positions turn more slowly (Gemma Team 2025, arXiv 2503.19786).
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import KEYS, Family
from cordee.families.gemma import preset, read_mlp, read_model, read_norm
from cordee.families.gemma2 import weights
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig, QKNormConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, bias = common.read_heads(hf, head_dim=256), hf.flag("attention_bias", False)
    norm, mlp = read_norm(hf), read_mlp(hf)
    far = read_rope(hf, heads["head_dim"], theta=1e6, layer_type="full_attention")
    near = read_rope(
        hf,
        heads["head_dim"],
        layer_type="sliding_attention",
        theta_key="rope_local_base_freq",
        scaling_key=None,
    )
    scale = hf.positive("query_pre_attn_scalar", 256) ** -0.5
    every = hf.integer(hf.alias("sliding_window_pattern", "_sliding_window_pattern"), 6)
    layers = []
    for window in common.read_windows(hf, hf.integer("sliding_window", 4096), lambda layer: (layer + 1) % every != 0):
        attention = AttentionConfig(
            **heads,
            qkv_bias=bias,
            out_bias=bias,
            rope=far if window is None else near,
            scale=scale,
            window=window,
            qk_norm=QKNormConfig(norm=norm),
        )
        layers.append(LayerConfig(attention=attention, mlp=mlp, norm=norm, norm_placement="sandwich"))
    return read_model(hf, layers, logit_softcap=hf.positive("final_logit_softcapping", None))


_OWN = {
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
}
_LARGE = _OWN | {
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
}

FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    model_types=("gemma3_text",),
    read=read,
    weights=weights,
    base_prefix="model.",
    keys={name: key for name, key in KEYS.items() if name not in ("rope_scaling", "rotary_base")},  # it has two
    presets={
        "gemma3-270m": preset(18, 640, 2048, 4, 1, 256, **_OWN),
        "gemma3-1b": preset(26, 1152, 6912, 4, 1, 256, **_OWN),
        "gemma3-4b": preset(34, 2560, 10240, 8, 4, 256, **_LARGE),
        "gemma3-12b": preset(48, 3840, 15360, 16, 8, 256, **_LARGE),
        "gemma3-27b": preset(62, 5376, 21504, 32, 16, 128, **_LARGE | {"query_pre_attn_scalar": 168}),
    },
)
