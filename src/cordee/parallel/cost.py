"""Memory of parameters, gradients and optimizer state, worked out without torch.

Owns the arithmetic of the ZeRO stages, as `data.py` has them. Knows no activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from cordee.parallel.degrees import Degrees
from cordee.parallel.options import LayoutOptions

_MASTER = 4  # bytes of a float32, in which parameters, their gradients and optimizer state are kept


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters that one rank computes with, its shards of tensor- and expert-parallel ones: in all, those of sharded
    `experts`, those `outside` of layers (embeddings, head, last norm), and those `frozen`.
    """

    parameters: int
    experts: int = 0
    outside: int = 0
    frozen: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Bytes per parameter that a rank computes with, at the height of a step."""

    weights: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer

    def __str__(self) -> str:
        parts = f"weights {self.weights:.4g}, gradients {self.gradients:.4g}, optimizer {self.optimizer:.4g}"
        return f"parameters and optimizer take {self.total:.4g} bytes per parameter on this rank ({parts})"


def cost(
    config: LayoutOptions, degrees: Degrees, count: ParameterCount, *, wrapped: bool, accumulates: bool
) -> MemoryCost:
    """What a rank needs for its `count` of a model's parameters.

    wrapped: whether FSDP2 keeps the model, as `data.needs_sharding` says. accumulates: a step has several
    micro-batches. Weights are those at rest and the copy that is computed with; of stage 3, which gathers layers one
    by one, only the copy of what is outside of layers is counted. Gradients are whole while they are summed over
    micro-batches at stages below 2, else at most one layer's are whole at a time, which is not counted.
    """
    kept, trained = _MASTER * _shard(degrees, count), 1 - count.frozen / count.parameters
    state = kept * _slots(config) * trained
    if not wrapped:
        return MemoryCost(weights=_MASTER, gradients=_MASTER * trained, optimizer=_MASTER * _slots(config) * trained)
    compute = 2 if config.bf16 or config.fp16 else 4
    gathered = compute * (count.outside / count.parameters if config.zero_stage == 3 else 1.0)
    whole = 0
    if accumulates and config.zero_stage < 2:
        whole = _MASTER if config.accumulate_allreduce_grads_in_fp32 else compute
    return MemoryCost(weights=kept + gathered, gradients=max(kept, whole) * trained, optimizer=state)


def _shard(degrees: Degrees, count: ParameterCount) -> float:
    """The fraction of its parameters that a rank keeps between steps."""
    experts = count.experts / count.parameters
    return (1 - experts) / degrees.storage[1] + experts / degrees.expert_storage[1]


def _slots(config: LayoutOptions) -> int:
    """Numbers that the optimizer keeps for a parameter."""
    if config.optimizer == "sgd":
        return 1 if config.sgd_momentum else 0
    return 2
