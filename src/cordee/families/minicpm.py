"""MiniCPM, dense and as a mixture of experts.

Like LLaMA, with the scalings of maximal update parametrisation: of the embedding, of what each half of a layer adds,
and of the logits (Hu et al. 2024; Yang et al. 2022). Tokens of a mixture go to the two experts they like best.
"""

from __future__ import annotations

import math

from cordee.families import common
from cordee.families.experts import expert_keys, expert_list_weights, read_choice
from cordee.families.family import KEYS, Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule, module
from cordee.model.config import (
    AttentionConfig,
    BalanceConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
)


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm, bias = common.read_heads(hf), common.read_norm(hf), hf.flag("attention_bias", False)
    count, hidden = hf.integer("num_hidden_layers"), hf.integer("hidden_size")
    layer = LayerConfig(
        attention=AttentionConfig(**heads, qkv_bias=bias, out_bias=bias, rope=read_rope(hf, heads["head_dim"])),
        mlp=read_mlp(hf),
        norm=norm,
        residual_scale=hf.positive("scale_depth", 1.0) / math.sqrt(count),
    )
    return common.read_model(
        hf,
        [layer] * count,
        norm,
        embedding_scale=hf.positive("scale_emb", 1.0),
        logit_scale=hf.positive("dim_model_base", 1.0) / hidden,
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
    )


def read_mlp(hf: ConfigReader) -> MLPConfig | MoEConfig:
    mlp = common.read_swiglu(hf)
    if not hf.value("num_experts", 0):
        return mlp
    router = RouterConfig(**read_choice(hf, "num_experts"), normalise=True)
    # Published files leave the coefficient out; this is the one of the published training scripts.
    return MoEConfig(router=router, expert=mlp, balance=BalanceConfig(expert=hf.number("router_aux_loss_coef", 0.01)))


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, layer_weights)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    if isinstance(layer.mlp, MLPConfig):
        return common.layer_weights(layer)
    return [
        *common.layer_weights(layer),
        *module("mlp.router", "mlp.gate"),
        *expert_list_weights(layer, "mlp.experts.{e}.", "w1", "w3", "w2"),
    ]


_2B = {
    "vocab_size": 122753,
    "hidden_size": 2304,
    "intermediate_size": 5760,
    "num_hidden_layers": 40,
    "num_attention_heads": 36,
    "num_key_value_heads": 36,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "scale_emb": 12,
    "dim_model_base": 256,
    "scale_depth": 1.4,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
_LICENCE = "MiniCPM Model License"

FAMILY = Family(
    name="minicpm",
    architectures=("MiniCPMForCausalLM", "MiniCPMModel"),
    model_types=("minicpm",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=common.FREQUENCIES,
    keys={
        **KEYS,
        **expert_keys("num_experts"),
        **{name: name for name in ("scale_emb", "dim_model_base", "scale_depth")},
    },
    presets={
        "minicpm-2b": Preset(config=_2B, licence=_LICENCE),
        "minicpm-moe-8x2b": Preset(config={**_2B, "num_experts": 8, "num_experts_per_tok": 2}, licence=_LICENCE),
    },
)
