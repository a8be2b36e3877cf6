"""Optimizers from options.

Owns the parameter groups. Knows no model: a parameter's description says whether it
decays."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cordee.optim.algorithms import Groups, registry
from cordee.optim.options import OptimizerOptions


class Described(Protocol):
    """The part of a `ParameterSpec` that is used here."""

    @property
    def decay(self) -> bool: ...

    @property
    def rate(self) -> float: ...


def build_optimizer(
    options: OptimizerOptions, parameters: Iterable[tuple[str, Tensor]], specs: Mapping[str, Described], *, fused: bool
) -> Optimizer:
    """The optimizer of `options` over named `parameters`, plain tensors or DTensors, that take gradients.

    `specs` describes each by name; `fused` says that their device has fused optimizers. Rate and weight decay of its
    groups are set before every step by `set_rates`."""
    return registry()[options.optimizer](options, parameter_groups(parameters, specs), fused)


def parameter_groups(parameters: Iterable[tuple[str, Tensor]], specs: Mapping[str, Described]) -> Groups:
    """One group with weight decay and one without for each `rate` and mesh of parameters; an empty group is left out,
    unless nothing is trained on this rank: torch's optimizers want a group.

    torch's operators on lists of tensors take one mesh at a time."""
    groups: dict[tuple[bool, float, object], list[Tensor]] = defaultdict(list)
    for name, parameter in parameters:
        if parameter.requires_grad:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            groups[specs[name].decay, specs[name].rate, mesh].append(parameter)
    decaying_first = sorted(groups.items(), key=lambda item: not item[0][0])
    found = [{"params": each, "decays": decay, "rate": rate} for (decay, rate, _), each in decaying_first]
    return found or [{"params": [], "decays": False, "rate": 1.0}]


def set_rates(optimizer: Optimizer, learning_rate: float, weight_decay: float) -> None:
    """Set what the next step uses; groups without decay keep a weight decay of 0."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]
        group["weight_decay"] = weight_decay if group["decays"] else 0.0
