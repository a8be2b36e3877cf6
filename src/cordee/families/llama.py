"""LLaMA and what is built like it: LLaMA 1, 2, 3, 3.1, 3.2, Code Llama, Yi.

RMS norm before each half of a layer, rotary positions, SwiGLU, query groups (Touvron et al. 2023; Grattafiori et al.
2024).
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family, HFConfig, Preset
from cordee.families.options import Shape
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    bias = hf.flag("attention_bias", False)
    attention = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, rope=read_rope(hf, heads["head_dim"]))
    mlp = common.read_swiglu(hf, bias=hf.flag("mlp_bias", False))
    layer = LayerConfig(attention=attention, mlp=mlp, norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, common.layer_weights)


def from_shape(shape: Shape) -> HFConfig | None:
    hf = common.from_shape(shape)
    if hf is None or shape.qkv_bias != shape.dense_bias:
        return None
    return {**hf, "attention_bias": shape.qkv_bias, "mlp_bias": shape.mlp_bias}


LLAMA1 = "non-commercial, by request"
LLAMA2 = "Llama 2 Community License"
LLAMA3 = "Llama 3 Community License"
LLAMA31 = "Llama 3.1 Community License"
LLAMA32 = "Llama 3.2 Community License"
APACHE = "Apache-2.0"
UNPUBLISHED = "no weights published"


def _preset(licence: str, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **more: object) -> Preset:
    config = {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence=licence)


def _scaling(factor: float) -> HFConfig:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_ONE = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "torch_dtype": "float16"}
_TWO = {"torch_dtype": "float16"}
_CODE = {"max_position_embeddings": 16384, "rope_theta": 1e6}
_THREE = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_THREE_ONE = {**_THREE, "max_position_embeddings": 131072, "rope_scaling": _scaling(8.0)}
_THREE_TWO = {**_THREE_ONE, "rope_scaling": _scaling(32.0), "tie_word_embeddings": True}
_YI = {"vocab_size": 64000, "rope_theta": 5e6}

PRESETS = {
    "llama-7b": _preset(LLAMA1, 32, 4096, 11008, 32, 32, **_ONE),
    "llama-13b": _preset(LLAMA1, 40, 5120, 13824, 40, 40, **_ONE),
    "llama-33b": _preset(LLAMA1, 60, 6656, 17920, 52, 52, **_ONE),
    "llama-65b": _preset(LLAMA1, 80, 8192, 22016, 64, 64, **_ONE | {"rms_norm_eps": 1e-5}),
    "llama2-7b": _preset(LLAMA2, 32, 4096, 11008, 32, 32, **_TWO),
    "llama2-13b": _preset(LLAMA2, 40, 5120, 13824, 40, 40, **_TWO),
    "llama2-34b": _preset(UNPUBLISHED, 48, 8192, 22016, 64, 8, rope_theta=1e6, **_TWO),
    "llama2-70b": _preset(LLAMA2, 80, 8192, 28672, 64, 8, **_TWO),
    "llama3-8b": _preset(LLAMA3, 32, 4096, 14336, 32, 8, **_THREE),
    "llama3-70b": _preset(LLAMA3, 80, 8192, 28672, 64, 8, **_THREE),
    "llama3.1-8b": _preset(LLAMA31, 32, 4096, 14336, 32, 8, **_THREE_ONE),
    "llama3.1-70b": _preset(LLAMA31, 80, 8192, 28672, 64, 8, **_THREE_ONE),
    "llama3.1-50b": _preset(UNPUBLISHED, 14, 16384, 53248, 128, 16, **_THREE_ONE),
    "llama3.1-200b": _preset(UNPUBLISHED, 62, 16384, 53248, 128, 16, **_THREE_ONE),
    "llama3.1-405b": _preset(LLAMA31, 126, 16384, 53248, 128, 8, **_THREE_ONE),
    "llama3.2-1b": _preset(LLAMA32, 16, 2048, 8192, 32, 8, head_dim=64, **_THREE_TWO),
    "llama3.2-3b": _preset(LLAMA32, 28, 3072, 8192, 24, 8, head_dim=128, **_THREE_TWO),
    "codellama-7b": _preset(LLAMA2, 32, 4096, 11008, 32, 32, vocab_size=32016, **_CODE),
    "codellama-13b": _preset(LLAMA2, 40, 5120, 13824, 40, 40, vocab_size=32016, **_CODE),
    "codellama-34b": _preset(LLAMA2, 48, 8192, 22016, 64, 8, **_CODE),
    "yi-6b": _preset(APACHE, 32, 4096, 11008, 32, 4, **_YI),
    "yi-34b": _preset(APACHE, 60, 7168, 20480, 56, 8, **_YI),
}

FAMILY = Family(
    name="llama",
    architectures=("LlamaForCausalLM", "LlamaModel"),
    model_types=("llama",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=common.FREQUENCIES,
    from_shape=from_shape,
    fits="--position-embedding-type rope --normalization RMSNorm --swiglu, query and output biases both or neither",
    presets=PRESETS,
)
