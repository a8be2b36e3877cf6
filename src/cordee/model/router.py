"""Which experts a token visits, and how much each of them counts.

Owns scores, choice, weights and the limits of capacity. Knows nothing of the experts themselves, of where they are,
or of the losses that keep them evenly used."""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.model import specs
from cordee.model.config import CapacityConfig, ModelConfig, RouterConfig
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import Placement

TINY = 1e-20  # keeps a sum of sigmoids from being zero; lost in rounding beside a sum of softmax values


@dataclass(frozen=True, eq=False)
class Routing:
    """The routes of `[tokens]`: `top_k` experts each.

    `kept` marks the routes that capacity leaves (None: all). With `rows_per_expert` every expert computes that many
    rows, whatever it is given."""

    logits: Tensor  # float32 [tokens, num_experts]
    experts: Tensor  # int64 [tokens, top_k]
    weights: Tensor  # float32 [tokens, top_k]
    kept: Tensor | None = None  # bool [tokens, top_k]
    rows_per_expert: int | None = None


class Router(SpecifiedModule[Placement]):
    """Scores in float32, whatever the type of the tokens: near ties decide which expert learns.

    Covers the routers of Switch and Mixtral (softmax), GPT-OSS (softmax of the chosen), DeepSeek-V2 (limited to groups;
    arXiv 2405.04434), DeepSeek-V3 (sigmoid, bias for the choice only; arXiv 2412.19437) and Llama 4 (sigmoid)."""

    weight: Tensor
    bias: Tensor | None
    correction_bias: Tensor | None

    def __init__(self, config: RouterConfig, model: ModelConfig, **factory):
        super().__init__(Placement())
        self.config = config
        self.declare(specs.router(config, model), "weight", "bias", "correction_bias", **factory)

    def forward(self, tokens: Tensor) -> Routing:
        """Routing of `[tokens, embed]`."""
        bias = None if self.bias is None else self.local("bias").float()
        logits = F.linear(tokens.float(), self.local("weight").float(), bias)
        scores = self._score(logits) if self.config.score_when == "before" else logits
        experts = self._choose(scores)
        weights = scores.gather(1, experts)
        if self.config.score_when == "after":
            weights = self._score(weights)
        if self.config.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + TINY)
        return Routing(logits, experts, weights * self.config.scale)

    def _score(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()

    @torch.no_grad()
    def _choose(self, scores: Tensor) -> Tensor:
        """Indices of the `top_k` experts, int64 `[tokens, top_k]`, best first."""
        if self.correction_bias is not None:
            scores = scores + self.local("correction_bias").float()
        if self.config.num_groups > 1:
            scores = self._limit_to_groups(scores)
        return scores.topk(self.config.top_k, -1).indices

    def _limit_to_groups(self, scores: Tensor) -> Tensor:
        """`scores` with those outside the best groups of experts at minus infinity."""
        config = self.config
        groups = scores.unflatten(1, (config.num_groups, -1))  # [tokens, groups, experts of a group]
        group_scores = groups.amax(-1) if config.group_score == "max" else groups.topk(2, -1).values.sum(-1)
        best = group_scores.topk(config.top_groups, -1).indices
        hidden = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
        return groups.masked_fill(hidden[..., None], -math.inf).flatten(1)

    def extra_repr(self) -> str:
        return f"{self.config.num_experts} experts, top {self.config.top_k} by {self.config.score}"


@torch.no_grad()
def limit_to_capacity(routing: Routing, config: CapacityConfig) -> Routing:
    """`routing` with at most a fixed number of tokens an expert, the rest marked as dropped (GShard, arXiv 2006.16668).

    Of the tokens that chose an expert, those with the largest weights are kept, or the first ones. The number depends
    on how many tokens are routed together, so results depend on the size of micro-batches."""
    (tokens, num_experts), top_k = routing.logits.shape, routing.experts.shape[1]
    # No expert sees a token twice, so that more rows than tokens would stay empty.
    capacity = min(math.ceil(tokens * top_k / num_experts * config.factor), tokens)
    experts = routing.experts.flatten()
    order = torch.arange(len(experts), device=experts.device)
    if config.drop == "probs":
        order = routing.weights.flatten().argsort(descending=True, stable=True)
    order = order[experts[order].argsort(stable=True)]  # by expert, and for each in the order of preference
    first = rank_in_group(experts[order], count_by_expert(experts, num_experts)) < capacity
    kept = torch.empty_like(first).scatter_(0, order, first).view_as(routing.experts)
    return replace(routing, kept=kept, rows_per_expert=capacity if config.pad else None)


def count_by_expert(experts: Tensor, num_experts: int) -> Tensor:
    """How often each expert occurs in the flat `experts`, int64 `[num_experts]`, without waiting for the device."""
    return experts.new_zeros(num_experts).scatter_add_(0, experts, torch.ones_like(experts))


def rank_in_group(sorted_experts: Tensor, counts: Tensor) -> Tensor:
    """For each entry of the sorted `[routes]`, how many entries of its expert come before it."""
    return torch.arange(len(sorted_experts), device=counts.device) - (counts.cumsum(0) - counts)[sorted_experts]
