"""Qwen, the first generation (Bai et al. 2023).

LLaMA's form with biases on q, k and v, which are one matrix. In evaluation, texts longer than those trained on get a
larger rotary base and sharper scores.
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rules import Rule, each_layer, module, packed_qkv, stack
from cordee.model.config import (
    AttentionConfig,
    LayerConfig,
    LogNScaling,
    MLPConfig,
    ModelConfig,
    NormConfig,
    QwenNTKScaling,
    RopeConfig,
)


def read(hf: ConfigReader) -> ModelConfig:
    bias = not hf.flag("no_bias", True)  # of all matrices but q, k and v
    norm = NormConfig(kind="rms", eps=hf.number("layer_norm_epsilon"))
    ffn = hf.integer("intermediate_size")
    hf.divides("intermediate_size", 2, "intermediate_size", ffn)
    layer = LayerConfig(
        attention=read_attention(hf, bias),
        mlp=MLPConfig(ffn_hidden_size=max(1, ffn // 2), activation="silu", gated=True, bias=bias),
        norm=norm,
    )
    return common.read_model(
        hf,
        [layer] * hf.integer("num_hidden_layers"),
        norm,
        embedding_dropout=hf.number("emb_dropout_prob", 0.0),
        attention_dropout=hf.probability("attn_dropout_prob", 0.0),
    )


def read_attention(hf: ConfigReader, bias: bool) -> AttentionConfig:
    hidden, heads, length = hf.integer("hidden_size"), hf.integer("num_attention_heads"), hf.integer("seq_length")
    hf.divides("num_attention_heads", heads, "hidden_size", hidden)
    head_dim = hf.integer("kv_channels", max(1, hidden // heads))
    if head_dim * heads != hidden:
        hf.problem("kv_channels", f"{heads} heads of {head_dim} channels are not {hidden}", "correct kv_channels")
    ntk = QwenNTKScaling(original_max_position_embeddings=length)
    rotary_dim = int(head_dim * hf.positive("rotary_pct", 1.0))
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        qkv_bias=True,
        out_bias=bias,
        rope=RopeConfig(
            theta=float(hf.positive(hf.alias("rotary_emb_base", "rope_theta"), 10000.0)),
            rotary_dim=None if rotary_dim == head_dim else rotary_dim,
            scaling=ntk if hf.flag("use_dynamic_ntk", True) else None,
        ),
        query_scaling=LogNScaling(length=length) if hf.flag("use_logn_attn", True) else None,
    )


def weights(config: ModelConfig) -> list[Rule]:
    return [
        *module("embedding", "transformer.wte"),
        *each_layer(config, layer_weights, "transformer.h.{i}."),
        *module("final_norm", "transformer.ln_f"),
        *module("head", "lm_head"),
    ]


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "ln_1"),
        *module("attention.qkv", "attn.c_attn", op=common.qkv_op(layer, packed_qkv)),
        *module("attention.out", "attn.c_proj"),
        *module("mlp_norm", "ln_2"),
        *module("mlp.gate_up", "mlp.w2", "mlp.w1", op=stack(2)),  # the gate is the second
        *module("mlp.down", "mlp.c_proj"),
    ]


def _preset(layers: int, hidden: int, ffn: int, heads: int, vocab: int, **more: object) -> Preset:
    config = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": 2 * ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "kv_channels": 128,
        "seq_length": 2048,
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-6,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "no_bias": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence="Tongyi Qianwen License")


_LONG = {"seq_length": 8192, "max_position_embeddings": 32768, "rotary_emb_base": 1000000}

FAMILY = Family(
    name="qwen",
    architectures=("QWenLMHeadModel", "QWenModel"),
    model_types=("qwen",),
    read=read,
    weights=weights,
    base_prefix="transformer.",
    ignored=("transformer.rotary_emb.inv_freq", "transformer.h.{i}.attn.rotary_emb.inv_freq"),
    keys={
        **common.MULTI_HEAD_KEYS,
        "attention_dropout": "attn_dropout_prob",
        "ffn_hidden_size": lambda ffn: {"intermediate_size": 2 * ffn},
        "kv_channels": "kv_channels",
        "norm_epsilon": "layer_norm_epsilon",
        "rotary_base": "rotary_emb_base",
    },
    presets={
        "qwen-7b": _preset(32, 4096, 11008, 32, 151936, use_logn_attn=False),
        "qwen-14b": _preset(40, 5120, 13696, 40, 152064),
        "qwen-72b": _preset(80, 8192, 24576, 64, 152064, **_LONG, use_dynamic_ntk=False, use_logn_attn=False),
    },
)
