"""What most families share: the keys of LLaMA's `config.json` and the names of its tensors.

Owns small functions, each for one part of a model, which families compose. Knows no family."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, TypedDict, TypeVar

from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import (
    Activation,
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
)
from cordee.tensors.rules import GATE_UP, IDENTITY, Rule, module, rotary_halves, separate_qkv, stack
from cordee.tensors.views import Chain, Each, Op

T = TypeVar("T")

# What transformers calls the activations that there are, those first that are written.
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "relu": "relu",
}

FULL, SLIDING = "full_attention", "sliding_attention"  # types of layers

# Buffers of old checkpoints, computed from the configuration.
FREQUENCIES = ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq")


class Heads(TypedDict):
    """The fields of `AttentionConfig` that set its shapes."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


def read_heads(hf: ConfigReader, head_dim: int | None = None, groups: int | None = None) -> Heads:
    """Query heads, KV heads and head_dim. A missing key has the family's value, `groups` or `head_dim`; null, and a
    missing key where the family has None, gives as many KV heads as query heads, and hidden size / heads."""
    hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    num_groups = hf.nullable("num_key_value_heads", groups) or heads
    hf.divides("num_key_value_heads", num_groups, "num_attention_heads", heads)
    head_dim = hf.nullable("head_dim", head_dim)
    if head_dim is None:
        hf.divides("num_attention_heads", heads, "hidden_size", hidden)
    return Heads(num_heads=heads, num_kv_heads=num_groups, head_dim=head_dim or max(1, hidden // heads))


def read_plain_heads(hf: ConfigReader, grouped: bool = True) -> Heads:
    """As `read_heads` with head_dim = hidden size / heads and, unless `grouped`, as many KV heads as query heads."""
    hidden, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    hf.divides("num_attention_heads", heads, "hidden_size", hidden)
    groups = hf.integer("num_key_value_heads", heads) if grouped else heads
    hf.divides("num_key_value_heads", groups, "num_attention_heads", heads)
    return Heads(num_heads=heads, num_kv_heads=groups, head_dim=max(1, hidden // heads))


def read_attention(
    hf: ConfigReader, heads: Heads, bias: bool = False, rope: RopeConfig | None = None, **more: Any
) -> AttentionConfig:
    """Attention with rotary positions, and `bias` in all matrices; `more` are further fields, or replace these."""
    rope = rope or read_rope(hf, heads["head_dim"])
    return AttentionConfig(**heads, **{"qkv_bias": bias, "out_bias": bias, "rope": rope, **more})


def read_norm(hf: ConfigReader) -> NormConfig:
    """RMSNorm."""
    return NormConfig(kind="rms", eps=hf.number("rms_norm_eps"))


def read_swiglu(hf: ConfigReader, bias: bool = False, key: str = "intermediate_size") -> MLPConfig:
    """A gated MLP with SiLU; `key` is its FFN hidden size."""
    activation = hf.choice("hidden_act", names_of("silu"), "silu")
    return MLPConfig(ffn_hidden_size=hf.integer(key), activation=activation, gated=True, bias=bias)


def names_of(activation: Activation) -> dict[str, Activation]:
    """Those of `ACTIVATIONS` that compute this one."""
    return {name: computed for name, computed in ACTIVATIONS.items() if computed == activation}


def read_window(hf: ConfigReader, default: int | None = None) -> int | None:
    """Tokens of the sliding window: null is None, a missing key the family's `default`."""
    return hf.nullable("sliding_window", default)


def read_windows(
    hf: ConfigReader, window: int | None, sliding: Callable[[int], bool] = lambda layer: True
) -> list[int | None]:
    """The window of every layer: `window` where `layer_types` is sliding or, without that key, in `sliding` layers."""
    default = [SLIDING if window is not None and sliding(i) else FULL for i in range(hf.integer("num_hidden_layers"))]
    types = read_of_layers(hf, "layer_types", (FULL, SLIDING), default)
    if SLIDING in types and window is None:
        hf.problem("layer_types", "there are sliding layers but no window", "give sliding_window, or only full layers")
    return [window if kind == SLIDING else None for kind in types]


def read_of_layers(hf: ConfigReader, key: str, known: tuple[T, ...], default: list[T]) -> list[T]:
    """A list of one of the `known` values per layer; missing or empty gives the `default`."""
    values = hf.value(key, []) or default
    if isinstance(values, list) and len(values) == len(default) and all(value in known for value in values):
        return values
    hf.problem(key, f"not {' or '.join(map(str, known))} for each of {len(default)} layers", "correct it")
    return default


def read_layers(
    hf: ConfigReader,
    attention: AttentionConfig | LatentAttentionConfig,
    mlp: MLPConfig | MoEConfig | None = None,
    norm: NormConfig | None = None,
    **more: Any,
) -> list[LayerConfig]:
    """Layers that are alike, by default with SwiGLU and RMSNorm; `more` are further fields of `LayerConfig`."""
    layer = LayerConfig(attention=attention, mlp=mlp or read_swiglu(hf), norm=norm or read_norm(hf), **more)
    return [layer] * hf.integer("num_hidden_layers")


def windowed(layers: Iterable[LayerConfig], windows: Iterable[int | None]) -> list[LayerConfig]:
    """`layers` with the window of each."""
    pairs = zip(layers, windows, strict=True)
    return [replace(layer, attention=replace(layer.attention, window=window)) for layer, window in pairs]


def read_model(hf: ConfigReader, layers: list[LayerConfig], **more: Any) -> ModelConfig:
    """A model of `layers`, which ends in a norm like theirs; `more` are further fields of `ModelConfig`, or replace
    those of the usual keys."""
    dropout = hf.probability("hidden_dropout", 0.0)  # not a key of transformers, which ignores it
    values = {
        "vocab_size": hf.integer("vocab_size"),
        "hidden_size": hf.integer("hidden_size"),
        "layers": tuple(layers),
        "final_norm": layers[0].norm,
        "embedding_dropout": dropout,
        "attention_dropout": hf.probability("attention_dropout", 0.0),
        "hidden_dropout": dropout,
        "init_std": hf.number("initializer_range", 0.02),
    }
    if "tie_word_embeddings" not in more:
        values["tie_word_embeddings"] = hf.flag("tie_word_embeddings", False)
    if "max_position_embeddings" not in more:
        values["max_position_embeddings"] = hf.integer("max_position_embeddings")
    return ModelConfig(**{**values, **more})


def layer_weights(layer: LayerConfig, attention: list[Rule] | None = None, mlp: list[Rule] | None = None) -> list[Rule]:
    """Rules of a LLaMA layer, or of one with other rules of `attention` or `mlp`."""
    return [
        *module("attention_norm", "input_layernorm"),
        *(attention or attention_weights(layer)),
        *module("mlp_norm", "post_attention_layernorm"),
        *(mlp or mlp_weights()),
    ]


def qkv_op(layer: LayerConfig, layout: Callable[[int, int, int], Op]) -> Op:
    """The operation that fuses q, k and v of a layer from `layout`, such as `packed_qkv`."""
    attention = layer.attention
    assert isinstance(attention, AttentionConfig)
    return layout(attention.num_kv_heads, attention.q_per_group, attention.head_dim)


def paired_qkv(layer: LayerConfig) -> Op:
    """Separate q, k and v, of which RoPE rotates neighbouring dims (interleaved)."""
    attention = layer.attention
    assert isinstance(attention, AttentionConfig)
    rotary_dim = attention.rope.rotary_dim if attention.rope else None
    halves = rotary_halves(attention.head_dim, rotary_dim or attention.head_dim)
    return Chain((Each((halves, halves, IDENTITY)), qkv_op(layer, separate_qkv)))


def attention_weights(layer: LayerConfig, qkv: Op | None = None) -> list[Rule]:
    """Rules of attention with separate q, k and v, which `qkv` fuses, and norms of q and k where there are any."""
    qkv = qkv or qkv_op(layer, separate_qkv)
    return [
        *module("attention.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", op=qkv),
        *module("attention.q_norm", "self_attn.q_norm"),
        *module("attention.k_norm", "self_attn.k_norm"),
        *module("attention.out", "self_attn.o_proj"),
    ]


def mlp_weights(canonical: str = "mlp", foreign: str = "mlp") -> list[Rule]:
    """Rules of a gated MLP with separate gate and up."""
    return [
        *module(f"{canonical}.gate_up", f"{foreign}.gate_proj", f"{foreign}.up_proj", op=stack(2)),
        *module(f"{canonical}.down", f"{foreign}.down_proj"),
    ]


def packed_mlp_weights() -> list[Rule]:
    """Rules of a gated MLP with gate and up in one matrix."""
    return [*module("mlp.gate_up", "mlp.gate_up_proj", op=GATE_UP), *module("mlp.down", "mlp.down_proj")]


def outer_weights(embedding: str, norm: str, head: str = "lm_head") -> tuple[Rule, ...]:
    """Rules of what is outside of layers, by its names."""
    return (*module("embedding", embedding), *module("final_norm", norm), *module("head", head))
