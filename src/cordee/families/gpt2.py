"""GPT-2, and GPT-3 as far as dense attention goes.

Layer norm before each half of a layer, learned positions, GELU, biases everywhere, tied head (Radford et al. 2019;
Brown et al. 2020). Scores may be divided by the number of the layer besides (Karamcheti et al. 2021). Linear weights
are stored `[in, out]`, the layout of the original's convolutions of width one."""

import math

from cordee.families import common
from cordee.families.family import Family
from cordee.families.lenses import MODEL, Words
from cordee.families.reader import ConfigReader
from cordee.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig
from cordee.tensors.rules import TRANSPOSE, Rule, module, packed_qkv
from cordee.tensors.views import Chain, Op


def read(hf: ConfigReader) -> ModelConfig:
    hidden, heads = hf.integer("n_embd"), hf.integer("n_head")
    hf.divides("n_head", heads, "n_embd", hidden)
    norm = NormConfig(kind="layer", eps=hf.number("layer_norm_epsilon"))
    mlp = MLPConfig(
        ffn_hidden_size=hf.integer("n_inner", 4 * hidden),
        activation=hf.choice("activation_function", common.ACTIVATIONS, "gelu_new"),
        gated=False,
        bias=True,
    )
    head_dim, count = max(1, hidden // heads), hf.integer("n_layer")
    form = {"num_heads": heads, "num_kv_heads": heads, "head_dim": head_dim, "qkv_bias": True, "out_bias": True}
    attentions = [AttentionConfig(**form, scale=scale) for scale in read_scales(hf, head_dim, count)]
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=hf.integer("n_positions"),
        layers=tuple(LayerConfig(attention=attention, mlp=mlp, norm=norm) for attention in attentions),
        final_norm=norm,
        learned_positions=True,
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
        embedding_dropout=hf.probability("embd_pdrop", 0.1),
        attention_dropout=hf.probability("attn_pdrop", 0.1),
        hidden_dropout=hf.probability("resid_pdrop", 0.1),
        init_std=hf.number("initializer_range", 0.02),
    )


def read_scales(hf: ConfigReader, head_dim: int, count: int) -> list[float | None]:
    """What attention scores are multiplied by in each layer; None: by head_dim ** -0.5."""
    plain, by_layer = hf.flag("scale_attn_weights", True), hf.flag("scale_attn_by_inverse_layer_idx", False)
    first = head_dim**-0.5 if plain else 1.0
    return [None if plain and not (by_layer and i) else first / (i + 1 if by_layer else 1) for i in range(count)]


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "ln_1"),
        *transposed("attention.qkv", "attn.c_attn", common.qkv_op(layer, packed_qkv)),
        *transposed("attention.out", "attn.c_proj"),
        *module("mlp_norm", "ln_2"),
        *transposed("mlp.up", "mlp.c_fc"),
        *transposed("mlp.down", "mlp.c_proj"),
    ]


def transposed(canonical: str, foreign: str, op: Op | None = None) -> list[Rule]:
    """Rules of a linear module whose weight is stored `[in, out]`; `op` makes the canonical form of `[out, in]`."""
    then = (op,) if op else ()
    return [
        Rule(f"{canonical}.weight", (f"{foreign}.weight",), Chain((TRANSPOSE, *then))),
        Rule(f"{canonical}.bias", (f"{foreign}.bias",), Chain(then)),
    ]


def write_activation(words: Words) -> str | None:
    return next((name for name, computed in common.ACTIVATIONS.items() if computed == words["activation"]), None)


def write_plain(words: Words) -> bool:
    """Whether the scores of the first layer are multiplied by head_dim ** -0.5."""
    attention = words[MODEL].layers[0].attention
    return attention.scale is None or math.isclose(attention.scale, attention.key_dim**-0.5)


def write_by_layer(words: Words) -> bool:
    """Whether the scores of each layer are divided by its number, from 1."""
    layers = words[MODEL].layers
    first, last = (layer.attention.scale or layer.attention.key_dim**-0.5 for layer in (layers[0], layers[-1]))
    return len(layers) > 1 and math.isclose(first, last * len(layers))


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification"),
    read=read,
    outer_weights=(
        *common.outer_weights("transformer.wte", "transformer.ln_f"),
        *module("position_embedding", "transformer.wpe"),
    ),
    layer_prefix="transformer.h.{i}.",
    layer_weights=layer_weights,
    base_prefix="transformer.",
    ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),  # causal masks of old files
    plain=True,
    keys={
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_layers",
        "n_head": "num_attention_heads",
        "n_inner": "ffn_hidden_size",
        "activation_function": write_activation,
        "attn_pdrop": "attention_dropout",
        "embd_pdrop": "hidden_dropout",
        "resid_pdrop": "hidden_dropout",
        "initializer_range": "init_method_std",
        "layer_norm_epsilon": "norm_epsilon",
        "scale_attn_by_inverse_layer_idx": write_by_layer,
        "scale_attn_weights": write_plain,
        "tie_word_embeddings": "tied",
    },
)
