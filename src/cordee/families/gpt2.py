"""GPT-2, and GPT-3 as far as dense attention goes.

Layer norm before each half of a layer, learned positions, GELU, biases everywhere, tied head (Radford et al. 2019;
Brown et al. 2020). Linear weights are stored `[in, out]`, the layout of the original's convolutions of width one.
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family
from cordee.families.lenses import Words
from cordee.families.reader import ConfigReader
from cordee.model.config import Activation, AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig
from cordee.tensors.rules import TRANSPOSE, Rule, module, packed_qkv
from cordee.tensors.views import Chain, Op

ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def read(hf: ConfigReader) -> ModelConfig:
    hidden, heads = hf.integer("n_embd"), hf.integer("n_head")
    hf.divides("n_head", heads, "n_embd", hidden)
    norm = NormConfig(kind="layer", eps=hf.number("layer_norm_epsilon"))
    attention = AttentionConfig(
        num_heads=heads, num_kv_heads=heads, head_dim=max(1, hidden // heads), qkv_bias=True, out_bias=True
    )
    mlp = MLPConfig(
        ffn_hidden_size=hf.integer("n_inner", 4 * hidden),
        activation=hf.choice("activation_function", ACTIVATIONS, "gelu_new"),
        gated=False,
        bias=True,
    )
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=hf.integer("n_positions"),
        layers=(LayerConfig(attention=attention, mlp=mlp, norm=norm),) * hf.integer("n_layer"),
        final_norm=norm,
        learned_positions=True,
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
        embedding_dropout=hf.probability("embd_pdrop", 0.1),
        attention_dropout=hf.probability("attn_pdrop", 0.1),
        hidden_dropout=hf.probability("resid_pdrop", 0.1),
        init_std=hf.number("initializer_range", 0.02),
    )


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
    return {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}.get(words["activation"])


FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    model_types=("gpt2",),
    read=read,
    outer_weights=(
        *module("embedding", "transformer.wte"),
        *module("position_embedding", "transformer.wpe"),
        *module("final_norm", "transformer.ln_f"),
        *module("head", "lm_head"),
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
        "tie_word_embeddings": "tied",
    },
)
