"""Which dim of a parameter lies along which axis of the ranks that compute.

Owns turning whole parameters into DTensors by the table from logical axes to mesh axes, and counting the parts.
What a rank does with its part is `tensor.py`'s and `expert.py`'s affair, and how parts are kept between steps
`data.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from cordee.config.schema import ParallelOptions
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import View, after
from cordee.model.shards import ALONG, part_of
from cordee.model.specs import ParameterSpec
from cordee.parallel.cost import Share
from cordee.parallel.layout import Layout

NAME = "sharding"


def apply(model: nn.Module, layout: Layout, options: ParallelOptions) -> None:
    """Make every parameter of `model`, whole and on the meta device, a DTensor of the parts that ranks compute with.

    Experts lie over the expert and tensor axes, all else over the tensor axis; axes of one rank are left out, and a
    parameter whose axes are all left out stays as it is. The views of modules give the local part, whose gradient is
    that of the same part; of a repeated parameter it is taken to be the same on all ranks.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        if not isinstance(module, SpecifiedModule):
            continue
        for name, spec in module.specs.items():
            parameter = getattr(module, name)
            if (mesh := _mesh(spec, layout)) is None:
                continue
            if parameter not in made:
                made[parameter] = _distributed(parameter, mesh, placements(spec, mesh))
            setattr(module, name, made[parameter])
            module.placement.wrap(f"views.{name}", NAME, after(local), compiles=True)


def placements(spec: ParameterSpec, mesh: DeviceMesh) -> list[Placement]:
    """How the parameter lies over the axes of `mesh`."""
    assert mesh.mesh_dim_names is not None
    return [_placement(spec, axis, size) for axis, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True)]


def _placement(spec: ParameterSpec, axis: str, size: int) -> Placement:
    for dim, name in enumerate(spec.axes):
        # Fewer key and value heads than ranks are repeated. Only the vocabulary may have unequal parts.
        if ALONG.get(name) == axis and (spec.shape[dim] % size == 0 or name == "vocab"):
            return Shard(dim)
    return Replicate()


def _mesh(spec: ParameterSpec, layout: Layout) -> DeviceMesh | None:
    tensor = layout.degrees.tp > 1
    if "expert" in spec.axes and layout.experts is not None:
        return layout.experts["ep", "tp"] if tensor else layout.experts["ep"]
    if not tensor:
        return None
    assert layout.storage is not None
    return layout.storage["tp"]


def _distributed(parameter: nn.Parameter, mesh: DeviceMesh, lying: list[Placement]) -> nn.Parameter:
    shape = list(parameter.shape)
    for axis, placement in enumerate(lying):
        if isinstance(placement, Shard):
            begin, end = part_of(shape[placement.dim], mesh.get_local_rank(axis), mesh.size(axis))
            shape[placement.dim] = end - begin
    part = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
    tensor = DTensor.from_local(part, mesh, lying, run_check=False, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def count(model: nn.Module, layers: Iterable[nn.Module]) -> Share:
    """How many parameters this rank computes with; `layers` are those of `model`."""
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    total = experts = outside = frozen = 0
    for parameter in model.parameters():
        size = _own_size(parameter)
        total += size
        experts += size if _is_along("ep", parameter) else 0
        outside += size if parameter not in inside else 0
        frozen += size if not parameter.requires_grad else 0
    return Share(parameters=total, experts=experts, outside=outside, frozen=frozen)


def kept(model: nn.Module) -> int:
    """How many parameters this rank has between steps."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(part.numel() for part in parts)


def _is_along(axis: str, parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor) and axis in (parameter.device_mesh.mesh_dim_names or ())


def _own_size(parameter: Tensor) -> int:
    """Numbers of a parameter that this rank computes with: its part along the axes that share work out."""
    shape = list(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis, placement in zip(mesh.mesh_dim_names or (), parameter.placements, strict=True):
            if axis in ALONG.values() and isinstance(placement, Shard):
                begin, end = part_of(shape[placement.dim], mesh.get_local_rank(axis), mesh[axis].size())
                shape[placement.dim] = end - begin
    return math.prod(shape)


def local(parameter: Tensor) -> Tensor:
    """The view of a part."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def repeated(summed: bool) -> View:
    """The view of a parameter that tensor-parallel ranks repeat; `summed`: their gradients are parts of a sum."""
    return partial(_repeated, gradient=Partial()) if summed else local


def _repeated(parameter: Tensor, gradient: Placement) -> Tensor:
    assert isinstance(parameter, DTensor)
    lying = [gradient if isinstance(placement, Replicate) else placement for placement in parameter.placements]
    return parameter.to_local(grad_placements=lying)
