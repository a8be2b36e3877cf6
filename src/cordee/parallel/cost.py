"""Memory of parameters, gradients and optimizer state, worked out without torch.

Owns the arithmetic of the ZeRO stages, as `data.py` has them, and which parameters a rank computes with, as
`sharding.py` has them. Knows no activations."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import get_args

from cordee.log import in_bytes
from cordee.model.config import ModelConfig
from cordee.model.shards import ALONG, part_of
from cordee.model.span import Span
from cordee.model.specs import Origin, ParameterSpec, model_specs
from cordee.optim.options import PrecisionOptions
from cordee.parallel.degrees import Degrees
from cordee.parallel.options import LayoutOptions

_MASTER = 4  # bytes of a float32, in which parameters, their gradients and optimizer state are kept
_CODES: dict[str | None, float] = {"nf4": 4.127 / 8, "int8": 1.0}  # bytes of a weight, by --quantise-base


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Parameters that one rank computes with, its shards of tensor- and expert-parallel ones: in all, those of sharded
    `experts`, those `outside` of layers (embeddings, head, last norm), those `frozen`, and of these `gemms`."""

    parameters: int
    experts: int = 0
    outside: int = 0
    frozen: int = 0
    gemms: int = 0


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Bytes for each of the `parameters` that a rank computes with, at the height of a step."""

    parameters: int
    weights: float
    gradients: float
    optimizer: float

    @property
    def each(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> float:
        return self.each * self.parameters

    def describe(self, rank: str) -> str:
        """For people: what `rank`, in words, needs by category."""
        rows = (
            ("weights", self.weights, "at rest, and any copy that computes"),
            ("gradients", self.gradients, ""),
            ("optimizer", self.optimizer, "its state, such as Adam's two moments"),
        )
        whole = f"memory of {rank}: {in_bytes(self.total)} and its activations"
        each = f"  {self.each:.4g} bytes for each of the {(n := self.parameters):,} parameters it computes with:"
        parts = (f"  {name:<9} {size:>6.4g}  {in_bytes(size * n):>9}  {what}" for name, size, what in rows)
        return "\n".join(line.rstrip() for line in (whole, each, *parts))


def cost(config: LayoutOptions, degrees: Degrees, count: ParameterCount, kind: str | None = None) -> MemoryCost:
    """What a rank needs for its `count` of a model's parameters, `kind` that in which frozen GEMMs are quantised.

    Weights are those at rest and the copy that is computed with; of stage 3, which gathers layers one by one, only the
    copy of what is outside of layers is counted. Gradients are whole while they are summed over micro-batches at stages
    below 2, else at most one layer's are whole at a time, which is not counted."""
    experts, trained = count.experts / count.parameters, 1 - count.frozen / count.parameters
    kept = _MASTER * ((1 - experts) / degrees.storage[1] + experts / degrees.expert_storage[1])  # between steps
    slots = 2 if config.optimizer != "sgd" else 1 if config.sgd_momentum else 0  # numbers of the optimizer a parameter
    compute, whole = 2 if config.bf16 or config.fp16 else 4, 0
    copied = count.outside / count.parameters if config.zero_stage == 3 else 1.0
    accumulates = (config.global_batch_size or 0) > config.micro_batch_size * degrees.data
    if accumulates and config.zero_stage < 2:
        whole = _MASTER if config.accumulate_allreduce_grads_in_fp32 else compute
    weights = kept + (compute * copied if needs_sharding(config, degrees.world_size) else 0)
    return MemoryCost(
        parameters=count.parameters,
        weights=weights + (_CODES.get(kind, weights) - weights) * count.gemms / count.parameters,
        gradients=max(kept, whole) * trained,
        optimizer=kept * slots * trained,
    )


def count(
    model: ModelConfig, degrees: Degrees, spans: Sequence[Span] = (), trained: Collection[Origin] = get_args(Origin)
) -> ParameterCount:
    """The parameters of the rank that has the largest shards of `spans` (empty: the whole model), of which those of
    other origins than `trained` are frozen."""
    spans = spans or (Span(0, model.num_layers),)
    layers = {layer for span in spans for layer in span.layers}
    ends = {"embedding": any(span.embedding for span in spans), "head": any(span.head for span in spans)}
    total = experts = outside = frozen = gemms = 0
    names = model.gemms()
    for name, spec in model_specs(model).items():
        part, _, rest = name.partition(".")
        in_layer = part == "layers"
        at = "head" if part in ("final_norm", "head", "score") else "embedding"
        tied = part == "embedding" and model.tied_head and ends["head"]
        if not (int(rest.partition(".")[0]) in layers if in_layer else ends[at] or tied):
            continue
        size = _shard_size(spec, degrees)
        total += size
        experts += size if degrees.ep > 1 and "expert" in spec.axes else 0
        outside += 0 if in_layer else size
        still = 0 if spec.trained and spec.origin in trained else size
        frozen, gemms = frozen + still, gemms + still * (name.removesuffix(".weight") in names)
    return ParameterCount(parameters=total, experts=experts, outside=outside, frozen=frozen, gemms=gemms)


def _shard_size(spec: ParameterSpec, degrees: Degrees) -> int:
    size = 1
    for length, axis in zip(spec.shape, spec.axes, strict=True):
        ranks = getattr(degrees, ALONG[axis]) if axis in ALONG else 1
        begin, end = part_of(length, 0, ranks) if length % ranks == 0 or axis == "vocab" else (0, length)
        size *= end - begin
    return size


def needs_sharding(options: PrecisionOptions, world_size: int) -> bool:
    """Whether FSDP2 wraps a model: in float32 on one rank it runs as it is."""
    return world_size > 1 or options.bf16 or options.fp16
