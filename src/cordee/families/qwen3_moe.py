"""Qwen3-MoE (Qwen team 2025, arXiv 2505.09388): 128 small experts, none shared.

Softmax over all experts, the chosen weights normalised. Norms of queries and keys over each head, no biases."""

from dataclasses import replace

from cordee.families import common, experts
from cordee.families.family import Family, keys
from cordee.families.qwen3 import read_attention
from cordee.families.reader import ConfigReader
from cordee.model.config import LayerConfig, ModelConfig, MoEConfig, RouterConfig
from cordee.tensors.rules import Rule, module


def read(hf: ConfigReader) -> ModelConfig:
    choice = experts.read_choice(hf, hf.alias("num_experts", "num_local_experts"))
    moe = MoEConfig(
        router=RouterConfig(**choice, normalise=hf.flag("norm_topk_prob", False)),
        expert=common.read_swiglu(hf, key="moe_intermediate_size"),
        balance=experts.read_balance(hf),
    )
    attention, norm, dense = read_attention(hf, groups=4), common.read_norm(hf), common.read_swiglu(hf)
    attention = replace(attention, window=read_window(hf))
    sparse = experts.read_sparse_layers(hf)
    layers = [LayerConfig(attention=attention, mlp=moe if s else dense, norm=norm) for s in sparse]
    return common.read_model(hf, layers, norm)


def read_window(hf: ConfigReader) -> int | None:
    """The window of all layers; other than in the dense models, `max_window_layers` means nothing."""
    for key in ("sliding_window", "max_window_layers"):  # given in most files all the same
        hf.value(key, None)
    return hf.integer("sliding_window", 4096) if hf.flag("use_sliding_window", False) else None


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer),
        *module("mlp.router", "mlp.gate"),
        *experts.expert_list_weights(layer, "mlp.experts.{e}.", "gate_proj", "up_proj", "down_proj"),
    ]


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    keys=keys("intermediate_size", **experts.expert_keys("num_experts"), **experts.NARROW_EXPERTS),
)
