"""What a model weighs and costs, from its `ModelConfig` alone.

Owns the canonical shapes, also of adapters, the number of parameters and the arithmetic of a token. Knows no torch:
presets of any size are counted at once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator

from cordee.model.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

FLOPS_FORMULA = "3 x (2 x matmul weights a token meets + 2 x layers x heads x (key + value dim) x sequence)"


# ---- shapes ----------------------------------------------------------------------------------------------------------


def canonical_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Global shape of every base parameter by its canonical name, in the order of the forward."""
    shapes: dict[str, Shape] = {"embedding.weight": (config.vocab_size, config.hidden_size)}
    if config.learned_positions:
        shapes["position_embedding.weight"] = (config.max_position_embeddings, config.hidden_size)
    if config.embedding_norm is not None:
        shapes |= dict(_norm("embedding_norm", config.embedding_norm, config.hidden_size))
    for i, layer in enumerate(config.layers):
        shapes |= {f"layers.{i}.{name}": shape for name, shape in _layer(layer, config.hidden_size)}
    shapes |= dict(_norm("final_norm", config.final_norm, config.hidden_size))
    if not config.tie_word_embeddings:
        shapes["head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def adapter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Global shape of every adapter parameter by its canonical name."""
    base = canonical_shapes(config)
    shapes: dict[str, Shape] = {}
    for path, name, low_rank in config.adapted():
        weight = base.get(f"{path}.weight", base["embedding.weight"])  # which a tied head shares
        for factor, shape in zip("ab", low_rank.shapes(weight, path, name), strict=True):
            shapes[f"{path}.adapters.{name}.{factor}"] = shape
    for i, layer in enumerate(config.layers if config.num_prefix_tokens else ()):
        shapes[f"layers.{i}.attention.prefix"] = _prefix(layer.attention, config.num_prefix_tokens)
    return shapes


def _prefix(attention: AttentionConfig | LatentAttentionConfig, tokens: int) -> Shape:
    if isinstance(attention, LatentAttentionConfig):
        return (tokens, attention.kv_lora_rank + attention.rope_head_dim)
    return (attention.num_kv_heads, 2, tokens, attention.head_dim)


def _layer(layer: LayerConfig, hidden: int) -> Named:
    sandwich = layer.norm_placement == "sandwich"
    yield from _norm("attention_norm", layer.norm, hidden)
    if isinstance(layer.attention, LatentAttentionConfig):
        yield from _latent_attention(layer.attention, hidden)
    else:
        yield from _attention(layer.attention, hidden)
    if sandwich:
        yield from _norm("attention_post_norm", layer.norm, hidden)
    yield from _norm("mlp_norm", layer.norm, hidden)
    if isinstance(layer.mlp, MoEConfig):
        yield from _moe(layer.mlp, hidden)
    else:
        yield from _mlp("mlp", layer.mlp, hidden)
    if sandwich:
        yield from _norm("mlp_post_norm", layer.norm, hidden)


def _attention(config: AttentionConfig, hidden: int) -> Named:
    qkv = (config.num_kv_heads, config.q_per_group + 2, config.head_dim)
    yield from _linear("attention.qkv", qkv, hidden, config.qkv_bias)
    if config.qk_norm is not None:
        per_head = config.qk_norm.over == "head"
        for name, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
            yield from _norm(f"attention.{name}", config.qk_norm.norm, config.head_dim * (1 if per_head else heads))
    if config.sinks:
        yield "attention.sinks", (config.num_heads,)
    yield from _linear("attention.out", (hidden,), config.num_heads * config.head_dim, config.out_bias)


def _latent_attention(config: LatentAttentionConfig, hidden: int) -> Named:
    heads, rank, latent = config.num_heads, config.q_lora_rank, config.kv_lora_rank
    query = (heads, config.nope_head_dim + config.rope_head_dim)
    if rank is None:
        yield from _linear("attention.q", query, hidden)
    else:
        yield from _linear("attention.q_down", (rank,), hidden, config.bias)
        yield from _norm("attention.q_norm", config.norm, rank)
        yield from _linear("attention.q_up", query, rank)
    yield from _linear("attention.kv_down", (latent + config.rope_head_dim,), hidden, config.bias)
    yield from _norm("attention.kv_norm", config.norm, latent)
    yield from _linear("attention.kv_up", (heads, config.nope_head_dim + config.v_head_dim), latent)
    yield from _linear("attention.out", (hidden,), heads * config.v_head_dim, config.bias)


def _mlp(name: str, config: MLPConfig, hidden: int, experts: Shape = ()) -> Named:
    ffn = config.ffn_hidden_size
    up, shape = ("gate_up", (*experts, 2, ffn)) if config.gated else ("up", (*experts, ffn))
    yield from _linear(f"{name}.{up}", shape, hidden, config.bias)
    yield from _linear(f"{name}.down", (*experts, hidden), ffn, config.bias)


def _moe(config: MoEConfig, hidden: int) -> Named:
    yield from _router(config.router, hidden)
    yield from _mlp("mlp.experts", config.expert, hidden, (config.router.num_experts,))
    if config.shared is not None:
        yield from _mlp("mlp.shared", config.shared, hidden)
    if config.shared_gate:
        yield from _linear("mlp.shared_gate", (1,), hidden)


def _router(config: RouterConfig, hidden: int) -> Named:
    yield from _linear("mlp.router", (config.num_experts,), hidden, config.bias)
    if config.correction_bias:
        yield "mlp.router.correction_bias", (config.num_experts,)


def _linear(name: str, out: Shape, inputs: int, bias: bool = False) -> Named:
    yield f"{name}.weight", (*out, inputs)
    if bias:
        yield f"{name}.bias", out


def _norm(name: str, norm: NormConfig, size: int) -> Named:
    if norm.affine:
        yield f"{name}.weight", (size,)
        if norm.kind == "layer":
            yield f"{name}.bias", (size,)


# ---- counts ----------------------------------------------------------------------------------------------------------


def count_parameters(config: ModelConfig, origins: Collection[str] = ("base", "adapter")) -> int:
    """Number of parameters of these origins; those of a tied head count once."""
    shapes = {"base": canonical_shapes, "adapter": adapter_shapes}
    return sum(math.prod(shape) for origin in origins for shape in shapes[origin](config).values())


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: the matrices of the layers, of experts those chosen, and the head."""
    layers = sum(_layer_matmuls(layer, config.hidden_size) for layer in config.layers)
    return layers + config.vocab_size * config.hidden_size


def _layer_matmuls(layer: LayerConfig, hidden: int) -> int:
    total = 0
    for name, shape in _layer(layer, hidden):
        if name.endswith(".weight") and "norm" not in name:
            size = math.prod(shape)
            if name.startswith("mlp.experts."):
                assert isinstance(layer.mlp, MoEConfig)
                size = size // layer.mlp.router.num_experts * layer.mlp.router.top_k
            total += size
    return total


def training_flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Floating point operations of one trained token in samples of `seq_length` tokens, forward and backward.

    A multiply-add counts two, the backward twice the forward, recomputation nothing, and attention scores are counted
    for all pairs of positions, as in Megatron-LM (Narayanan et al. 2021, appendix) and PaLM (Chowdhery et al. 2022).
    """
    layers = sum(layer_flops(layer, config.hidden_size, seq_length) for layer in config.layers)
    return 3 * (layers + head_flops(config))


def layer_flops(layer: LayerConfig, hidden: int, seq_length: int) -> int:
    """Of one token in the forward of one layer; `training_flops_per_token` says what counts."""
    return 2 * (_layer_matmuls(layer, hidden) + _score_channels(layer) * seq_length)


def head_flops(config: ModelConfig) -> int:
    """Of one token in the forward of the head."""
    return 2 * config.vocab_size * config.hidden_size


def _score_channels(layer: LayerConfig) -> int:
    """Channels of keys and values, over all query heads."""
    attention = layer.attention
    if isinstance(attention, LatentAttentionConfig):
        return attention.num_heads * (attention.nope_head_dim + attention.rope_head_dim + attention.v_head_dim)
    return attention.num_heads * 2 * attention.head_dim
