"""Qwen 1.5, 2 and 2.5, and CodeQwen 1.5.

LLaMA's form with biases on queries, keys and values (Bai et al. 2023; Yang et al. 2024); the smaller ones tie the head.
Longer texts than trained on are reached with YaRN.
"""

from __future__ import annotations

from dataclasses import replace

from cordee.families import common
from cordee.families.family import Family, HFConfig, Preset
from cordee.families.options import Shape
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm, mlp = common.read_heads(hf), common.read_norm(hf), common.read_swiglu(hf)
    attention = AttentionConfig(**heads, qkv_bias=True, rope=read_rope(hf, heads["head_dim"]))
    layers = [
        LayerConfig(attention=replace(attention, window=window), mlp=mlp, norm=norm) for window in read_windows(hf)
    ]
    return common.read_model(hf, layers, norm)


def read_windows(hf: ConfigReader) -> list[int | None]:
    """The window of every layer; without `layer_types` those from `max_window_layers` on have one, despite its name."""
    hf.value("sliding_window", None)  # given in most files, but without meaning unless the next key says so
    window = common.read_window(hf, 4096) if hf.flag("use_sliding_window", False) else None
    first = hf.number("max_window_layers", 28)
    return common.read_windows(hf, window, lambda layer: layer >= first)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, common.layer_weights)


def from_shape(shape: Shape) -> HFConfig | None:
    if not shape.qkv_bias or shape.dense_bias or shape.mlp_bias:
        return None
    return common.from_shape(shape)


TONGYI = "Tongyi Qianwen License"
RESEARCH = "Tongyi Qianwen Research License"
APACHE = "Apache-2.0"

SMALL, LARGE = 151936, 152064  # rows of the vocabulary


def _preset(
    licence: str, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int, **more: object
) -> Preset:
    config = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence=licence)


_TIED = {"tie_word_embeddings": True}
_LONG = {"max_position_embeddings": 131072}
_LONG_5 = {**_LONG, "rms_norm_eps": 1e-5}
_CODE = {"max_position_embeddings": 65536, "rms_norm_eps": 1e-5, "bos_token_id": 2, "eos_token_id": 2}
_YARN = {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}

PRESETS = {
    "qwen1.5-0.5b": _preset(RESEARCH, 24, 1024, 2816, 16, 16, SMALL, **_TIED),
    "qwen1.5-1.8b": _preset(RESEARCH, 24, 2048, 5504, 16, 16, SMALL),
    "qwen1.5-4b": _preset(RESEARCH, 40, 2560, 6912, 20, 20, SMALL, rope_theta=5e6),
    "qwen1.5-7b": _preset(TONGYI, 32, 4096, 11008, 32, 32, SMALL),
    "qwen1.5-14b": _preset(TONGYI, 40, 5120, 13696, 40, 40, LARGE),
    "qwen1.5-32b": _preset(TONGYI, 64, 5120, 27392, 40, 8, LARGE),
    "qwen1.5-72b": _preset(TONGYI, 80, 8192, 24576, 64, 64, LARGE),
    "qwen1.5-110b": _preset(TONGYI, 80, 8192, 49152, 64, 8, LARGE),
    "codeqwen1.5-7b": _preset(RESEARCH, 32, 4096, 13440, 32, 4, 92416, **_CODE),
    "qwen2-0.5b": _preset(APACHE, 24, 896, 4864, 14, 2, SMALL, **_TIED),
    "qwen2-1.5b": _preset(APACHE, 28, 1536, 8960, 12, 2, SMALL, **_TIED),
    "qwen2-7b": _preset(APACHE, 28, 3584, 18944, 28, 4, LARGE),
    "qwen2-72b": _preset(TONGYI, 80, 8192, 29568, 64, 8, LARGE),
    "qwen2.5-0.5b": _preset(APACHE, 24, 896, 4864, 14, 2, SMALL, **_TIED),
    "qwen2.5-1.5b": _preset(APACHE, 28, 1536, 8960, 12, 2, SMALL, **_TIED, **_LONG),
    "qwen2.5-3b": _preset("Qwen Research License", 36, 2048, 11008, 16, 2, SMALL, **_TIED),
    "qwen2.5-7b": _preset(APACHE, 28, 3584, 18944, 28, 4, LARGE, **_LONG),
    "qwen2.5-7b-yarn": _preset(APACHE, 28, 3584, 18944, 28, 4, LARGE, **_LONG, **_YARN),
    "qwen2.5-14b": _preset(APACHE, 48, 5120, 13824, 40, 8, LARGE, **_LONG_5),
    "qwen2.5-32b": _preset(APACHE, 64, 5120, 27648, 40, 8, LARGE, **_LONG_5),
    "qwen2.5-72b": _preset("Qwen License", 80, 8192, 29568, 64, 8, LARGE, **_LONG_5),
}

FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    model_types=("qwen2",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=common.FREQUENCIES,
    from_shape=from_shape,
    fits="--position-embedding-type rope --normalization RMSNorm --swiglu --add-qkv-bias and no other biases",
    presets=PRESETS,
)
