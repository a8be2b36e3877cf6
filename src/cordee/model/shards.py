"""What of a model ranks may shard, as far as its configuration tells, whoever shards it.

Owns the table from logical axes to mesh axes, how a dim is cut, and the numbers that degrees have to divide. Knows no
torch, no option and no rank of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from cordee.model.config import AttentionConfig, MLPConfig, ModelConfig, MoEConfig

ALONG = {"vocab": "tp", "kv_group": "tp", "heads": "tp", "ffn": "tp", "expert": "ep"}


def part_of(length: int, rank: int, size: int) -> tuple[int, int]:
    """Begin and end of a rank's part of a dim, as DTensor divides it: equal parts, of which the last may be short."""
    step = -(-length // size)
    return min(rank * step, length), min((rank + 1) * step, length)


def attentions(model: ModelConfig) -> list[AttentionConfig]:
    """The different attentions with key and value heads of their own."""
    return list(dict.fromkeys(each.attention for each in model.layers if isinstance(each.attention, AttentionConfig)))


def num_heads(model: ModelConfig) -> list[int]:
    """The numbers of attention heads that layers have."""
    return sorted({layer.attention.num_heads for layer in model.layers})


def num_groups(model: ModelConfig) -> list[int]:
    """The numbers of heads that have keys and values of their own; all heads of latent attention."""
    return sorted({getattr(layer.attention, "num_kv_heads", layer.attention.num_heads) for layer in model.layers})


def mlp_widths(model: ModelConfig) -> list[int]:
    """The widths of all MLPs, experts and shared experts."""
    return sorted({mlp.ffn_hidden_size for mlp in _mlps(model)})


def num_experts(model: ModelConfig) -> list[int]:
    """The numbers of experts of the layers that have any."""
    return sorted({layer.mlp.router.num_experts for layer in model.layers if isinstance(layer.mlp, MoEConfig)})


def _mlps(model: ModelConfig) -> Iterator[MLPConfig]:
    for layer in model.layers:
        parts = [layer.mlp] if isinstance(layer.mlp, MLPConfig) else [layer.mlp.expert, layer.mlp.shared]
        yield from (mlp for mlp in parts if mlp is not None)
