"""Mixtral (Jiang et al. 2024): LLaMA's form with eight experts in place of each MLP; each token is routed to two.

The two are weighted by the softmax of their logits. Each expert has its own matrices, `w1` (gate), `w3` (up) and `w2`
(down)."""

from cordee.families import common
from cordee.families.experts import expert_keys, expert_list_weights, read_balance, read_choice
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig, MoEConfig, RouterConfig
from cordee.tensors.rules import Rule, module


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf, groups=8), common.read_norm(hf)
    rope = read_rope(hf, heads["head_dim"], theta=1e6)
    attention = AttentionConfig(**heads, rope=rope, window=hf.integer("sliding_window", None))
    router = RouterConfig(**read_choice(hf, "num_local_experts"), normalise=True)
    moe = MoEConfig(router=router, expert=common.read_swiglu(hf), balance=read_balance(hf))
    layer = LayerConfig(attention=attention, mlp=moe, norm=norm)
    return common.read_model(hf, [layer] * hf.integer("num_hidden_layers"), norm)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *common.layer_weights(layer),
        *module("mlp.router", "block_sparse_moe.gate"),
        *expert_list_weights(layer, "block_sparse_moe.experts.{e}.", "w1", "w3", "w2"),
    ]


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM", "MixtralModel", "MixtralForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    ignored=common.FREQUENCIES,
    keys=keys(sliding_window="sliding_window", **expert_keys("num_local_experts")),
)
