"""Mixture of experts (MoE): each token goes through a few of many MLPs.

Owns the block, its experts and the local dispatch. Where experts live is decided by what replaces `MoE.dispatch`."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.model import specs
from cordee.model.balance import Balance, Reduce, balanced
from cordee.model.config import CapacityConfig, MLPConfig, ModelConfig, MoEConfig
from cordee.model.linear import Linear, LinearPlacement
from cordee.model.low_rank import Drop, Projection
from cordee.model.mlp import MLP, activate
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import BlockPlacement, Placement, unchanged
from cordee.model.router import Router, Routing, count_by_expert, limit_to_capacity, rank_in_group
from cordee.model.specs import Specs
from cordee.ops.grouped import grouped_matmul


class StackedLinear(Projection[LinearPlacement]):
    """A linear map for each expert: y = x W_e^T + b_e, with W `[expert, *out_shape, in_size]`."""

    def __init__(self, specs: Specs, **factory):
        super().__init__(LinearPlacement(product=grouped_matmul), specs, **factory)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """`[rows, in_size]`, counts[0] of them for the first expert and so on, to `[rows, product of out_shape]`."""
        y = self.placement.product(rows, self.local("weight").flatten(1, -2), counts=counts)
        y = self.with_adapters(y, rows, partial(grouped_matmul, counts=counts))
        bias = self.local("bias")
        if bias is None:
            return y
        return y + bias.flatten(1).repeat_interleave(counts, 0, output_size=len(rows))


class Experts(SpecifiedModule[Placement]):
    """MLPs of one shape, their parameters stacked. Rows are multiplied by their weight after the MLP, or before it."""

    def __init__(self, config: MLPConfig, num_experts: int, model: ModelConfig, *, weight_input: bool, **factory):
        super().__init__(Placement())
        self.config = config
        self.weight_input = weight_input
        own = specs.mlp(config, model, num_experts)
        if config.gated:
            self.gate_up = StackedLinear(specs.of_part(own, "gate_up"), **factory)
        else:
            self.up = StackedLinear(specs.of_part(own, "up"), **factory)
        self.down = StackedLinear(specs.of_part(own, "down"), **factory)

    def forward(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """`[rows, embed]` to the same; `weights` float32 `[rows]`, `counts` int64 `[experts]`: rows of each expert."""
        if self.weight_input:
            rows = _weighted(rows, weights)
        up = (self.gate_up if self.config.gated else self.up)(rows, counts)
        y = self.down(activate(up, self.config), counts)
        return y if self.weight_input else _weighted(y, weights)


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    """Multiplied in the float32 of the weights, rounded once."""
    return (rows * weights[:, None]).to(rows.dtype)


Dispatch = Callable[[Tensor, Routing, Experts], Tensor]
Limit = Callable[[Routing, CapacityConfig, int], Routing]  # of so many sequences


@dataclass(frozen=True, eq=False)
class Rows:
    """What the experts compute: the kept routes, sorted by expert; padding has the number of tokens for its token."""

    token: Tensor  # int64 [rows]: which token goes in
    weights: Tensor  # float32 [rows]
    counts: Tensor  # int64 [experts]

    @staticmethod
    def of(routing: Routing) -> "Rows":
        """The rows of all experts."""
        num_experts, facts = routing.logits.shape[1], {"rows_per_expert": routing.rows_per_expert}
        return Rows.sorted(kept_experts(routing), routing.weights, num_experts, complete=routing.kept is None, **facts)

    @staticmethod
    def sorted(
        experts: Tensor, weights: Tensor, num_experts: int, *, complete: bool, rows_per_expert: int | None
    ) -> "Rows":
        """The rows of `num_experts` experts; `experts` `[tokens, top_k]` are the chosen ones, `num_experts` for none.

        `complete`: that does not occur. No loop; the host waits for the device only for routes without an expert whose
        number is not fixed by padding every expert to `rows_per_expert`."""
        top_k = experts.shape[1]
        experts, weights = experts.flatten(), weights.flatten()
        order = experts.argsort(stable=True)
        counts = count_by_expert(experts, num_experts + 1)
        if rows_per_expert is not None:
            order = _padded(order, experts[order], counts, rows_per_expert)
            weights = F.pad(weights, (0, 1))
            counts = torch.full_like(counts, rows_per_expert)
        elif not complete:
            order = order[: int(counts[:-1].sum())]
        return Rows(order // top_k, weights.index_select(0, order), counts[:-1])

    def permute(self, x: Tensor) -> Tensor:
        """The tokens of `[tokens, embed]` that go in, `[rows, embed]`."""
        return x.index_select(0, self.token.clamp(max=len(x) - 1))

    def unpermute(self, y: Tensor, tokens: int) -> Tensor:
        """The sum for each of `tokens` of the results `[rows, embed]`, `[tokens, embed]`."""
        # Padding goes to a row of its own.
        return y.new_zeros(tokens + 1, y.shape[1]).index_add(0, self.token, y)[:-1]


def kept_experts(routing: Routing) -> Tensor:
    """The chosen experts, int64 `[tokens, top_k]`; the number of experts where capacity has dropped one."""
    if routing.kept is None:
        return routing.experts
    return routing.experts.masked_fill(~routing.kept, routing.logits.shape[1])  # the dropped come last


def _padded(order: Tensor, experts: Tensor, counts: Tensor, rows_per_expert: int) -> Tensor:
    """Each expert's routes in the first of its `rows_per_expert` rows, the number of all routes in the others.

    `experts` are those of the routes in `order`, sorted; the last of `counts` is of dropped routes."""
    end = (len(counts) - 1) * rows_per_expert
    rows = experts * rows_per_expert + rank_in_group(experts, counts)
    padded = order.new_full((end + 1,), len(order))
    # Dropped routes go to one row past the end, which is cut off.
    return padded.scatter_(0, rows.clamp(max=end), order)[:-1]


def local_dispatch(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """The sum of each token's experts, `[tokens, embed]` to the same, all experts in one grouped product."""
    rows = Rows.of(routing)
    return rows.unpermute(experts(rows.permute(x), rows.weights, rows.counts), len(x))


def loop_dispatch(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """As `local_dispatch`, one expert after the other: the definition."""
    y = torch.zeros_like(x)
    for index, alone in enumerate(torch.eye(routing.logits.shape[1], dtype=torch.int64, device=x.device)):
        chosen = routing.experts == index
        if routing.kept is not None:
            chosen = chosen & routing.kept
        token, slot = chosen.nonzero(as_tuple=True)
        y = y.index_add(0, token, experts(x[token], routing.weights[token, slot], alone * len(token)))
    return y


def _limit_alone(routing: Routing, capacity: CapacityConfig, batch_size: int) -> Routing:
    return limit_to_capacity(routing, capacity)


@dataclass(eq=False, kw_only=True)
class MoEPlacement(BlockPlacement):
    """Where experts are, and what of the tokens of a sequence other processes hold."""

    dispatch: Dispatch = local_dispatch
    limit: Limit = _limit_alone
    reduce: Reduce = unchanged  # adds up sums over tokens
    balance_share: float = 1.0  # of the auxiliary losses' gradient; other processes with these tokens have the rest


class MoE(SpecifiedModule[MoEPlacement]):
    """The sum of the experts a router chooses for each token, and of the shared experts that see all tokens."""

    def __init__(self, config: MoEConfig, model: ModelConfig, **factory):
        super().__init__(MoEPlacement())
        self.config = config
        self.router = Router(config.router, model, **factory)
        count = config.router.num_experts
        self.experts = Experts(config.expert, count, model, weight_input=config.weight_input, **factory)
        self.shared = None if config.shared is None else MLP(config.shared, model, **factory)
        gate = specs.of_part(specs.moe(config, model), "shared_gate")
        self.shared_gate = Linear(gate, **factory) if gate else None

    def forward(self, x: Tensor, balance: Balance | None = None, *, drop: Drop | None = None) -> Tensor:
        """`[batch, seq, embed]` to the same. Capacity cuts routes in training only; auxiliary losses need `balance`."""
        return self.placement.call(self._forward, x, balance, drop)

    def _forward(self, x: Tensor, balance: Balance | None, drop: Drop | None) -> Tensor:
        placement = self.placement
        x = placement.enter(x)
        tokens = x.flatten(0, 1)
        routing = self.router(tokens)
        if self.training and self.config.capacity is not None:
            routing = placement.limit(routing, self.config.capacity, len(x))
        if balance is not None:
            routing = balanced(
                routing,
                self.config.router,
                self.config.balance,
                balance,
                layer=self,
                batch_size=len(x),
                reduce=placement.reduce,
                share=placement.balance_share,
            )
        y = placement.dispatch(tokens, routing, self.experts).view_as(x)
        if self.shared is not None:
            shared = self.shared(x, drop=drop)
            y = y + (shared if self.shared_gate is None else self.shared_gate(x, drop=drop).sigmoid() * shared)
        return placement.exit(y)
