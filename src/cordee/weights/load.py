"""Weights into a model and out of one, wherever its parameters are.

Owns copying between a `Source` or `Sink` and parameters, which may be whole, sharded or still without memory. One
tensor is moved at a time, and of a sharded parameter only this process's part is read."""

import logging
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from cordee.errors import Problem, raise_all
from cordee.log import counted
from cordee.model.low_rank import Projection, quantised
from cordee.model.parameter import ORIGINS, Origin, local_shard, of_origins
from cordee.weights.codec import Sink, Source

logger = logging.getLogger("cordee")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: parameters, their elements over all processes, and what the source has to say."""

    parameters: int
    elements: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        loaded = f"{counted(self.parameters, 'tensor')}, {counted(self.elements, 'parameter')} loaded"
        return "; ".join((loaded, *self.notes))


@torch.no_grad()
def load_into(
    model: nn.Module, source: Source, dtype: torch.dtype | None = None, origins: Collection[Origin] = ORIGINS
) -> LoadReport:
    """Fill every parameter of `model` of these origins from `source`, converting to the parameter's type.

    Parameters on the meta device get memory first: on the device of their mesh, else on the CPU, and of type `dtype`
    if that is given. A model that holds a span of the layers takes only those. ProblemError, before anything is
    loaded, if a parameter is not in the source or has another shape there."""
    materialise(model, dtype)
    parameters = of_origins(model, origins)
    raise_all(mismatches(parameters, source))
    codes, device = quantised(model), next((each.device for each in model.parameters() if not each.is_meta), None)
    for name in source.names():
        local, offset = local_shard(parameters[name].detach()) if name in parameters else (None, ())
        if local is None or not local.numel():
            source.skip(name)
        else:
            index = tuple(slice(start, start + size) for start, size in zip(offset, local.shape, strict=True))
            kept = codes[name].quantised if name in codes else None
            local = local if kept is None else torch.empty_like(local, device=device)
            source.copy_into(local, name, index)
            if kept is not None:
                kept.fill(local)
    elements = sum(math.prod(parameter.shape) for parameter in parameters.values())
    return LoadReport(len(parameters), elements, source.notes)


def mismatches(parameters: Mapping[str, Tensor], source: Source) -> list[Problem]:
    """The parameters of a model that `source` lacks, or has in another shape."""
    problems = []
    available = set(source.names())
    for name, parameter in parameters.items():
        if name not in available:
            fix = "load a checkpoint of the same model"
            problems.append(Problem(name, None, "the model has this parameter, the checkpoint does not", fix))
        elif (shape := source.shape(name)) != tuple(parameter.shape):
            why = f"its shape is {list(shape)} in the checkpoint, {list(parameter.shape)} in the model"
            problems.append(Problem(name, None, why, "give the model the shape of the checkpoint"))
    return problems


def materialise(model: nn.Module, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> None:
    """Give memory to the parameters of `model` that are on the meta device, but for quantised ones; shared stay shared.

    `device`: where; None takes that of a sharded parameter's mesh, else the CPU."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta and not (name == "weight" and getattr(module, "quantised", None)):
                if parameter not in made:
                    own = parameter.device_mesh.device_type if isinstance(parameter, DTensor) else "cpu"
                    empty = torch.empty_like(parameter, device=device or own, dtype=dtype or parameter.dtype)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, made[parameter])


@torch.no_grad()
def save_from(model: nn.Module, sink: Sink | None, origins: Collection[Origin] = ORIGINS) -> None:
    """Put every parameter of `model` of these origins into `sink`. With sharded parameters all processes call it, one
    with a sink."""
    for name, parameter in of_origins(model, origins).items():
        tensor = full_tensor(parameter.detach())
        if sink is not None:
            sink.put(name, tensor)


@torch.no_grad()
def fill_lengths(model: nn.Module) -> None:
    """Let the lengths of DoRA begin as those of the rows that they are of. All processes that shard them call it."""
    for module in (each for each in model.modules() if isinstance(each, Projection)):
        for adapter, m in ((each, each.m) for each in module.low_ranks() if each.m is not None):
            norm, (local, first) = full_tensor(module.kept()).norm(dim=-1), local_shard(m)
            own = (slice(begin, begin + size) for begin, size in zip(first, local.shape, strict=True))
            local.copy_(norm[tuple(adapter.region)][tuple(own)])


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
