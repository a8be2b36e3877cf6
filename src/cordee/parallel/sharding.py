"""Which dim of a parameter is sharded along which axis of the ranks that compute.

Owns turning whole parameters into DTensors by the table from logical axes to mesh axes (`shards.ALONG`). `tensor.py`
and `expert.py` compute with them, `data.py` keeps them between steps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor import Placement as DTensorPlacement  # ours is `model.placement.Placement`

from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import after
from cordee.model.shards import ALONG, part_of
from cordee.model.specs import ParameterSpec
from cordee.parallel.layout import Layout
from cordee.parallel.options import ParallelOptions

NAME = "sharding"


def apply(model: nn.Module, layout: Layout, options: ParallelOptions) -> None:
    """Make every parameter of `model`, whole and on the meta device, a DTensor of the shards that ranks compute with.

    Experts are sharded over the expert and tensor axes, all else over the tensor axis; axes of one rank are left out,
    and a parameter without any stays as it is. The views of modules give the local shard and take its gradient; that of
    a replicated parameter is taken to be the same on all ranks."""
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
            module.placement.wrap(f"view_of_{name}", NAME, after(local), compiles=True)


def placements(spec: ParameterSpec, mesh: DeviceMesh) -> list[DTensorPlacement]:
    """DTensor's placements of the parameter over the axes of `mesh`."""
    assert mesh.mesh_dim_names is not None
    return [_placement(spec, axis, size) for axis, size in zip(mesh.mesh_dim_names, mesh.shape, strict=True)]


def _placement(spec: ParameterSpec, axis: str, size: int) -> DTensorPlacement:
    for dim, name in enumerate(spec.axes):
        # Fewer key and value heads than ranks are replicated. Only the vocabulary may have unequal shards.
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


def _distributed(parameter: nn.Parameter, mesh: DeviceMesh, placed: list[DTensorPlacement]) -> nn.Parameter:
    part = torch.empty(_local_shape(parameter, mesh, placed), dtype=parameter.dtype, device=parameter.device)
    tensor = DTensor.from_local(part, mesh, placed, run_check=False, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(tensor, requires_grad=parameter.requires_grad)


def kept(model: nn.Module) -> int:
    """How many parameters this rank keeps between steps."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def _local_shape(parameter: Tensor, mesh: DeviceMesh, placed: Iterable[DTensorPlacement]) -> list[int]:
    """Of this rank's shard along tensor and expert axes; those of FSDP2 are left out."""
    shape = list(parameter.shape)
    for index, (axis, placement) in enumerate(zip(mesh.mesh_dim_names or (), placed, strict=True)):
        if axis in ALONG.values() and isinstance(placement, Shard):
            begin, end = part_of(shape[placement.dim], mesh.get_local_rank(index), mesh.size(index))
            shape[placement.dim] = end - begin
    return shape


def local(parameter: Tensor) -> Tensor:
    """The view of a shard."""
    assert isinstance(parameter, DTensor)
    return parameter.to_local()


def local_of_sum(parameter: Tensor) -> Tensor:
    """The view of a parameter that is replicated over ranks whose gradients are parts of a sum."""
    assert isinstance(parameter, DTensor)
    placed = [Partial() if isinstance(placement, Replicate) else placement for placement in parameter.placements]
    return parameter.to_local(grad_placements=placed)
