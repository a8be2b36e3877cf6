"""InternLM2 and InternLM2.5: LLaMA's form with q, k and v of each group together in one matrix (Cai et al. 2024)."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.model.config import LayerConfig, ModelConfig
from cordee.tensors.rules import Rule, grouped_qkv, module, stack


def read(hf: ConfigReader) -> ModelConfig:
    attention = common.read_attention(hf, common.read_plain_heads(hf), hf.flag("bias", False))
    return common.read_model(hf, common.read_layers(hf, attention))


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "attention_norm"),
        *module("attention.qkv", "attention.wqkv", op=common.qkv_op(layer, grouped_qkv)),
        *module("attention.out", "attention.wo"),
        *module("mlp_norm", "ffn_norm"),
        *module("mlp.gate_up", "feed_forward.w1", "feed_forward.w3", op=stack(2)),
        *module("mlp.down", "feed_forward.w2"),
    ]


FAMILY = Family(
    name="internlm2",
    architectures=("InternLM2ForCausalLM", "InternLM2Model"),
    read=read,
    outer_weights=common.outer_weights("model.tok_embeddings", "model.norm", "output"),
    layer_weights=layer_weights,
    ignored=("model.layers.{i}.attention.rotary_emb.inv_freq",),
    keys=keys("head_dim"),
)
