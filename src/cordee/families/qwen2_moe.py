"""Qwen1.5-MoE and Qwen2-MoE (Qwen team 2024): many small experts, and a shared one behind a gate.

Softmax over all experts, the chosen weights not normalised. The shared expert's output is multiplied by a sigmoid of
its own. Biases on q, k and v.
"""

from __future__ import annotations

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
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule, module
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RouterConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    bias, rope = hf.flag("qkv_bias", True), read_rope(hf, heads["head_dim"])
    moe = MoEConfig(
        router=RouterConfig(**read_choice(hf, "num_experts"), normalise=hf.flag("norm_topk_prob", False)),
        expert=common.read_swiglu(hf, key="moe_intermediate_size"),
        shared=common.read_swiglu(hf, key="shared_expert_intermediate_size"),
        shared_gate=True,
        balance=read_balance(hf),
    )
    dense = common.read_swiglu(hf)
    return common.read_model(
        hf,
        [
            LayerConfig(
                attention=AttentionConfig(**heads, qkv_bias=bias, rope=rope, window=window),
                mlp=moe if sparse else dense,
                norm=norm,
            )
            for window, sparse in zip(read_windows(hf), read_sparse_layers(hf), strict=True)
        ],
        norm,
    )


def read_windows(hf: ConfigReader) -> list[int | None]:
    """Where windows are used: in every other one of the first `max_window_layers` layers, as transformers has it."""
    if not hf.flag("use_sliding_window", False):
        for key in ("sliding_window", "max_window_layers"):  # given all the same
            hf.value(key, None)
        return common.read_windows(hf, None)
    first = hf.number("max_window_layers", 28)
    return common.read_windows(hf, hf.integer("sliding_window", 4096), lambda i: i % 2 == 0 and i < first)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, layer_weights)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer),
        *module("mlp.router", "mlp.gate"),
        *expert_list_weights(layer, "mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"),
        *common.mlp_weights("mlp.shared", "mlp.shared_expert"),
        *module("mlp.shared_gate", "mlp.shared_expert_gate"),
    ]


def _preset(
    licence: str, layers: int, hidden: int, ffn: int, heads: int, kv_heads: int, shared: int, **more: object
) -> Preset:
    config = {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "shared_expert_intermediate_size": shared,
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence=licence)


TONGYI = "Tongyi Qianwen License"
APACHE = "Apache-2.0"

_EXPERTS_15 = {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
_EXPERTS_2 = {"num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 2560}

FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel"),
    model_types=("qwen2_moe",),
    read=read,
    weights=weights,
    base_prefix="model.",
    keys={**KEYS, **expert_keys("num_experts"), **NARROW_EXPERTS},
    presets={
        "qwen1.5-moe-a2.7b": _preset(TONGYI, 24, 2048, 5632, 16, 16, 5632, **_EXPERTS_15),
        "qwen2-57b-a14b": _preset(APACHE, 28, 3584, 18944, 28, 4, 20480, **_EXPERTS_2, max_position_embeddings=131072),
    },
)
