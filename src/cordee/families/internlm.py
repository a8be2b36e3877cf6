"""InternLM: LLaMA's form with biases on q, k, v and o (InternLM team 2023).

Past the length trained on, the base of the rotary positions grows with the text.
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rules import Rule
from cordee.model.config import AttentionConfig, DynamicNTKScaling, LayerConfig, ModelConfig, RopeConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm, bias = common.read_plain_heads(hf, grouped=False), common.read_norm(hf), hf.flag("bias", True)
    attention = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, rope=read_rotary(hf))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def read_rotary(hf: ConfigReader) -> RopeConfig:
    """Rotary positions; files older than the key mean its default."""
    section = ConfigReader(hf.section("rotary"), f"{hf.where}: rotary")
    theta = float(section.positive("base", 10000.0))
    kind = section.choice("type", {"dynamic": "dynamic", "origin": "origin"}, "dynamic")
    scaling = DynamicNTKScaling(
        factor=section.positive("scaling_factor", 1.0),
        original_max_position_embeddings=hf.integer("max_position_embeddings"),
    )
    hf.problems += section.problems + section.not_understood()
    return RopeConfig(theta=theta, scaling=scaling if kind == "dynamic" else None)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, common.layer_weights)


LICENCE = "free for research, commercial use by application"


def _preset(licence: str, layers: int, hidden: int, ffn: int, heads: int, bias: bool, length: int) -> Preset:
    config = {
        "vocab_size": 103168,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rotary": {"base": 10000, "type": "dynamic"},
        "bias": bias,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "float16",
    }
    return Preset(config=config, licence=licence)


FAMILY = Family(
    name="internlm",
    architectures=("InternLMForCausalLM", "InternLMModel"),
    model_types=("internlm",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=common.FREQUENCIES,
    keys={name: key for name, key in common.MULTI_HEAD_KEYS.items() if name != "rotary_base"},
    presets={
        "internlm-7b": _preset(LICENCE, 32, 4096, 11008, 32, bias=True, length=2048),
        "internlm-20b": _preset(LICENCE, 60, 5120, 13824, 40, bias=False, length=4096),
        "internlm-65b": _preset("no weights published", 80, 8192, 22016, 64, bias=True, length=2048),
    },
)
