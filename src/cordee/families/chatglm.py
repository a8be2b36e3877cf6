"""ChatGLM 2 and 3, and GLM-4-9B in its own form.

Query groups, SwiGLU, biases of q, k and v, and rotary positions of half of each head, in neighbouring pairs of dims
(Du et al. 2022; GLM Team 2024). All q, all k and all v are one tensor, gate and up another."""

from cordee.families import common
from cordee.families.family import Family
from cordee.families.reader import ConfigReader
from cordee.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from cordee.tensors.rules import GATE_UP, Rule, module
from cordee.tensors.views import Chain, Split


def read(hf: ConfigReader) -> ModelConfig:
    hidden, heads, groups = (hf.integer(key) for key in ("hidden_size", "num_attention_heads", "multi_query_group_num"))
    hf.divides("multi_query_group_num", groups, "num_attention_heads", heads)
    head_dim = hf.integer("kv_channels")
    if head_dim % 4:
        hf.problem("kv_channels", "RoPE rotates half of them in pairs: 4 must divide them", "correct kv_channels")
    norm = NormConfig(kind="rms", eps=hf.number("layernorm_epsilon"))
    bias = hf.flag("add_bias_linear", False)
    attention = AttentionConfig(
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=head_dim,
        qkv_bias=hf.flag("add_qkv_bias", False) or bias,
        out_bias=bias,
        rope=RopeConfig(theta=10000.0 * hf.positive("rope_ratio", 1.0), rotary_dim=head_dim // 2),
    )
    ffn = hf.integer("ffn_hidden_size")
    layer = LayerConfig(
        attention=attention,
        mlp=MLPConfig(ffn_hidden_size=ffn, activation="silu", gated=True, bias=bias),
        norm=norm,
        residual_from_norm=hf.flag("apply_residual_connection_post_layernorm", False),
    )
    return ModelConfig(
        vocab_size=hf.integer(hf.alias("padded_vocab_size", "vocab_size")),
        hidden_size=hidden,
        max_position_embeddings=hf.integer("seq_length"),
        layers=(layer,) * hf.integer(hf.alias("num_layers", "num_hidden_layers")),
        final_norm=norm,
        tie_word_embeddings=hf.flag("tie_word_embeddings", False),
        attention_dropout=hf.probability("attention_dropout", 0.0),
        hidden_dropout=hf.probability("hidden_dropout", 0.0),
    )


def layer_weights(layer: LayerConfig) -> list[Rule]:
    attention = layer.attention
    assert isinstance(attention, AttentionConfig)
    q, kv = (count * attention.head_dim for count in (attention.num_heads, attention.num_kv_heads))
    qkv = Chain((Split(0, (q, kv, kv)), common.paired_qkv(layer)))
    return [
        *module("attention_norm", "input_layernorm"),
        *module("attention.qkv", "self_attention.query_key_value", op=qkv),
        *module("attention.out", "self_attention.dense"),
        *module("mlp_norm", "post_attention_layernorm"),
        *module("mlp.gate_up", "mlp.dense_h_to_4h", op=GATE_UP),
        *module("mlp.down", "mlp.dense_4h_to_h"),
    ]


FAMILY = Family(
    name="chatglm",
    architectures=("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    read=read,
    outer_weights=common.outer_weights(
        "transformer.embedding.word_embeddings", "transformer.encoder.final_layernorm", "transformer.output_layer"
    ),
    layer_prefix="transformer.encoder.layers.{i}.",
    layer_weights=layer_weights,
    base_prefix="transformer.",
    ignored=("transformer.rotary_pos_emb.inv_freq",),
    keys={
        "padded_vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "ffn_hidden_size": "ffn_hidden_size",
        "num_layers": "num_layers",
        "num_attention_heads": "num_attention_heads",
        "multi_query_group_num": "num_query_groups",
        "kv_channels": "kv_channels",
        "seq_length": "max_position_embeddings",
        "layernorm_epsilon": "norm_epsilon",
        "rope_ratio": lambda words: words["rotary_base"] / 10000.0,
        "attention_dropout": "attention_dropout",
        "hidden_dropout": "hidden_dropout",
        "tie_word_embeddings": "tied",
    },
)
