"""How the experts of a model are trained: losses that balance them, and a capacity beyond which tokens are dropped.

Owns what these options mean for a model, whatever its family, and when they mean nothing. They change no shape and no
file of weights, so that a checkpoint does not hold them: like a learning rate they are given with every run."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from cordee.config.option import to_flag
from cordee.errors import Problem, Problems, raise_all
from cordee.families.registry import ModelSpec
from cordee.model.config import BalanceConfig, CapacityConfig, ModelConfig, MoEConfig
from cordee.model.options import ExpertTrainingOptions
from cordee.train.options import TrainConfig

_OF_CAPACITY = ("moe_token_drop_policy", "moe_pad_expert_input_to_capacity")
_OF_GROUPS = ("moe_device_level_aux_loss_coeff", "moe_comm_aux_loss_coeff")
_KIND = "moe_router_load_balancing_type"
_IGNORED_BY = {  # what MindSpeed-LLM's routers of these types do not look at; the loss of logits (z) they all have
    "softmax_topk": ("moe_aux_loss_coeff", "seq_aux", *_OF_GROUPS),
    "aux_loss": ("seq_aux",),
}


def with_training(spec: ModelSpec, options: TrainConfig) -> ModelSpec:
    """The model with its experts trained as `options` say, but for those that `ignored` reports.

    ProblemError for others that would have no effect."""
    options = replace(options, **dict.fromkeys(_ignored(options)))
    raise_all(_problems(spec.config, options))

    def trained(moe: MoEConfig) -> MoEConfig:
        return replace(moe, balance=_balance(moe, options), capacity=_capacity(moe.capacity, options))

    layers = (replace(x, mlp=trained(x.mlp)) if isinstance(x.mlp, MoEConfig) else x for x in spec.config.layers)
    return replace(spec, config=replace(spec.config, layers=tuple(layers)))


def ignored(spec: ModelSpec, options: TrainConfig) -> Iterator[str]:
    """Notes on options of experts that are ignored: softmax_topk has no auxiliary loss."""
    kind = _kind(options)
    if names := [to_flag(name) for name in _ignored(options) if getattr(options, name)]:
        yield f"ignored: {', '.join(names)} ({to_flag(_KIND)} is {kind})"
    balances = {layer.mlp.balance for layer in spec.config.layers if isinstance(layer.mlp, MoEConfig)}
    if kind == "softmax_topk" and any(_has_loss(balance) for balance in balances):
        yield f"ignored: the auxiliary loss of the model's own configuration ({to_flag(_KIND)} is {kind})"


def _kind(options: TrainConfig) -> str | None:
    """How the router balances, as far as options say: Megatron's default goes with --num-experts."""
    return options.moe_router_load_balancing_type or (None if options.num_experts is None else "aux_loss")


def _ignored(options: TrainConfig) -> tuple[str, ...]:
    return _IGNORED_BY.get(_kind(options) or "", ())


def _has_loss(balance: BalanceConfig) -> bool:
    return bool(balance.expert or balance.device or balance.communication)


def check_resumed(options: TrainConfig, before: Mapping[str, Any]) -> Problems:
    """Options that a run had `before` and that are missing now that it resumes: it would train by another loss."""
    names = [field.name for field in fields(ExpertTrainingOptions)]
    if before.get(_KIND) == "softmax_topk" or before.get("seq_aux") is not None:  # it decided which loss there is
        names.append(_KIND)
    for name in names:
        if (value := before.get(name)) is not None and getattr(options, name) is None:
            why = f"the run was started with {to_flag(name)} {value}"
            yield Problem(to_flag(name), None, why, "give it again, or another value", "resume", limit=value)


def _balance(moe: MoEConfig, options: TrainConfig) -> BalanceConfig:
    given = {
        "expert": options.moe_aux_loss_coeff,
        "per_sequence": options.seq_aux,
        "device": options.moe_device_level_aux_loss_coeff,
        "communication": options.moe_comm_aux_loss_coeff,
        "z": options.moe_z_loss_coeff,
    }
    own = BalanceConfig(z=moe.balance.z) if _kind(options) == "softmax_topk" else moe.balance
    if own.num_devices == 1:  # groups are the model's, not those that ranks hold: any layout has the same loss
        given |= {"num_devices": moe.router.num_groups, "top_devices": moe.router.top_groups}
    return replace(own, **{name: value for name, value in given.items() if value is not None})


def _capacity(capacity: CapacityConfig | None, options: TrainConfig) -> CapacityConfig | None:
    factor = options.moe_expert_capacity_factor
    if factor is not None and factor < 0:
        return None
    if factor is None and capacity is None:
        return None
    given = {"factor": factor, "drop": options.moe_token_drop_policy, "pad": options.moe_pad_expert_input_to_capacity}
    before = capacity or CapacityConfig(factor=1.0)
    return replace(before, **{name: value for name, value in given.items() if value is not None})


def _problems(config: ModelConfig, options: TrainConfig) -> Problems:
    values = {field.name: getattr(options, field.name) for field in fields(ExpertTrainingOptions)}
    given = {name: value for name, value in values.items() if value is not None}

    def without_effect(names: Iterable[str], why: str, fix: str) -> Problems:
        return (Problem(to_flag(name), given[name], why, fix, "requires") for name in names if name in given)

    moe = next((layer.mlp for layer in config.layers if isinstance(layer.mlp, MoEConfig)), None)
    if moe is None:
        yield from without_effect(given, "the model has no experts", "leave it out, or take a model with experts")
        return
    balance = _balance(moe, options)
    if not _has_loss(balance):
        fix = "add --moe-aux-loss-coeff, or leave it out"
        yield from without_effect(("seq_aux",), "the model has no auxiliary loss", fix)
    if options.moe_expert_capacity_factor == 0:
        why, fix = "experts with capacity 0 drop every token", "give 1 or more; below 0 drops none"
        yield Problem("--moe-expert-capacity-factor", 0.0, why, fix)
    if _capacity(moe.capacity, options) is None:
        fix = "add --moe-expert-capacity-factor, or leave it out"
        yield from without_effect(_OF_CAPACITY, "experts have no capacity limit", fix)
    if balance.num_devices == 1:
        fix = "leave it out, or take a model that chooses experts by groups"
        yield from without_effect(_OF_GROUPS, "the model has no groups of experts", fix)
