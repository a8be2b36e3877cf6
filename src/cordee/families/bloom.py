"""BLOOM.

Layer norm before each half of a layer and after the embedding, scores that fall with distance instead of positions,
the tanh form of GELU, biases everywhere, tied head (BigScience 2022; Press et al. 2022). q, k and v of each head are
stored together."""

from cordee.families import common
from cordee.families.family import Family
from cordee.families.reader import ConfigReader
from cordee.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig
from cordee.tensors.rules import Rule, grouped_qkv, module


def read(hf: ConfigReader) -> ModelConfig:
    hidden_key, heads_key = hf.alias("n_embed", "hidden_size"), hf.alias("num_attention_heads", "n_head")
    hidden, heads = hf.integer(hidden_key), hf.integer(heads_key)
    hf.divides(heads_key, heads, hidden_key, hidden)
    norm = NormConfig(kind="layer", eps=hf.number("layer_norm_epsilon", 1e-5))
    form = {"num_heads": heads, "num_kv_heads": heads, "head_dim": max(1, hidden // heads)}
    attention = AttentionConfig(**form, qkv_bias=True, out_bias=True, alibi=True)
    ffn = 4 * hidden
    if hf.integer("n_inner", ffn) != ffn:
        hf.problem("n_inner", f"it is always four times {hidden_key}", f"take {ffn}, or leave it out")
    layer = LayerConfig(
        attention=attention,
        mlp=MLPConfig(ffn_hidden_size=ffn, activation="gelu_tanh", gated=False, bias=True),
        norm=norm,
        residual_from_norm=hf.flag("apply_residual_connection_post_layernorm", False),
    )
    return ModelConfig(
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden,
        max_position_embeddings=hf.integer("seq_length", 2048),
        layers=(layer,) * hf.integer(hf.alias("n_layer", "num_hidden_layers")),
        final_norm=norm,
        embedding_norm=norm,
        tie_word_embeddings=hf.flag("tie_word_embeddings", True),
        attention_dropout=hf.probability("attention_dropout", 0.0),
        hidden_dropout=hf.probability("hidden_dropout", 0.0),
        init_std=hf.number("initializer_range", 0.02),
    )


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "input_layernorm"),
        *module("attention.qkv", "self_attention.query_key_value", op=common.qkv_op(layer, grouped_qkv)),
        *module("attention.out", "self_attention.dense"),
        *module("mlp_norm", "post_attention_layernorm"),
        *module("mlp.up", "mlp.dense_h_to_4h"),
        *module("mlp.down", "mlp.dense_4h_to_h"),
    ]


FAMILY = Family(
    name="bloom",
    architectures=("BloomForCausalLM", "BloomModel", "BloomForSequenceClassification"),
    read=read,
    outer_weights=(
        *common.outer_weights("transformer.word_embeddings", "transformer.ln_f"),
        *module("embedding_norm", "transformer.word_embeddings_layernorm"),
    ),
    layer_prefix="transformer.h.{i}.",
    layer_weights=layer_weights,
    base_prefix="transformer.",
    keys={
        "vocab_size": "vocab_size",
        "n_embed": "hidden_size",
        "n_layer": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "seq_length": "max_position_embeddings",
        "layer_norm_epsilon": "norm_epsilon",
        "apply_residual_connection_post_layernorm": "apply_residual_connection_post_layernorm",
        "attention_dropout": "attention_dropout",
        "hidden_dropout": "hidden_dropout",
        "initializer_range": "init_method_std",
        "tie_word_embeddings": "tied",
    },
)
