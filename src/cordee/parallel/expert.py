"""Expert parallelism: the experts of MoE layers sharded over ranks that hold different tokens (Lepikhin et al. 2020).

Options: `--expert-model-parallel-size`, `--moe-token-dispatcher-type`, `--moe-permutation-async-comm`
(options.py). Law: `laws.expert`. Cost: `cost.py`, by the experts of a `ParameterCount`. Owns the dispatch of
tokens to experts of other ranks and back, as two dispatchers that replace the local one and equal it. `sharding.py`
shards the experts: blocks of equal size, in order.

Every rank of the axis takes part in every dispatch: with no tokens at all it still sends, receives and multiplies,
forward and backward, empty tensors."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from cordee.model.moe import Experts, MoE, Rows, kept_experts
from cordee.model.router import Routing
from cordee.parallel import differentiable
from cordee.parallel.layout import Layout
from cordee.parallel.options import ParallelOptions

NAME = "expert parallelism"


def apply(model: nn.Module, layout: Layout, options: ParallelOptions) -> None:
    """Dispatch tokens of all ranks of the axis to the experts of `model`, whose parameters are sharded already.

    Nothing happens where there is one."""
    group = layout.group("ep")
    if group is None:
        return
    kind = DISPATCHERS[options.moe_token_dispatcher_type]
    dispatcher = kind(group, layout.axis_rank("ep"), layout.degrees.ep, options.moe_permutation_async_comm)
    for module in model.modules():
        if isinstance(module, MoE):
            module.placement.replace("dispatch", NAME, dispatcher, compiles=True)


@dataclass(frozen=True)
class _Dispatcher:
    """`overlap`: independent messages are in flight together."""

    group: ProcessGroup
    rank: int
    size: int
    overlap: bool


class AllToAllDispatcher(_Dispatcher):
    """Every (token, expert) row goes to the rank that has the expert, and the result back."""

    @torch._disable_dynamo  # sizes are known to the host only while it runs
    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """`[tokens, embed]` to the same; `experts` are this rank's, `routing` is over those of all."""
        rows = Rows.of(routing)
        counts, wait = differentiable.begin_all_to_all(rows.counts, self.group)
        if not self.overlap:
            wait()
        inputs = rows.permute(x)
        if self.overlap:
            wait()
        counts = counts.view(self.size, -1)  # [ranks, own experts]: rows that come for each
        sent, received = torch.stack((rows.counts.view(self.size, -1).sum(1), counts.sum(1))).tolist()
        both = (inputs, rows.weights)
        inputs, weights = differentiable.all_to_all_rows_fwd_bwd(both, self.group, sent, received, at_once=self.overlap)
        # Rows come by rank, then by expert, and are sorted by expert.
        expert = torch.arange(counts.shape[1], device=counts.device).repeat(counts.shape[0])
        order = expert.repeat_interleave(counts.flatten(), output_size=len(inputs)).argsort(stable=True)
        y = experts(inputs.index_select(0, order), weights.index_select(0, order), counts.sum(0))
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        y = y.index_select(0, back)
        (y,) = differentiable.all_to_all_rows_fwd_bwd((y,), self.group, received, sent, at_once=self.overlap)
        return rows.unpermute(y, len(x))


class AllGatherDispatcher(_Dispatcher):
    """Every rank gathers all tokens and their routing, and computes its own experts: few, even messages."""

    @torch._disable_dynamo
    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """As `AllToAllDispatcher`."""
        num_experts = routing.logits.shape[1]
        own = num_experts // self.size
        longest, capacity = self._agree(routing)
        missing = longest - len(x)
        parts = [_padded(x, missing), _padded(kept_experts(routing), missing, num_experts)]
        parts.append(_padded(routing.weights, missing))
        tokens, chosen, weights = differentiable.all_gather_together_fwd_reduce_scatter_bwd(
            parts, self.group, at_once=self.overlap
        )
        chosen = chosen - self.rank * own
        chosen = chosen.masked_fill((chosen < 0) | (chosen >= own), own)
        rows = Rows.sorted(chosen, weights, own, complete=False, rows_per_expert=capacity)
        y = rows.unpermute(experts(rows.permute(tokens), rows.weights, rows.counts), len(tokens))
        return differentiable.reduce_scatter_fwd_all_gather_bwd(y, self.group, 0)[: len(x)]

    def _agree(self, routing: Routing) -> tuple[int, int | None]:
        """The largest number of tokens of any rank, and the sum of all ranks' `rows_per_expert`."""
        padded = routing.rows_per_expert
        own = torch.tensor([[len(routing.experts), padded or 0]], device=routing.experts.device)
        lengths, rows = differentiable.all_gather(own, self.group, 0).t().tolist()
        return max(lengths), None if padded is None else sum(rows)


def _padded(x: Tensor, rows: int, value: float = 0.0) -> Tensor:
    """`[tokens, ...]` with `rows` more rows of `value`."""
    return F.pad(x, (0, 0, 0, rows), value=value) if rows else x


DISPATCHERS = {"alltoall": AllToAllDispatcher, "allgather": AllGatherDispatcher}
