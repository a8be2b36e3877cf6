"""What of a model ranks may shard, as far as its configuration tells, whoever shards it.

Owns the table from logical axes to mesh axes, how a dim is cut, the numbers that degrees have to divide, and the laws
that a run and a checkpoint of Megatron share. Knows no torch, no option and no rank of its own."""

from collections.abc import Iterator, Sequence

from cordee.errors import Problem, Problems, divides
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


# `option` is the one that asks for it, `involves` are others that may solve a problem.


def expert_problems(option: str, size: int, model: ModelConfig, *involves: str) -> Problems:
    """`size` ranks must divide the experts of every MoE layer."""
    experts = num_experts(model)
    if size > 1 and not experts:
        yield Problem(option, size, "the model has no experts", "leave it out", "requires", involves)
    for number in experts:
        yield from divides(option, size, number, "experts", *involves)


def layer_list_problems(option: str, counts: Sequence[int], stages: int, num_layers: int, *involves: str) -> Problems:
    """A list of layers must have a number for each of `stages` and sum to `num_layers`."""
    text = ",".join(map(str, counts))
    if len(counts) != stages:
        why = f"the list has {len(counts)} numbers, there are {stages} stages"
        yield Problem(option, text, why, "give one number for each stage", "length", involves, stages)
    if sum(counts) != num_layers:
        why = f"the list sums to {sum(counts)}, the model has {num_layers} layers"
        yield Problem(option, text, why, f"let the numbers sum to {num_layers}", "sum", involves, num_layers)


def virtual_stage_problems(option: str, size: int, num_ranks: int, num_layers: int, *involves: str) -> Problems:
    """Virtual stages of `size` layers must fill `num_ranks` pipeline ranks evenly."""
    if num_layers % (num_ranks * size):
        why = f"{num_layers} layers are not divisible by {num_ranks} ranks x {size}"
        yield Problem(option, size, why, f"let {num_ranks} x it divide {num_layers}", "divides", involves, num_layers)
