"""Qwen1.5-MoE and Qwen2-MoE (Qwen team 2024): many small experts, and a shared one behind a gate.

Softmax over all experts, the chosen weights not normalised. The shared expert's output is multiplied by a sigmoid of
its own. Biases on q, k and v."""

from cordee.families import common, experts
from cordee.families.family import Family, keys
from cordee.families.lenses import MODEL, at
from cordee.families.reader import ConfigReader
from cordee.model.config import LayerConfig, ModelConfig, MoEConfig, RouterConfig
from cordee.tensors.rules import Rule, module


def read(hf: ConfigReader) -> ModelConfig:
    heads, bias = common.read_heads(hf, groups=16), hf.flag("qkv_bias", True)
    attention = common.read_attention(hf, heads, qkv_bias=bias)
    moe = MoEConfig(
        router=RouterConfig(**experts.read_choice(hf, "num_experts"), normalise=hf.flag("norm_topk_prob", False)),
        expert=common.read_swiglu(hf, key="moe_intermediate_size"),
        shared=common.read_swiglu(hf, key="shared_expert_intermediate_size"),
        shared_gate=True,
        balance=experts.read_balance(hf),
    )
    layers = common.windowed(common.read_layers(hf, attention), read_windows(hf))
    return common.read_model(hf, experts.with_experts(layers, moe, experts.read_sparse_layers(hf)))


def read_windows(hf: ConfigReader) -> list[int | None]:
    """Where windows are used: in every other one of the first `max_window_layers` layers, as transformers has it."""
    if not hf.flag("use_sliding_window", False):
        for key in ("sliding_window", "max_window_layers"):  # given all the same
            hf.value(key, None)
        return common.read_windows(hf, None)
    first = hf.number("max_window_layers", 28)
    return common.read_windows(hf, hf.integer("sliding_window", 4096), lambda i: i % 2 == 0 and i < first)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer),
        *experts.expert_list_weights(layer, "mlp", "gate_proj", "up_proj", "down_proj"),
        *common.mlp_weights("mlp.shared", "mlp.shared_expert"),
        *module("mlp.shared_gate", "mlp.shared_expert_gate"),
    ]


FAMILY = Family(
    name="qwen2_moe",
    architectures=("Qwen2MoeForCausalLM", "Qwen2MoeModel", "Qwen2MoeForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    keys=keys(
        "intermediate_size",
        shared_expert_intermediate_size=lambda words: at("layers.mlp.shared.ffn_hidden_size").get(words[MODEL]),
        **experts.expert_keys("num_experts"),
        **experts.NARROW_EXPERTS,
    ),
)
