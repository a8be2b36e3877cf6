"""Mixtures of experts of GPT's form: layer norms, rotary positions, experts with GELU and no gate, a tied head.

The shapes known as GPT4-4x13B and 4x16B, which published scripts train on sequences of 128K tokens; weights of them, or
a format for such, never were. So the format is our own: keys and names as Mixtral's, experts as `mlp.gate` and
`mlp.experts.{e}.{up,down}_proj`, and of keys besides

    layer_norm_eps, hidden_act        of layer norms; "gelu" or "gelu_new", its tanh form
    attention_bias, mlp_bias          whether attention, and the experts, have biases
    moe_expert_capacity_factor        null: every token reaches its experts; else, as Megatron has them,
    moe_token_drop_policy             "probs" or "position", and
    moe_pad_expert_input_to_capacity"""

from typing import Literal

from cordee.families import common
from cordee.families.experts import expert_keys, expert_list_weights, read_balance, read_choice
from cordee.families.family import Family, keys
from cordee.families.gpt2 import write_activation
from cordee.families.reader import ConfigReader
from cordee.model import config
from cordee.tensors.rules import Rule


def read(hf: ConfigReader) -> config.ModelConfig:
    heads, bias = common.read_heads(hf), hf.flag("attention_bias", True)
    norm = config.NormConfig(kind="layer", eps=hf.number("layer_norm_eps"))
    attention = common.read_attention(hf, heads, bias)
    expert = config.MLPConfig(
        ffn_hidden_size=hf.integer("intermediate_size"),
        activation=hf.choice("hidden_act", common.ACTIVATIONS, "gelu"),
        gated=False,
        bias=hf.flag("mlp_bias", True),
    )
    moe = config.MoEConfig(
        router=config.RouterConfig(**read_choice(hf, "num_local_experts"), score_when="after"),
        expert=expert,
        balance=read_balance(hf, 0.01),
        capacity=read_capacity(hf),
    )
    layers, tied = common.read_layers(hf, attention, mlp=moe, norm=norm), hf.flag("tie_word_embeddings", True)
    return common.read_model(hf, layers, tie_word_embeddings=tied)


DROP_POLICIES: dict[str, Literal["probs", "position"]] = {"probs": "probs", "position": "position"}


def read_capacity(hf: ConfigReader) -> config.CapacityConfig | None:
    factor = hf.positive("moe_expert_capacity_factor", None)
    drop = hf.choice("moe_token_drop_policy", DROP_POLICIES, "probs")
    pad = hf.flag("moe_pad_expert_input_to_capacity", False)
    return None if factor is None else config.CapacityConfig(factor=factor, drop=drop, pad=pad)


def layer_weights(layer: config.LayerConfig) -> list[Rule]:
    return [*common.layer_weights(layer), *expert_list_weights(layer, "mlp", None, "up_proj", "down_proj")]


FAMILY = Family(
    name="gpt_moe",
    architectures=("GPTMoEForCausalLM", "GPTMoEModel"),
    read=read,
    layer_weights=layer_weights,
    keys=keys(
        "rms_norm_eps",
        attention_bias="qkv_bias",
        hidden_act=write_activation,
        layer_norm_eps="norm_epsilon",
        mlp_bias="mlp_bias",
        moe_expert_capacity_factor="moe_expert_capacity_factor",
        **expert_keys("num_local_experts"),
    ),
)
