"""Mixtral (Jiang et al. 2024): LLaMA's form with eight experts in place of each MLP; each token is routed to two.

The two are weighted by the softmax of their logits. Each expert has its own matrices, `w1` (gate), `w3` (up) and `w2`
(down)."""

from cordee.families import common
from cordee.families.experts import expert_keys, expert_list_weights, read_balance, read_choice
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import LayerConfig, ModelConfig, MoEConfig, RouterConfig
from cordee.tensors.rules import Rule


def read(hf: ConfigReader) -> ModelConfig:
    heads = common.read_heads(hf, groups=8)
    rope = read_rope(hf, heads["head_dim"], theta=1e6)
    attention = common.read_attention(hf, heads, rope=rope, window=hf.integer("sliding_window", None))
    router = RouterConfig(**read_choice(hf, "num_local_experts"), normalise=True)
    moe = MoEConfig(router=router, expert=common.read_swiglu(hf), balance=read_balance(hf))
    return common.read_model(hf, common.read_layers(hf, attention, mlp=moe))


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [*common.layer_weights(layer), *expert_list_weights(layer, "block_sparse_moe", "w1", "w3", "w2")]


FAMILY = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM", "MixtralModel", "MixtralForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    ignored=common.FREQUENCIES,
    keys=keys(sliding_window="sliding_window", **expert_keys("num_local_experts")),
)
