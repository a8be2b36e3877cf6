"""InternLM2 and InternLM2.5: LLaMA's form with q, k and v of each group together in one matrix (Cai et al. 2024)."""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family, HFConfig, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule, each_layer, grouped_qkv, module, stack
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm, bias = common.read_plain_heads(hf), common.read_norm(hf), hf.flag("bias", False)
    attention = AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, rope=read_rope(hf, heads["head_dim"]))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def weights(config: ModelConfig) -> list[Rule]:
    return [
        *module("embedding", "model.tok_embeddings"),
        *each_layer(config, layer_weights, "model.layers.{i}."),
        *module("final_norm", "model.norm"),
        *module("head", "output"),
    ]


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "attention_norm"),
        *module("attention.qkv", "attention.wqkv", op=common.qkv_op(layer, grouped_qkv)),
        *module("attention.out", "attention.wo"),
        *module("mlp_norm", "ffn_norm"),
        *module("mlp.gate_up", "feed_forward.w1", "feed_forward.w3", op=stack(2)),
        *module("mlp.down", "feed_forward.w2"),
    ]


def _preset(layers: int, hidden: int, ffn: int, heads: int, rope_scaling: HFConfig | None = None) -> Preset:
    config = {
        "vocab_size": 92544,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000,
        "rope_scaling": rope_scaling,
        "bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return Preset(config=config, licence="free for research, commercial use by application")


FAMILY = Family(
    name="internlm2",
    architectures=("InternLM2ForCausalLM", "InternLM2Model"),
    model_types=("internlm2",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=("model.layers.{i}.attention.rotary_emb.inv_freq",),
    keys=common.PLAIN_KEYS,
    presets={
        "internlm2-1.8b": _preset(24, 2048, 8192, 16),
        "internlm2-7b": _preset(32, 4096, 14336, 32),
        "internlm2-20b": _preset(48, 6144, 16384, 48),
        "internlm2.5-7b": _preset(32, 4096, 14336, 32, {"type": "dynamic", "factor": 2.0}),
    },
)
