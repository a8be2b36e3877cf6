"""What MoE families share: keys of `config.json` and the layouts of experts in checkpoints.

Owns small functions, each for one part of an MoE layer, which families compose. Knows no family."""

from dataclasses import replace
from typing import TypedDict

from cordee.families.reader import ConfigReader
from cordee.model.config import BalanceConfig, LayerConfig, MoEConfig
from cordee.tensors.rules import Rule, module, stack
from cordee.tensors.views import Chain, Each, Rearrange


class Choice(TypedDict):
    """The fields of `RouterConfig` for the number of experts and the top-k of a token."""

    num_experts: int
    top_k: int


def read_choice(hf: ConfigReader, experts_key: str, top_k_key: str = "num_experts_per_tok") -> Choice:
    """Two counts under these keys, the second of which cannot be larger."""
    experts, top_k = hf.integer(experts_key), hf.integer(top_k_key)
    if top_k > experts:
        hf.problem(top_k_key, f"there are only {experts_key} = {experts}", f"correct {experts_key} or {top_k_key}")
    return Choice(num_experts=experts, top_k=min(top_k, experts))


def read_balance(hf: ConfigReader, default: float = 0.001) -> BalanceConfig:
    """The coefficient of each layer's load-balancing auxiliary loss, which is 1 for even load, as in Megatron.

    transformers' loss is top-k times as large, a mean over layers, and off unless router logits are returned."""
    return BalanceConfig(expert=hf.number("router_aux_loss_coef", default))


def read_sparse_layers(hf: ConfigReader) -> list[bool]:
    """Which layers of Qwen's MoE models have experts: every `decoder_sparse_step`-th, except `mlp_only_layers`."""
    step, dense = hf.integer("decoder_sparse_step", 1), read_layer_numbers(hf, "mlp_only_layers", [])
    return [(i + 1) % step == 0 and i not in dense for i in range(hf.integer("num_hidden_layers"))]


def read_layer_numbers(hf: ConfigReader, key: str, default: list[int]) -> list[int]:
    """A list of layer numbers, from 0."""
    count = hf.integer("num_hidden_layers")
    numbers = hf.value(key, default)
    if isinstance(numbers, list) and all(number in range(count) for number in numbers):
        return numbers
    hf.problem(key, f"not a list of layer numbers from 0 to {count - 1}", "correct it")
    return default


def expert_keys(key: str) -> dict[str, str]:
    """The usual keys of an MoE model; `key` is that of the number of experts."""
    return {key: "num_experts", "num_experts_per_tok": "moe_router_topk", "router_aux_loss_coef": "moe_aux_loss_coeff"}


# Keys where experts have their own FFN hidden size, and router weights may be normalised.
NARROW_EXPERTS = {"moe_intermediate_size": "moe_intermediate_size", "norm_topk_prob": "norm_topk_prob"}


def with_experts(layers: list[LayerConfig], moe: MoEConfig, sparse: list[bool]) -> list[LayerConfig]:
    """`layers` with the experts `moe` in place of the MLP where they are `sparse`."""
    return [replace(layer, mlp=moe) if has else layer for layer, has in zip(layers, sparse, strict=True)]


def expert_list_weights(layer: LayerConfig, block: str, gate: str | None, up: str, down: str) -> list[Rule]:
    """Rules of experts with matrices of their own, `{block}.experts.{number}.{gate, up or down}`, and of the router,
    `{block}.gate`.

    `gate` None: experts are not gated. A layer without experts has no rules."""
    if not isinstance(layer.mlp, MoEConfig):
        return []
    experts = [f"{block}.experts.{e}." for e in range(layer.mlp.router.num_experts)]
    together = stack(len(experts))
    rules = [
        *module("mlp.router", f"{block}.gate"),
        *module("mlp.experts.down", *(e + down for e in experts), op=together),
    ]
    if gate is None:
        return [*module("mlp.experts.up", *(e + up for e in experts), op=together), *rules]
    pairs = Chain((Each((stack(2),) * len(experts)), together))
    return [*module("mlp.experts.gate_up", *(e + name for e in experts for name in (gate, up)), op=pairs), *rules]


def expert_stack_weights(prefix: str, branches: str) -> list[Rule]:
    """Rules of gated experts stored as stacks `[expert, in, out]`.

    `branches` is "two f" where gates precede ups, "f two" where they alternate."""
    gate_up, two = f"{prefix}.gate_up_proj", {"two": 2}
    return [
        Rule("mlp.experts.gate_up.weight", (gate_up,), Rearrange(f"e h ({branches}) -> e two f h", two)),
        Rule("mlp.experts.gate_up.bias", (f"{gate_up}_bias",), Rearrange(f"e ({branches}) -> e two f", two)),
        Rule("mlp.experts.down.weight", (f"{prefix}.down_proj",), Rearrange("e f h -> e h f")),
        Rule("mlp.experts.down.bias", (f"{prefix}.down_proj_bias",)),
    ]
