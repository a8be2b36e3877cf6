"""Phi-3, Phi-3.5 and Phi-4: LLaMA's form with all of q, k, v in one matrix and gate and up in another.

Some have a window, some rotate only part of a head, and the long ones scale positions by LongRoPE (Abdin et al. 2024).
"""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import LayerConfig, ModelConfig
from cordee.tensors.rules import Rule, module, packed_qkv


def read(hf: ConfigReader) -> ModelConfig:
    heads = common.read_heads(hf)
    rope = read_rope(hf, heads["head_dim"], partial=1.0)
    attention = common.read_attention(hf, heads, rope=rope, window=common.read_window(hf))
    embedding_dropout, hidden_dropout = hf.probability("embd_pdrop", 0.0), hf.probability("resid_pdrop", 0.0)
    layers = common.read_layers(hf, attention)
    return common.read_model(hf, layers, embedding_dropout=embedding_dropout, hidden_dropout=hidden_dropout)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    qkv = module("attention.qkv", "self_attn.qkv_proj", op=common.qkv_op(layer, packed_qkv))
    attention = [*qkv, *module("attention.out", "self_attn.o_proj")]
    return common.layer_weights(layer, attention, common.packed_mlp_weights())


FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM", "Phi3Model", "Phi3ForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    keys=keys(partial_rotary_factor="rotary_percent", sliding_window="sliding_window"),
)
