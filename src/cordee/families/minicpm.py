"""MiniCPM, dense and MoE.

Like LLaMA, with the scalings of maximal update parametrisation: of the embedding, of what each half of a layer adds,
and of the logits (Hu et al. 2024; Yang et al. 2022). The MoE models route each token to its top two experts."""

import math

from cordee.families import common
from cordee.families.experts import expert_keys, expert_list_weights, read_choice
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.model import config
from cordee.tensors.rules import Rule


def read(hf: ConfigReader) -> config.ModelConfig:
    attention = common.read_attention(hf, common.read_heads(hf), hf.flag("attention_bias", False))
    count, hidden = hf.integer("num_hidden_layers"), hf.integer("hidden_size")
    scale = hf.positive("scale_depth", 1.0) / math.sqrt(count)
    return common.read_model(
        hf,
        common.read_layers(hf, attention, mlp=read_mlp(hf), residual_scale=scale),
        embedding_scale=hf.positive("scale_emb", 1.0),
        logit_scale=hf.positive("dim_model_base", 1.0) / hidden,
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
    )


def read_mlp(hf: ConfigReader) -> config.MLPConfig | config.MoEConfig:
    mlp = common.read_swiglu(hf)
    if not hf.value("num_experts", 0):
        return mlp
    router = config.RouterConfig(**read_choice(hf, "num_experts"), normalise=True)
    # Published files leave the coefficient out; this is the one of the published training scripts.
    balance = config.BalanceConfig(expert=hf.number("router_aux_loss_coef", 0.01))
    return config.MoEConfig(router=router, expert=mlp, balance=balance)


def layer_weights(layer: config.LayerConfig) -> list[Rule]:
    return [*common.layer_weights(layer), *expert_list_weights(layer, "mlp", "w1", "w3", "w2")]


FAMILY = Family(
    name="minicpm",
    architectures=("MiniCPMForCausalLM", "MiniCPMModel"),
    read=read,
    layer_weights=layer_weights,
    ignored=common.FREQUENCIES,
    keys=keys(
        dim_model_base="dim_model_base", scale_depth="scale_depth", scale_emb="scale_emb", **expert_keys("num_experts")
    ),
)
