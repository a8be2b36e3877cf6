"""GPT-2, and GPT-3 as far as dense attention goes.

Layer norm before each half of a layer, learned positions, GELU, biases everywhere, tied head (Radford et al. 2019;
Brown et al. 2020). Linear weights are stored `[in, out]`, the layout of the original's convolutions of width one.
"""

from __future__ import annotations

from cordee.families.family import Family, HFConfig, Preset
from cordee.families.options import Shape
from cordee.families.reader import ConfigReader
from cordee.families.rules import TRANSPOSE, Chain, Op, Rule, each_layer, module, packed_qkv
from cordee.model.config import Activation, AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig

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


def weights(config: ModelConfig) -> list[Rule]:
    return [
        *module("embedding", "transformer.wte"),
        *module("position_embedding", "transformer.wpe"),
        *each_layer(config, layer_weights, "transformer.h.{i}."),
        *module("final_norm", "transformer.ln_f"),
        *module("head", "lm_head"),
    ]


def layer_weights(layer: LayerConfig) -> list[Rule]:
    attention = layer.attention
    assert isinstance(attention, AttentionConfig)
    qkv = packed_qkv(attention.num_kv_heads, attention.q_per_group, attention.head_dim)
    return [
        *module("attention_norm", "ln_1"),
        *transposed("attention.qkv", "attn.c_attn", qkv),
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


def from_shape(shape: Shape) -> HFConfig | None:
    if (shape.position_embedding_type, shape.normalization, shape.gated) != ("learned_absolute", "LayerNorm", False):
        return None
    if not (shape.qkv_bias and shape.dense_bias and shape.mlp_bias):
        return None
    heads = shape.num_attention_heads
    if shape.num_query_groups != heads or shape.kv_channels * heads != shape.hidden_size:
        return None
    return {
        "activation_function": "gelu_new" if shape.activation == "gelu_tanh" else shape.activation,
        "attn_pdrop": shape.attention_dropout,
        "embd_pdrop": shape.hidden_dropout,
        "initializer_range": shape.init_method_std,
        "layer_norm_epsilon": shape.norm_epsilon,
        "n_embd": shape.hidden_size,
        "n_head": heads,
        "n_inner": shape.ffn_hidden_size,
        "n_layer": shape.num_layers,
        "n_positions": shape.max_position_embeddings,
        "resid_pdrop": shape.hidden_dropout,
        "tie_word_embeddings": shape.tied,
        "vocab_size": shape.vocab_size,
    }


def _preset(licence: str, layers: int, hidden: int, heads: int, **more: object) -> Preset:
    config = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
    }
    return Preset(config={**config, **more}, licence=licence)


_GPT3 = {"n_positions": 2048, "activation_function": "gelu", "initializer_range": 0.006}

PRESETS = {
    "gpt2": _preset("MIT", 12, 768, 12),
    "gpt2-medium": _preset("MIT", 24, 1024, 16),
    "gpt2-large": _preset("MIT", 36, 1280, 20),
    "gpt2-xl": _preset("MIT", 48, 1600, 25),
    "gpt3-15b": _preset("no weights published", 8, 12288, 96, **_GPT3),
    "gpt3-175b": _preset("no weights published", 96, 12288, 96, **_GPT3),
}

FAMILY = Family(
    name="gpt2",
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    model_types=("gpt2",),
    read=read,
    weights=weights,
    base_prefix="transformer.",
    ignored=("transformer.h.{i}.attn.bias", "transformer.h.{i}.attn.masked_bias"),  # causal masks of old files
    from_shape=from_shape,
    fits="learned positions, LayerNorm, no --swiglu, biases everywhere, no query groups",
    presets=PRESETS,
)
