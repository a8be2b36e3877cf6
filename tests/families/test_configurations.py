"""What the keys of a configuration mean, where a family has a way of its own to say it."""

from __future__ import annotations

import pytest

from cordee.errors import ProblemError
from cordee.families.registry import presets, spec_from_hf
from cordee.model.config import LinearScaling, RopeConfig


def read(preset, without=(), **changes):
    """The model of a preset with other values of some keys."""
    family = presets()[preset]
    hf = {key: value for key, value in family.presets[preset].config.items() if key not in without}
    return spec_from_hf(family.skeleton({**hf, **changes}), "c").config


@pytest.mark.parametrize(
    ("preset", "changes", "key"),
    [
        ("baichuan2-7b", {"z_loss_weight": 1e-4}, "z_loss_weight"),
        ("baichuan-13b", {"num_attention_heads": 33}, "num_attention_heads"),
        ("bloom-560m", {"n_head": 8}, "n_head"),
        ("bloom-560m", {"n_embed": 1000}, "num_attention_heads"),
        ("bloom-560m", {"n_inner": 1024}, "n_inner"),
        ("chatglm3-6b", {"multi_query_attention": False}, "multi_query_attention"),
        ("chatglm3-6b", {"multi_query_group_num": 3}, "multi_query_group_num"),
        ("chatglm3-6b", {"kv_channels": 90}, "kv_channels"),
        ("chatglm3-6b", {"rmsnorm": False}, "rmsnorm"),
        ("chatglm3-6b", {"post_layer_norm": False}, "post_layer_norm"),
        ("chatglm3-6b", {"pre_seq_len": 128}, "pre_seq_len"),
        ("chatglm3-6b", {"quantization_bit": 4}, "quantization_bit"),
        ("glm4-9b", {"num_hidden_layers": 39}, "num_hidden_layers"),
        ("glm4-9b-hf", {"hidden_act": "gelu"}, "hidden_act"),
        ("gemma-2b", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma-2b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-2b", {"sliding_window": 4096}, "sliding_window"),
        ("gemma2-2b", {"sliding_window_size": 2048}, "sliding_window_size"),
        ("gemma2-2b", {"layer_types": ["full_attention"]}, "layer_types"),
        ("gemma3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3-1b", {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        ("minicpm-2b", {"scale_depth": 0}, "scale_depth"),
        ("minicpm-moe-8x2b", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ("minicpm-moe-8x2b", {"num_experts": "eight"}, "num_experts"),
    ],
)
def test_what_a_family_cannot_compute_is_refused(preset, changes, key):
    with pytest.raises(ProblemError) as caught:
        read(preset, **changes)
    assert f"c: {key}" in {problem.option for problem in caught.value.problems}


@pytest.mark.parametrize(
    ("preset", "rotary", "second"),
    [
        ("baichuan-7b", True, False),
        ("baichuan-13b", False, False),
        ("baichuan2-7b", True, True),
        ("baichuan2-13b", False, True),
    ],
)
def test_which_baichuan_it_is(preset, rotary, second):
    # The key that only Baichuan 2 has is not in all files, and with another vocabulary its tokenizer is left to tell.
    smaller = {"vocab_size": 100} if second else {"vocab_size": 100, "tokenizer_class": "BaiChuanTokenizer"}
    for config in (
        read(preset),
        read(preset, without=["z_loss_weight"]),
        read(preset, without=["z_loss_weight", "tokenizer_class"]),
        read(preset, without=["z_loss_weight"], **smaller),
    ):
        attention = config.layers[0].attention
        assert (attention.rope is not None, attention.alibi, config.norm_head) == (rotary, not rotary, second)
        assert config.max_position_embeddings == 4096


def test_bloom_in_all_its_spellings():
    names = {"n_embed": "hidden_size", "num_attention_heads": "n_head", "n_layer": "num_hidden_layers"}
    config = presets()["bloom-560m"].presets["bloom-560m"].config
    respelt = {new: config[old] for old, new in names.items()}
    assert read("bloom-560m", without=names, **respelt) == read("bloom-560m") == read("bloom-560m", **respelt)


def test_positions_of_chatglm():
    attention = read("glm4-9b").layers[0].attention
    assert attention.rope == RopeConfig(theta=5e6, rotary_dim=64)
    assert read("chatglm3-6b").layers[0].attention.rope.theta == 1e4


def test_windows_of_gemma_alternate():
    assert [layer.attention.window for layer in read("gemma2-2b").layers[:4]] == [4096, None, 4096, None]
    layers = read("gemma3-4b").layers
    assert [i for i, layer in enumerate(layers) if layer.attention.window is None] == [5, 11, 17, 23, 29]
    near, far = layers[0].attention.rope, layers[5].attention.rope
    assert (near.theta, far.theta) == (1e4, 1e6)
    assert (near.scaling, far.scaling) == (None, LinearScaling(factor=8.0))


def test_layer_types_go_before_patterns():
    types = ["full_attention", "sliding_attention"] * 13
    layers = read("gemma3-1b", layer_types=types).layers
    assert [layer.attention.window for layer in layers[:2]] == [None, 512]
    assert [layer.attention.rope.theta for layer in layers[:2]] == [1e6, 1e4]


def test_caps_of_gemma_2():
    """A missing key has the value of the published models; null switches a cap off."""
    keys = ["attn_logit_softcapping", "final_logit_softcapping"]
    assert read("gemma2-9b", without=keys) == read("gemma2-9b")
    config = read("gemma2-9b", **dict.fromkeys(keys))
    assert config.logit_softcap is None and config.layers[0].attention.softcap is None
    assert read("gemma2-27b").layers[0].attention.scale == 144**-0.5


def test_scales_of_minicpm():
    config = read("minicpm-2b")
    assert (config.embedding_scale, config.logit_scale) == (12, 256 / 2304)
    assert config.layers[0].residual_scale == 1.4 / 40**0.5
    assert read("minicpm-2b", num_experts=0) == config
