"""Mixtral (Jiang et al. 2024): LLaMA's form with eight experts in place of each MLP, two of which a token visits.

The two are weighted by the softmax of their logits. Each expert has its own matrices, `w1` (gate), `w3` (up) and `w2`
(down).
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.experts import expert_keys, expert_list_weights, read_balance, read_choice
from cordee.families.family import KEYS, Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule, module
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RouterConfig


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    rope = read_rope(hf, heads["head_dim"], theta=1e6)
    attention = AttentionConfig(**heads, rope=rope, window=hf.integer("sliding_window", None))
    moe = MoEConfig(
        router=RouterConfig(**read_choice(hf, "num_local_experts"), normalise=True),
        expert=common.read_swiglu(hf),
        balance=read_balance(hf),
    )
    layer = LayerConfig(attention=attention, mlp=moe, norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, layer_weights)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer),
        *module("mlp.router", "block_sparse_moe.gate"),
        *expert_list_weights(layer, "block_sparse_moe.experts.{e}.", "w1", "w3", "w2"),
    ]


def _preset(layers: int, hidden: int, ffn: int, heads: int, context: int, aux: float) -> Preset:
    config = {
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": aux,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    }
    return Preset(config=config, licence="Apache-2.0")


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM", "MixtralModel"),
    model_types=("mixtral",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=common.FREQUENCIES,
    keys={**KEYS, **expert_keys("num_local_experts"), "sliding_window": "sliding_window"},
    presets={
        "mixtral-8x7b": _preset(32, 4096, 14336, 32, 32768, 0.02),
        "mixtral-8x22b": _preset(56, 6144, 16384, 48, 65536, 0.001),
    },
)
