"""BLOOM.

Layer norm before each half of a layer and after the embedding, scores that fall with distance instead of positions,
the tanh form of GELU, biases everywhere, tied head (BigScience 2022; Press et al. 2022). q, k and v of each head are
stored together.
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import KEYS, Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rules import Rule, each_layer, grouped_qkv, module
from cordee.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig


def read(hf: ConfigReader) -> ModelConfig:
    hidden_key, heads_key = hf.alias("n_embed", "hidden_size"), hf.alias("num_attention_heads", "n_head")
    hidden, heads = hf.integer(hidden_key), hf.integer(heads_key)
    hf.divides(heads_key, heads, hidden_key, hidden)
    norm = NormConfig(kind="layer", eps=hf.number("layer_norm_epsilon", 1e-5))
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=max(1, hidden // heads),
        qkv_bias=True,
        out_bias=True,
        alibi=True,
    )
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


def weights(config: ModelConfig) -> list[Rule]:
    return [
        *module("embedding", "transformer.word_embeddings"),
        *module("embedding_norm", "transformer.word_embeddings_layernorm"),
        *each_layer(config, layer_weights, "transformer.h.{i}."),
        *module("final_norm", "transformer.ln_f"),
        *module("head", "lm_head"),
    ]


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "input_layernorm"),
        *module("attention.qkv", "self_attention.query_key_value", op=common.qkv_op(layer, grouped_qkv)),
        *module("attention.out", "self_attention.dense"),
        *module("mlp_norm", "post_attention_layernorm"),
        *module("mlp.up", "mlp.dense_h_to_4h"),
        *module("mlp.down", "mlp.dense_4h_to_h"),
    ]


def _preset(layers: int, hidden: int, heads: int, **more: object) -> Preset:
    config = {
        "vocab_size": 250880,
        "n_embed": hidden,
        "n_layer": layers,
        "num_attention_heads": heads,
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "unk_token_id": 0,
        "torch_dtype": "float16",
    }
    return Preset(config={**config, **more}, licence="BigScience RAIL 1.0")


FAMILY = Family(
    name="bloom",
    architectures=("BloomForCausalLM", "BloomModel"),
    model_types=("bloom",),
    read=read,
    weights=weights,
    base_prefix="transformer.",
    keys={
        **{name: KEYS[name] for name in ("attention_dropout", "init_method_std", "num_attention_heads", "tied")},
        "hidden_dropout": "hidden_dropout",
        "hidden_size": "n_embed",
        "max_position_embeddings": "seq_length",
        "norm_epsilon": "layer_norm_epsilon",
        "num_layers": "n_layer",
        "vocab_size": "vocab_size",
    },
    presets={
        "bloom-560m": _preset(24, 1024, 16),
        "bloom-1b1": _preset(24, 1536, 16),
        "bloom-1b7": _preset(24, 2048, 16),
        "bloom-3b": _preset(30, 2560, 32),
        "bloom-7b1": _preset(30, 4096, 32),
        "bloom-176b": _preset(70, 14336, 112, torch_dtype="bfloat16"),
    },
)
