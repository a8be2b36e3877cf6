"""The parts of torch's pipeline and FSDP2 that have no public name.

Owns every private import the pipeline needs, so that a new torch is tried out here; it is pinned. Why they are needed:
a backward in two parts is torch's own walk over the graph, which only its schedules call; and FSDP2 reduces gradients
in hooks of a whole backward, of which a pipeline has several under way, so it asks for the reduction itself, as torch's
schedules do (`_PipelineStageBase.perform_reduce_grad`). Those schedules are not used whole: they give every micro-batch
one shape and keep what was sent to the end of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

Owed = list[dict[str, Any]]  # what the gradients of parameters are still to be computed from


def backward_by_inputs(
    output: Tensor, grad: Tensor, x: Tensor, parameters: Iterable[nn.Parameter]
) -> tuple[Tensor, Owed]:
    """The gradient of `x` from that of `output`, and what `backward_by_weights` needs afterwards."""
    grads, owed = stage_backward_input([output], [grad], [x], iter(parameters))
    assert grads[0] is not None, "what a stage is given takes part in what it makes"
    return grads[0], owed


def backward_by_weights(parameters: Iterable[nn.Parameter], owed: Owed) -> None:
    """Add up the gradients of `parameters` that `backward_by_inputs` has left open."""
    stage_backward_weight(iter(parameters), owed)


def begin(model: nn.Module, *, reshard: bool) -> None:
    """Let FSDP2 add gradients up on this rank, and leave their reduction to `settle`, also what it else does after
    every backward. `reshard`: keep parameters only for as long as a layer needs them, else until `finish`.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(reshard)
        # It would look at all modules, those of other stages and those that another thread reduces too.
        _state(model)._state_ctx.post_backward_final_callback_queued = True


def sharded(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """Those of `modules` that FSDP2 has wrapped."""
    return [module for module in modules if isinstance(module, FSDPModule)]


@torch.no_grad()
def settle(modules: Iterable[FSDPModule], *, reduce: bool) -> None:
    """Take in what a backward has left at the parameters of `modules`, themselves only: in the type of reduction, and
    with `reduce` over the data-parallel ranks.
    """
    for module in modules:
        module.set_requires_gradient_sync(reduce, recurse=False)
        for group in _groups(module):
            group.post_backward()
            group._training_state = TrainingState.IDLE
        _state(module)._training_state = TrainingState.IDLE
        module.set_requires_gradient_sync(False, recurse=False)


def finish(model: nn.Module) -> None:
    """End a step: wait for all reductions, keep shards only."""
    if not isinstance(model, FSDPModule):
        return
    model.set_is_last_backward(True)
    _state(model)._root_post_backward_final_callback()
    for module in sharded(model.modules()):
        module.reshard()


def _state(module: FSDPModule) -> FSDPState:
    return module._get_fsdp_state()


def _groups(module: FSDPModule) -> Iterator[FSDPParamGroup]:
    yield from _state(module)._fsdp_param_groups
