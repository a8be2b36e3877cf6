"""Size and cost of a model, from its `ModelConfig` alone.

Owns the number of parameters and the arithmetic of a token. Knows no torch: presets of any size are counted at once."""

import math
from collections.abc import Collection

from cordee.model.config import LatentAttentionConfig, LayerConfig, ModelConfig, MoEConfig
from cordee.model.specs import Origin, layer_specs, model_specs

Shape = tuple[int, ...]
OWN: tuple[Origin, ...] = ("base", "tuned", "adapter")

FLOPS_FORMULA = "3 x (2 x matmul weights a token meets + 2 x layers x heads x (key + value dim) x sequence)"


def shapes_of(config: ModelConfig, *origins: Origin) -> dict[str, Shape]:
    """Global shape of every parameter of these origins by its canonical name, in the order of the forward."""
    return {name: spec.shape for name, spec in model_specs(config).items() if spec.origin in origins}


def canonical_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Those of the model without adapters."""
    return shapes_of(config, "base", "tuned", "head")


def count_parameters(config: ModelConfig, origins: Collection[Origin] = OWN, *, trained: bool = False) -> int:
    """Number of parameters of these origins, or of their `trained` ones; those of a tied head count once."""
    found = (spec for spec in model_specs(config).values() if spec.origin in origins and spec.trained >= trained)
    return sum(math.prod(spec.shape) for spec in found)


def matmul_parameters(config: ModelConfig) -> int:
    """Weights that a token is multiplied with: the matrices of the layers, of experts those chosen, and heads."""
    return sum(_layer_matmuls(layer, config) for layer in config.layers) + head_flops(config) // 2


def _layer_matmuls(layer: LayerConfig, model: ModelConfig) -> int:
    total = 0
    for name, spec in layer_specs(layer, model).items():
        if name.endswith(".weight") and "norm" not in name:
            size = math.prod(spec.shape)
            if "expert" in spec.axes:
                assert isinstance(layer.mlp, MoEConfig)
                size = size // layer.mlp.router.num_experts * layer.mlp.router.top_k
            total += size
    return total


def training_flops_per_token(config: ModelConfig, seq_length: int) -> int:
    """Floating point operations of one trained token in samples of `seq_length` tokens, forward and backward.

    A multiply-add counts two, the backward twice the forward, recomputation nothing, and attention scores are counted
    for all pairs of positions, as in Megatron-LM (Narayanan et al. 2021, appendix) and PaLM (Chowdhery et al. 2022)."""
    return 3 * (sum(layer_flops(layer, config, seq_length) for layer in config.layers) + head_flops(config))


def layer_flops(layer: LayerConfig, model: ModelConfig, seq_length: int) -> int:
    """Of one token in the forward of one layer; `training_flops_per_token` says what counts."""
    return 2 * (_layer_matmuls(layer, model) + _score_channels(layer) * seq_length)


def head_flops(config: ModelConfig) -> int:
    """Of one token in the forward of the head."""
    return 2 * (config.lm_head * config.vocab_size + config.score) * config.hidden_size


def _score_channels(layer: LayerConfig) -> int:
    """Channels of keys and values, over all query heads."""
    attention = layer.attention
    if isinstance(attention, LatentAttentionConfig):
        return attention.num_heads * (attention.nope_head_dim + attention.rope_head_dim + attention.v_head_dim)
    return attention.num_heads * 2 * attention.head_dim
