"""Parameters that say what their dims mean.

Owns the description every parameter carries: global shape, logical axes, initial distribution, weight decay.
Tensor, expert and ZeRO sharding, initial values, optimizer groups and checkpoints read it; it knows none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cordee.model.placement import Placement

P = TypeVar("P", bound=Placement)


@dataclass(frozen=True)
class ParameterSpec:
    """What a parameter is, whatever shard of it this process holds.

    `axes` names each dim of the global `shape`: "vocab", "embed", "position", "kv_group", "slot" (the q heads of a
    group, then k, then v), "head_dim", "heads", "branch" (gate, up), "ffn", "latent", "expert", "choice" (what a router
    scores), "gate". Initial values are normal with `std` where it is positive, else the constant `fill`. What is not
    `trained` gets no gradient.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float = 0.0
    fill: float = 0.0
    decay: bool = True
    trained: bool = True

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), f"{self.axes} does not name the dims of {self.shape}"


class SpecifiedModule(nn.Module, Generic[P]):
    """A module whose own parameters are declared with a `ParameterSpec`, and its seams with a `Placement`."""

    specs: dict[str, ParameterSpec]
    placement: P
    device_kwargs: ClassVar[frozenset[str]] = frozenset({"device", "dtype"})

    def __init__(self, placement: P):
        super().__init__()
        self.specs = {}
        self.placement = placement

    def local(self, name: str) -> Any:
        """Parameter `name` as this process computes with it; None if it is absent."""
        value = getattr(self, name)
        return None if value is None else self.placement.views[name](value)

    def declare(self, name: str, spec: ParameterSpec | None, **factory: torch.device | torch.dtype | None) -> None:
        """Register parameter `name`, its values left unset; `spec` None registers an absent parameter."""
        assert factory.keys() <= self.device_kwargs
        if spec is None:
            self.register_parameter(name, None)
            return
        self.specs[name] = spec
        self.placement.declare(name)
        values = torch.empty(spec.shape, **factory)  # type: ignore[arg-type]
        self.register_parameter(name, nn.Parameter(values, requires_grad=spec.trained))


def parameter_specs(module: nn.Module) -> dict[str, ParameterSpec]:
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


def local_shard(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The part of `tensor` this process holds and the global position of its first element."""
    if not isinstance(tensor, DTensor):
        return tensor, (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), tuple(offset)
