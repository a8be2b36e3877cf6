"""Baichuan and Baichuan 2.

Like LLaMA, but with q, k and v in one tensor. The larger models have no positions but scores that fall with distance,
and Baichuan 2 compares hidden states with the rows of its head scaled to length one (Baichuan 2023).

No key of the published files says so, but others tell: rotary models have `max_position_embeddings`, the rest only
`model_max_length`; for Baichuan 2 see `is_second`."""

from cordee.families import common
from cordee.families.family import Family, keys
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig
from cordee.tensors.rules import Rule, module, packed_qkv

FIRST_VOCAB, SECOND_VOCAB = 64000, 125696


def read(hf: ConfigReader) -> ModelConfig:
    heads = common.read_plain_heads(hf, grouped=False)
    rotary = hf.value("max_position_embeddings", None) is not None
    length = hf.integer("model_max_length", None) or hf.integer("max_position_embeddings")
    attention = AttentionConfig(**heads, rope=read_rope(hf, heads["head_dim"]) if rotary else None, alibi=not rotary)
    layers = common.read_layers(hf, attention)
    return common.read_model(hf, layers, max_position_embeddings=length, norm_head=is_second(hf))


def is_second(hf: ConfigReader) -> bool:
    """Whether a file is one of Baichuan 2: by a key that only it has, else by its vocabulary, else by its tokenizer."""
    if "z_loss_weight" in hf.hf:
        return True
    if (vocab := hf.hf.get("vocab_size")) in (FIRST_VOCAB, SECOND_VOCAB):
        return vocab == SECOND_VOCAB
    return hf.hf.get("tokenizer_class") == "BaichuanTokenizer"


def layer_weights(layer: LayerConfig) -> list[Rule]:
    qkv = module("attention.qkv", "self_attn.W_pack", op=common.qkv_op(layer, packed_qkv))
    return common.layer_weights(layer, [*qkv, *module("attention.out", "self_attn.o_proj")])


FAMILY = Family(
    name="baichuan",
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM", "BaichuanModel"),
    read=read,
    layer_weights=layer_weights,
    ignored=common.FREQUENCIES,
    keys=keys(
        "head_dim num_key_value_heads rope_theta",
        max_position_embeddings=lambda words: (
            words["max_position_embeddings"] if words["position_embedding_type"] == "rope" else None
        ),
        model_max_length="max_position_embeddings",
        tokenizer_class=lambda words: "BaichuanTokenizer" if words["lm_norm_weight"] else None,
        z_loss_weight=lambda words: 0 if words["lm_norm_weight"] else None,
    ),
)
