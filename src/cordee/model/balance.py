"""The auxiliary losses of routers: that experts are evenly used, and that logits stay small.

Owns the losses, how their gradients enter, and what is reported of them. `token_sums` takes all sums over tokens, so
that a layout which splits the tokens of a micro-batch only has to add them up. Knows nothing of dispatch."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.autograd import Function

from cordee.model.config import BalanceConfig, RouterConfig
from cordee.model.router import TINY, Routing

Reduce = Callable[[Tensor], Tensor]

COEFFICIENTS = {  # the loss as it is logged: its coefficient in `BalanceConfig`
    "load_balancing_loss": "expert",
    "device_balancing_loss": "device",
    "communication_balancing_loss": "communication",
    "z_loss": "z",
}


class Balance:
    """The auxiliary losses of one micro-batch, handed to its forward; without it a model has none.

    `scale` is what the backward gets for an auxiliary loss of one: the weight of this micro-batch, on all processes
    that share it, times whatever else the trainer multiplies its sum of losses with before the backward (1 / global
    weight, loss scale). Gradients are then those of the coefficient times the mean of the auxiliary loss over
    micro-batches, by weight, however the main loss is normalised. A tensor is read in the backward: it may be filled
    after the forward. `counted` bool `[batch, seq]` leaves padding out.

    Layers report under their own name, so that one computed again in the backward reports the same again."""

    def __init__(self, scale: float | Tensor = 1.0, counted: Tensor | None = None):
        self.scale = torch.as_tensor(scale, dtype=torch.float32)
        self.counted = counted
        self.layers: dict[nn.Module, dict[str, Tensor]] = {}

    @torch._disable_dynamo  # or every layer would be compiled anew, for what is in the dict
    def report(self, layer: nn.Module, values: dict[str, Tensor]) -> None:
        self.layers[layer] = values

    def metrics(self) -> dict[str, Tensor]:
        """Means over the layers of what they reported, float32 scalars.

        Losses are without their coefficients; "largest_expert_load" is the busiest expert's number of tokens relative
        to an even share, "dropped_fraction" the part of all routes that capacity cut off."""
        names = {name for values in self.layers.values() for name in values}
        reports = {name: [values[name] for values in self.layers.values() if name in values] for name in sorted(names)}
        return {name: torch.stack(values).mean() for name, values in reports.items()}


def balanced(
    routing: Routing,
    router: RouterConfig,
    config: BalanceConfig,
    balance: Balance,
    *,
    layer: nn.Module,
    batch_size: int,
    reduce: Reduce,
    share: float = 1.0,
) -> Routing:
    """`routing` of `[batch_size * seq]` tokens whose weights carry the gradient of the auxiliary losses.

    `reduce` adds a tensor of sums up over the processes that hold the other tokens of the same sequences; its backward
    passes the gradient on unchanged. `share` is the part of the gradient that this process contributes."""
    counted = None if balance.counted is None else balance.counted.flatten()
    sums = reduce(token_sums(routing, router, config, batch_size, counted))
    losses = auxiliary_losses(sums, router, config)
    balance.report(layer, {name: loss.detach() for name, loss in losses.items()} | _load(routing, sums, router, reduce))
    total = torch.stack([getattr(config, COEFFICIENTS[name]) * loss for name, loss in losses.items()]).sum()
    own = total if share == 1.0 else total * share
    return replace(routing, weights=_Attach.apply(routing.weights, own, balance.scale))


def token_sums(
    routing: Routing, router: RouterConfig, config: BalanceConfig, batch_size: int, counted: Tensor | None = None
) -> Tensor:
    """Sums over the tokens of each sequence, of all that the losses need: float32 `[batch, columns]` (`Sums`).

    `counted` bool `[tokens]`: False leaves a token out."""
    columns = [_visits(routing.experts, router.num_experts), probabilities(routing.logits, router)]
    if config.communication:
        devices = routing.experts // (router.num_experts // config.num_devices)
        columns.append(_visits(devices, config.num_devices).clamp(max=1))
    columns.append(torch.logsumexp(routing.logits, -1, keepdim=True).square())
    columns.append(torch.ones_like(columns[-1]))
    per_token = torch.cat(columns, -1)
    if counted is not None:
        per_token = per_token * counted[:, None]
    return per_token.unflatten(0, (batch_size, -1)).sum(1)


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over the tokens of each of `[sets]` (sequences, or one micro-batch), as `token_sums` puts them in a row."""

    visits: Tensor  # [sets, experts]: how many tokens chose the expert
    probability: Tensor  # [sets, experts]: what the router gave it, normalised over experts
    device_visits: Tensor  # [sets, devices]: how many tokens chose at least one expert of the device
    squared_logsumexp: Tensor  # [sets, 1]
    tokens: Tensor  # [sets, 1]

    @staticmethod
    def of(sums: Tensor, router: RouterConfig, config: BalanceConfig) -> "Sums":
        devices = config.num_devices if config.communication else 0
        return Sums(*sums.split([router.num_experts, router.num_experts, devices, 1, 1], -1))


def auxiliary_losses(sums: Tensor, router: RouterConfig, config: BalanceConfig) -> dict[str, Tensor]:
    """The losses of `config`, without their coefficients, by the name they are logged under.

    Expert level: sum over experts of f P, with f the visits relative to an even share and P the mean probability: one
    if balanced, whatever the sizes (Switch, arXiv 2101.03961; Megatron divides visits by top-k alike). Device and
    communication level: DeepSeek-V2 (arXiv 2405.04434, section 2.2.3). z-loss: ST-MoE (arXiv 2202.08906)."""
    total = Sums.of(sums.sum(0, keepdim=True), router, config)
    s = Sums.of(sums, router, config) if config.per_sequence else total
    tokens = s.tokens.clamp(min=1)  # a sequence of padding alone has no loss
    load = s.visits * (router.num_experts / router.top_k) / tokens
    probability = s.probability / tokens
    losses = {"load_balancing_loss": (load * probability).sum(-1).mean()}
    of_device = probability.unflatten(-1, (config.num_devices, -1)).sum(-1)
    if config.device:
        device_load = load.unflatten(-1, (config.num_devices, -1)).mean(-1)
        losses["device_balancing_loss"] = (device_load * of_device).sum(-1).mean()
    if config.communication:
        received = s.device_visits * (config.num_devices / config.top_devices) / tokens
        losses["communication_balancing_loss"] = (received * of_device).sum(-1).mean()
    if config.z:
        losses["z_loss"] = (total.squared_logsumexp / total.tokens.clamp(min=1)).sum()
    return losses


def probabilities(logits: Tensor, router: RouterConfig) -> Tensor:
    """What the router gives each of all experts, `[tokens, num_experts]`, rows summing to one."""
    if router.score == "softmax":
        return logits.softmax(-1)
    scores = logits.sigmoid()
    return scores / (scores.sum(-1, keepdim=True) + TINY)


def _visits(chosen: Tensor, size: int) -> Tensor:
    """How often each token chose each of `size` things, float32 `[tokens, size]`."""
    visits = torch.zeros(chosen.shape[0], size, device=chosen.device)
    return visits.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=visits.dtype))


def _load(routing: Routing, sums: Tensor, router: RouterConfig, reduce: Reduce) -> dict[str, Tensor]:
    visits = sums.detach()[:, : router.num_experts].sum(0)
    load = {"largest_expert_load": visits.max() / visits.mean().clamp(min=1 / router.num_experts)}
    if routing.kept is not None:
        kept = routing.kept.float()
        kept, routes = reduce(torch.stack([kept.sum(), torch.ones_like(kept).sum()]))
        load["dropped_fraction"] = 1 - kept / routes
    return load


class _Attach(Function):
    """The weights as they are; in the backward the auxiliary loss gets `scale` for its gradient.

    The gradient enters where the layer is, not at the loss: that needs no loss on this pipeline stage, and no tensor
    that outlives a recomputed layer."""

    @staticmethod
    def forward(ctx, weights: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        ctx.scale = scale  # not saved for the backward, which would forbid to fill it in between
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, ctx.scale.to(grad.device), None
