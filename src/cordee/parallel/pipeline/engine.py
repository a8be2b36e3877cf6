"""The parts of torch's pipeline and FSDP2 that have no public name.

Owns every private import the pipeline needs, so that a new torch is tried out here; it is pinned. Why they are needed:
dgrad and wgrad apart are torch's own walk over the graph, which only its schedules call; and FSDP2 reduces gradients
in hooks of a whole backward, of which a pipeline has several in flight, so the executor asks for the reduction itself,
as torch's schedules do (`_PipelineStageBase.perform_reduce_grad`). Those schedules are not used whole: they give every
micro-batch one shape and keep what was sent to the end of the step."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

ParamGroups = list[dict[str, Any]]  # what wgrad still needs: torch's groups of parameters, with intermediate gradients


def backward_input(
    output: Tensor, grad: Tensor, x: Tensor, parameters: Iterable[nn.Parameter]
) -> tuple[Tensor, ParamGroups]:
    """The gradient of `x` from that of `output`, and what `backward_weight` needs afterwards."""
    grads, param_groups = stage_backward_input([output], [grad], [x], iter(parameters))
    assert grads[0] is not None, "the output of a stage depends on its input"
    return grads[0], param_groups


def backward_weight(parameters: Iterable[nn.Parameter], param_groups: ParamGroups) -> None:
    """Accumulate the gradients of `parameters` that `backward_input` has left open."""
    stage_backward_weight(iter(parameters), param_groups)


def begin_step(model: nn.Module, *, reshard: bool) -> None:
    """Let FSDP2 accumulate gradients on this rank, and leave what it does after every backward to `post_backward`.

    `reshard`: free full parameters as soon as a layer is done with them, else at `finish_step`."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(reshard)
        # FSDP2 would look at all modules, those of other stages and those that another thread reduces too.
        _state(model)._state_ctx.post_backward_final_callback_queued = True


def fsdp_modules(modules: Iterable[nn.Module]) -> list[FSDPModule]:
    """Those of `modules` that FSDP2 has wrapped."""
    return [module for module in modules if isinstance(module, FSDPModule)]


@torch.no_grad()
def post_backward(modules: Iterable[FSDPModule], *, reduce: bool) -> None:
    """Accumulate what a backward has left at the parameters of `modules`, themselves only: in the type of reduction,
    and with `reduce` over the data-parallel ranks."""
    for module in modules:
        module.set_requires_gradient_sync(reduce, recurse=False)
        for group in _state(module)._fsdp_param_groups:
            group.post_backward()
            group._training_state = TrainingState.IDLE
        _state(module)._training_state = TrainingState.IDLE
        module.set_requires_gradient_sync(False, recurse=False)


def finish_step(model: nn.Module) -> None:
    """End a step: wait for all reductions, keep shards only."""
    if isinstance(model, FSDPModule):
        model.set_is_last_backward(True)
        _state(model)._root_post_backward_final_callback()
        for module in fsdp_modules(model.modules()):
            module.reshard()


def _state(module: FSDPModule) -> FSDPState:
    return module._get_fsdp_state()
