"""Phi-3, Phi-3.5 and Phi-4: LLaMA's form with all of q, k, v in one matrix and gate and up in another.

Some have a window, some turn only part of a head, and the long ones stretch positions by LongRoPE (Abdin et al. 2024).
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import KEYS, Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import GATE_UP, Rule, module, packed_qkv
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    attention = AttentionConfig(
        **heads, rope=read_rope(hf, heads["head_dim"], partial=1.0), window=common.read_window(hf)
    )
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    embedding_dropout, hidden_dropout = hf.probability("embd_pdrop", 0.0), hf.probability("resid_pdrop", 0.0)
    return common.read_model(
        hf,
        [layer] * hf.integer("num_hidden_layers"),
        norm,
        embedding_dropout=embedding_dropout,
        hidden_dropout=hidden_dropout,
    )


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, layer_weights)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "input_layernorm"),
        *module("attention.qkv", "self_attn.qkv_proj", op=common.qkv_op(layer, packed_qkv)),
        *module("attention.out", "self_attn.o_proj"),
        *module("mlp_norm", "post_attention_layernorm"),
        *module("mlp.gate_up", "mlp.gate_up_proj", op=GATE_UP),
        *module("mlp.down", "mlp.down_proj"),
    ]


def _preset(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, **more: object) -> Preset:
    config = {
        "vocab_size": 32064,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": 2047,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence="MIT")


_FOUR = {
    "vocab_size": 100352,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000.0,
    "sliding_window": None,
    "bos_token_id": 100257,
    "eos_token_id": 100265,
    "pad_token_id": 100349,
}

PRESETS = {
    "phi3-mini-4k": _preset(32, 3072, 8192, 32, 32),
    "phi3-medium-4k": _preset(40, 5120, 17920, 40, 10),
    "phi4-14b": _preset(40, 5120, 17920, 40, 10, **_FOUR),
}

FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM", "Phi3Model"),
    model_types=("phi3",),
    read=read,
    weights=weights,
    base_prefix="model.",
    keys={**KEYS, "rotary_percent": "partial_rotary_factor", "sliding_window": "sliding_window"},
    presets=PRESETS,
)
