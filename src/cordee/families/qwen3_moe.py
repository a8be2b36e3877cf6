"""Qwen3-MoE (Qwen team 2025, arXiv 2505.09388): 128 small experts, none shared.

Softmax over all experts, the chosen weights normalised. Norms of queries and keys over each head, no biases.
"""

from __future__ import annotations

from dataclasses import replace

from cordee.families import common
from cordee.families.experts import (
    NARROW_EXPERTS,
    expert_keys,
    expert_list_weights,
    read_balance,
    read_choice,
    read_sparse_layers,
)
from cordee.families.family import KEYS, Family, Preset
from cordee.families.qwen3 import read_attention
from cordee.families.reader import ConfigReader
from cordee.families.rules import Rule, module
from cordee.model.config import (
    LayerConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)


def read(hf: ConfigReader) -> ModelConfig:
    choice = read_choice(hf, hf.alias("num_experts", "num_local_experts"))
    moe = MoEConfig(
        router=RouterConfig(**choice, normalise=hf.flag("norm_topk_prob", False)),
        expert=common.read_swiglu(hf, key="moe_intermediate_size"),
        balance=read_balance(hf),
    )
    attention, norm, dense = read_attention(hf), common.read_norm(hf), common.read_swiglu(hf)
    attention = replace(attention, window=read_window(hf))
    layers = [LayerConfig(attention=attention, mlp=moe if s else dense, norm=norm) for s in read_sparse_layers(hf)]
    return common.read_model(hf, layers, norm)


def read_window(hf: ConfigReader) -> int | None:
    """The window of all layers; other than in the dense models, `max_window_layers` means nothing."""
    for key in ("sliding_window", "max_window_layers"):  # given in most files all the same
        hf.value(key, None)
    return hf.integer("sliding_window", 4096) if hf.flag("use_sliding_window", False) else None


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, layer_weights)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer),
        *module("mlp.router", "mlp.gate"),
        *expert_list_weights(layer, "mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"),
    ]


def _preset(layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, expert: int) -> Preset:
    config = {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": expert,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.001,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "torch_dtype": "bfloat16",
    }
    return Preset(config=config, licence="Apache-2.0")


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    model_types=("qwen3_moe",),
    read=read,
    weights=weights,
    base_prefix="model.",
    keys={**KEYS, **expert_keys("num_experts"), **NARROW_EXPERTS},
    presets={
        "qwen3-30b-a3b": _preset(48, 2048, 6144, 32, 4, 768),
        "qwen3-235b-a22b": _preset(94, 4096, 12288, 64, 4, 1536),
    },
)
