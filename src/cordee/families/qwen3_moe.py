"""Qwen3-MoE (Qwen team 2025, arXiv 2505.09388): 128 small experts, none shared.

Softmax over all experts, the chosen weights normalised. Norms of queries and keys over each head, no biases."""

from dataclasses import replace

from cordee.families import common, experts
from cordee.families.family import Family, keys
from cordee.families.qwen3 import read_attention
from cordee.families.reader import ConfigReader
from cordee.model.config import LayerConfig, ModelConfig, MoEConfig, RouterConfig
from cordee.tensors.rules import Rule


def read(hf: ConfigReader) -> ModelConfig:
    choice = experts.read_choice(hf, hf.alias("num_experts", "num_local_experts"))
    moe = MoEConfig(
        router=RouterConfig(**choice, normalise=hf.flag("norm_topk_prob", False)),
        expert=common.read_swiglu(hf, key="moe_intermediate_size"),
        balance=experts.read_balance(hf),
    )
    layers = common.read_layers(hf, replace(read_attention(hf, groups=4), window=read_window(hf)))
    return common.read_model(hf, experts.with_experts(layers, moe, experts.read_sparse_layers(hf)))


def read_window(hf: ConfigReader) -> int | None:
    """The window of all layers; other than in the dense models, `max_window_layers` means nothing."""
    for key in ("sliding_window", "max_window_layers"):  # given in most files all the same
        hf.value(key, None)
    return hf.integer("sliding_window", 4096) if hf.flag("use_sliding_window", False) else None


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer),
        *experts.expert_list_weights(layer, "mlp", "gate_proj", "up_proj", "down_proj"),
    ]


FAMILY = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel", "Qwen3MoeForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    keys=keys("intermediate_size", **experts.expert_keys("num_experts"), **experts.NARROW_EXPERTS),
)
