"""Phi-3, Phi-3.5 and Phi-4: LLaMA's form with all of q, k, v in one matrix and gate and up in another.

Some have a window, some rotate only part of a head, and the long ones scale positions by LongRoPE (Abdin et al. 2024).
"""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig
from cordee.tensors.rules import GATE_UP, Rule, module, packed_qkv


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_heads(hf), common.read_norm(hf)
    rope = read_rope(hf, heads["head_dim"], partial=1.0)
    attention = AttentionConfig(**heads, rope=rope, window=common.read_window(hf))
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    embedding_dropout, hidden_dropout = hf.probability("embd_pdrop", 0.0), hf.probability("resid_pdrop", 0.0)
    layers = [layer] * hf.integer("num_hidden_layers")
    return common.read_model(hf, layers, norm, embedding_dropout=embedding_dropout, hidden_dropout=hidden_dropout)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "input_layernorm"),
        *module("attention.qkv", "self_attn.qkv_proj", op=common.qkv_op(layer, packed_qkv)),
        *module("attention.out", "self_attn.o_proj"),
        *module("mlp_norm", "post_attention_layernorm"),
        *module("mlp.gate_up", "mlp.gate_up_proj", op=GATE_UP),
        *module("mlp.down", "mlp.down_proj"),
    ]


FAMILY = Family(
    name="phi3",
    architectures=("Phi3ForCausalLM", "Phi3Model", "Phi3ForSequenceClassification"),
    read=read,
    layer_weights=layer_weights,
    keys=keys(partial_rotary_factor="rotary_percent", sliding_window="sliding_window"),
)
