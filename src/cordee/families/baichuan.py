"""Baichuan and Baichuan 2.

Like LLaMA, but with q, k and v in one tensor. The larger models have no positions but scores that fall with distance,
and Baichuan 2 compares hidden states with the rows of its head scaled to length one (Baichuan 2023).

No key of the published files says so, but others tell: rotary models have `max_position_embeddings`, the rest only
`model_max_length`; for Baichuan 2 see `is_second`.
"""

from __future__ import annotations

from cordee.families import common
from cordee.families.family import Family, Preset
from cordee.families.reader import ConfigReader
from cordee.families.rope import read_rope
from cordee.families.rules import Rule, module, packed_qkv
from cordee.model.config import AttentionConfig, LayerConfig, ModelConfig

FIRST_VOCAB, SECOND_VOCAB = 64000, 125696


def read(hf: ConfigReader) -> ModelConfig:
    heads, norm = common.read_plain_heads(hf, grouped=False), common.read_norm(hf)
    rotary = hf.value("max_position_embeddings", None) is not None
    length = hf.integer("model_max_length", None) or hf.integer("max_position_embeddings")
    rope = read_rope(hf, heads["head_dim"]) if rotary else None
    attention = AttentionConfig(**heads, rope=rope, alibi=not rotary)
    layer = LayerConfig(attention=attention, mlp=common.read_swiglu(hf), norm=norm)
    layers = [layer] * hf.integer("num_hidden_layers")
    return common.read_model(hf, layers, norm, max_position_embeddings=length, norm_head=is_second(hf))


def is_second(hf: ConfigReader) -> bool:
    """Whether a file is one of Baichuan 2: by a key that only it has, else by its vocabulary, else by its tokenizer."""
    if "z_loss_weight" in hf.hf:
        return True
    if (vocab := hf.hf.get("vocab_size")) in (FIRST_VOCAB, SECOND_VOCAB):
        return vocab == SECOND_VOCAB
    return hf.hf.get("tokenizer_class") == "BaichuanTokenizer"


def weights(config: ModelConfig) -> list[Rule]:
    return common.model_weights(config, layer_weights)


def layer_weights(layer: LayerConfig) -> list[Rule]:
    return [
        *module("attention_norm", "input_layernorm"),
        *module("attention.qkv", "self_attn.W_pack", op=common.qkv_op(layer, packed_qkv)),
        *module("attention.out", "self_attn.o_proj"),
        *module("mlp_norm", "post_attention_layernorm"),
        *common.mlp_weights(),
    ]


def _preset(licence: str, layers: int, hidden: int, ffn: int, heads: int, **more: object) -> Preset:
    config = {
        "vocab_size": FIRST_VOCAB,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    }
    return Preset(config={**config, **more}, licence=licence)


_ROTARY, _FALLING = {"max_position_embeddings": 4096}, {"model_max_length": 4096}
_SECOND = {
    "vocab_size": SECOND_VOCAB,
    "tokenizer_class": "BaichuanTokenizer",
    "model_max_length": 4096,
    "z_loss_weight": 0,
}

FAMILY = Family(
    name="baichuan",
    architectures=("BaichuanForCausalLM", "BaiChuanForCausalLM", "BaichuanModel"),
    model_types=("baichuan",),
    read=read,
    weights=weights,
    base_prefix="model.",
    ignored=common.FREQUENCIES,
    keys={
        **{name: key for name, key in common.MULTI_HEAD_KEYS.items() if name != "rotary_base"},
        "max_position_embeddings": "model_max_length",
    },
    presets={
        "baichuan-7b": _preset("Baichuan-7B Model License", 32, 4096, 11008, 32, **_ROTARY),
        "baichuan-13b": _preset("Baichuan-13B Community License", 40, 5120, 13696, 40, **_FALLING),
        "baichuan2-7b": _preset("Baichuan 2 Community License", 32, 4096, 11008, 32, **_ROTARY, **_SECOND),
        "baichuan2-13b": _preset("Baichuan 2 Community License", 40, 5120, 13696, 40, **_SECOND),
    },
)
