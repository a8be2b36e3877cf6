"""Data parallelism and mixed precision, both FSDP2's.

Owns how much of a model each data-parallel rank keeps (the ZeRO stages of Rajbhandari et al. 2020) and in which type
it computes. Gradients are sums over ranks, never means: the trainer divides the loss by the global number of trained
tokens. Knows no loss and no optimizer. Options: `--zero-stage`, `--num-distributed-optimizer-instances`, `--bf16`,
`--fp16`, `--overlap-*` (options.py). Law: `degrees.problems`. Cost: `cost.py`.

| stage | sharded over ranks       | parameters between forward and backward | gradients are reduced       |
|-------|--------------------------|-----------------------------------------|-----------------------------|
| 0     | nothing                  | kept                                    | after the last micro-batch  |
| 1     | optimizer state          | kept, also between micro-batches        | after the last micro-batch  |
| 2     | and gradients            | kept, also between micro-batches        | after every micro-batch     |
| 3     | and parameters           | gathered anew for the backward          | after every micro-batch     |

At rest every stage but 0 keeps float32 shards. Stage 0 is FSDP2 over shards of one rank, the one public form of pure
replication; during a step it holds the parameters twice, at rest and as computed with.

On devices with streams FSDP2 has one bucket (a layer) of gradients in flight, and prefetches the next layer's
parameters, under computation; `_overlap` makes that two, or none. On CPU collectives block where they are called."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from cordee.config.option import to_flag
from cordee.device import KINDS
from cordee.log import logger
from cordee.model.gpt import GPTModel
from cordee.model.low_rank import quantised
from cordee.model.moe import Experts
from cordee.optim.options import PrecisionOptions
from cordee.parallel.cost import needs_sharding
from cordee.parallel.layout import Layout
from cordee.parallel.options import LayoutOptions, ParallelOptions


def compute_dtype(options: PrecisionOptions) -> torch.dtype:
    """Type of activations and of the parameters in the forward."""
    if options.bf16:
        return torch.bfloat16
    return torch.float16 if options.fp16 else torch.float32


def apply(model: GPTModel, layout: Layout, options: LayoutOptions) -> None:
    """Make every parameter of `model` a float32 DTensor over the data ranks, unless it runs as it is.

    Each layer is gathered and reduced on its own; the rest of the model, with a tied embedding and head, is one more
    group."""
    if not needs_sharding(options, layout.world_size):
        return
    layers, stage = model.own_layers(), options.zero_stage
    mesh = layout.data_mesh
    assert mesh is not None, "mixed precision and data parallelism need a process group"
    size, expert_size = layout.degrees.storage[1], layout.degrees.expert_storage[1]

    dtype = compute_dtype(options)
    reduce = torch.float32 if options.accumulate_allreduce_grads_in_fp32 else dtype
    # Nothing but token ids enters from outside, and rotary tables must stay float32: inputs are not cast.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=reduce, cast_forward_inputs=False)
    if layout.expert_data_mesh is not None:
        for module in model.modules():
            if isinstance(module, Experts):
                _wrap(module, layout.expert_data_mesh, expert_size, policy, reshard=stage == 3)
    for module in [*layers, model]:
        _wrap(module, mesh, size, policy, reshard=stage == 3 and module is not model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot multiply while it sums
    _overlap(model, layers, options, mesh.device_type)


def _overlap(model: nn.Module, layers: Sequence[nn.Module], options: ParallelOptions, device_type: str) -> None:
    """When gradients are reduced and parameters prefetched, of wrapped `layers` in the order of the forward."""
    switches = ("overlap_grad_reduce", "overlap_param_gather", "delay_param_gather")
    given = [to_flag(name) for name in switches if getattr(options, name)]
    if given and not KINDS[device_type].overlaps:
        logger.info("ignored: %s (collectives do not overlap computation on a %s)", ", ".join(given), device_type)
    groups: list[FSDPModule] = [module for module in (model, *layers) if isinstance(module, FSDPModule)]
    if options.overlap_grad_reduce:
        for group in groups:
            group.set_reduce_scatter_max_input_buffers(2)
    for index, group in enumerate(groups):
        if options.overlap_param_gather:
            group.set_modules_to_forward_prefetch(groups[index + 1 : index + 3])
            group.set_modules_to_backward_prefetch(groups[max(index - 2, 0) : index][::-1])
        elif options.delay_param_gather:
            group.set_modules_to_backward_prefetch([group])  # itself, which is gathered already: no prefetch


def _wrap(module: nn.Module, mesh: DeviceMesh, size: int, policy: MixedPrecisionPolicy, *, reshard: bool) -> None:
    ignored = {each.weight for each in quantised(module).values()}
    how = {"shard_placement_fn": lambda each: Shard(shard_dim(each, size)), "mp_policy": policy}
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=ignored, **how)  # type: ignore[arg-type]


def shard_dim(parameter: Tensor, size: int) -> int:
    """The last dim that `size` ranks can shard evenly, else the first, which FSDP2 pads.

    The last, because the first ones may be as short as two. A dim that other axes shard is the last resort."""
    shape, taken = tuple(parameter.shape), set()
    if isinstance(parameter, DTensor):
        shape = tuple(parameter.to_local().shape)
        taken = {placement.dim for placement in parameter.placements if isinstance(placement, Shard)}
    even = [dim for dim, length in enumerate(shape) if length % size == 0]
    return max([dim for dim in even if dim not in taken] or even, default=0)


def begin_micro_batch(model: nn.Module, stage: int, *, last: bool) -> None:
    """Set what the coming backward does with gradients and parameters; `last`: it ends the step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or stage >= 2)
        model.set_reshard_after_backward(last or stage == 3)


def release(model: nn.Module) -> None:
    """Free parameters that a forward without a backward has gathered, and keep their shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
