"""Qwen, the first generation (Bai et al. 2023).

LLaMA's form with biases on q, k and v, which are one matrix. In evaluation, texts longer than those trained on get a
larger rotary base and sharper scores."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.lenses import MODEL, at, scaling_of
from cordee.families.reader import ConfigReader
from cordee.model import config
from cordee.tensors.rules import Rule, module, packed_qkv, stack


def read(hf: ConfigReader) -> config.ModelConfig:
    bias = not hf.flag("no_bias", True)  # of all matrices but q, k and v
    norm = config.NormConfig(kind="rms", eps=hf.number("layer_norm_epsilon"))
    ffn = hf.integer("intermediate_size")
    hf.divides("intermediate_size", 2, "intermediate_size", ffn)
    mlp = config.MLPConfig(ffn_hidden_size=max(1, ffn // 2), activation="silu", gated=True, bias=bias)
    return common.read_model(
        hf,
        common.read_layers(hf, read_attention(hf, bias), mlp=mlp, norm=norm),
        embedding_dropout=hf.number("emb_dropout_prob", 0.0),
        attention_dropout=hf.probability("attn_dropout_prob", 0.0),
    )


def read_attention(hf: ConfigReader, bias: bool) -> config.AttentionConfig:
    hidden, heads, length = hf.integer("hidden_size"), hf.integer("num_attention_heads"), hf.integer("seq_length")
    hf.divides("num_attention_heads", heads, "hidden_size", hidden)
    head_dim = hf.integer("kv_channels", max(1, hidden // heads))
    if head_dim * heads != hidden:
        hf.problem("kv_channels", f"{heads} heads of {head_dim} channels are not {hidden}", "correct kv_channels")
    ntk = config.QwenNTKScaling(original_max_position_embeddings=length)
    rotary_dim = int(head_dim * hf.positive("rotary_pct", 1.0))
    return config.AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        qkv_bias=True,
        out_bias=bias,
        rope=config.RopeConfig(
            theta=float(hf.positive(hf.alias("rotary_emb_base", "rope_theta"), 10000.0)),
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            scaling=ntk if hf.flag("use_dynamic_ntk", True) else None,
        ),
        query_scaling=config.LogNScaling(length=length) if hf.flag("use_logn_attn", True) else None,
    )


def layer_weights(layer: config.LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "ln_1"),
        *module("attention.qkv", "attn.c_attn", op=common.qkv_op(layer, packed_qkv)),
        *module("attention.out", "attn.c_proj"),
        *module("mlp_norm", "ln_2"),
        *module("mlp.gate_up", "mlp.w2", "mlp.w1", op=stack(2)),  # the gate is the second
        *module("mlp.down", "mlp.c_proj"),
    ]


FAMILY = Family(
    name="qwen",
    architectures=("QWenLMHeadModel", "QWenModel"),
    read=read,
    outer_weights=common.outer_weights("transformer.wte", "transformer.ln_f"),
    layer_prefix="transformer.h.{i}.",
    layer_weights=layer_weights,
    base_prefix="transformer.",
    ignored=("transformer.rotary_emb.inv_freq", "transformer.h.{i}.attn.rotary_emb.inv_freq"),
    keys=keys(
        "attention_dropout head_dim num_key_value_heads rms_norm_eps rope_scaling rope_theta",
        attn_dropout_prob="attention_dropout",
        intermediate_size=lambda words: 2 * words["ffn_hidden_size"],
        kv_channels="kv_channels",
        layer_norm_epsilon="norm_epsilon",
        rotary_emb_base="rotary_base",
        use_dynamic_ntk=lambda words: isinstance(scaling_of(words), config.QwenNTKScaling),
        use_logn_attn=lambda words: isinstance(
            at("layers.attention.query_scaling").get(words[MODEL]), config.LogNScaling
        ),
    ),
)
