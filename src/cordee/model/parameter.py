"""Modules whose parameters carry a `ParameterSpec`.

Tensor, expert and ZeRO sharding, initial values, optimizer groups and checkpoints read the specs, and this file knows
none of them."""

from collections.abc import Collection
from typing import Any, ClassVar, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cordee.model.placement import Placement
from cordee.model.specs import Origin, Specs

P = TypeVar("P", bound=Placement)
ORIGINS: tuple[Origin, ...] = get_args(Origin)


class SpecifiedModule(nn.Module, Generic[P]):
    """A module whose own parameters are declared with a `ParameterSpec`, and its seams with a `Placement`."""

    specs: Specs
    placement: P
    device_kwargs: ClassVar[frozenset[str]] = frozenset({"device", "dtype"})

    def __init__(self, placement: P):
        super().__init__()
        self.specs = {}
        self.placement = placement

    def local(self, name: str) -> Any:
        """Parameter `name` as this process computes with it; None if it is absent."""
        value = getattr(self, name)
        return None if value is None else self.placement.view(name)(value)

    def declare(self, specs: Specs, *names: str, **factory: torch.device | torch.dtype | None) -> None:
        """Register the parameters `names`, their values left unset; one without a spec is registered as absent."""
        assert factory.keys() <= self.device_kwargs
        for name in names:
            spec = specs.get(name)
            if spec is None:
                self.register_parameter(name, None)
                continue
            self.specs[name] = spec
            self.placement.declare(name)
            values = torch.empty(spec.shape, **factory)  # type: ignore[arg-type]
            self.register_parameter(name, nn.Parameter(values, requires_grad=spec.trained))


def parameter_specs(module: nn.Module) -> Specs:
    """Spec of every parameter by its canonical name; a shared parameter is listed once, under its first name."""
    names = {name for name, _ in module.named_parameters()}
    found = {}
    for prefix, child in module.named_modules():
        if isinstance(child, SpecifiedModule):
            for name, spec in child.specs.items():
                full = f"{prefix}.{name}" if prefix else name
                if full in names:
                    found[full] = spec
    assert found.keys() == names, f"undeclared parameters: {sorted(names - found.keys())}"
    return found


def of_origins(module: nn.Module, origins: Collection[Origin]) -> dict[str, nn.Parameter]:
    """The parameters of these origins by canonical name, in order."""
    parameters = dict(module.named_parameters())
    if set(ORIGINS) <= set(origins):
        return parameters
    specs = parameter_specs(module)
    return {name: parameter for name, parameter in parameters.items() if specs[name].origin in origins}


def train_only(module: nn.Module, origins: Collection[Origin]) -> None:
    """Freeze what is of other origins. Before a layout is put on: how parameters are grouped depends on it."""
    for name in dict(module.named_parameters()).keys() - of_origins(module, origins).keys():
        module.get_parameter(name).requires_grad_(False)


def local_shard(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of `tensor` this process holds and the global position of its first element."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)
