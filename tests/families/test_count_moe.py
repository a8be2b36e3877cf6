"""Sizes of published mixtures of experts, and of those that only scripts describe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cordee.families.catalogue import show
from cordee.families.count import canonical_shapes, count_parameters, matmul_parameters
from cordee.families.registry import spec_from_preset

# Exact numbers of parameters of the published checkpoints.
PUBLISHED = {
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "deepseek-v2-lite": 15_706_484_224,
    "deepseek-v2": 235_741_434_880,
    "deepseek-v3": 671_026_419_200,  # without the layer that predicts a second token
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "llama4-scout": 107_769_861_120,  # of the language model
    "llama4-maverick": 400_711_848_960,
}

# Billions of parameters that a token meets, as published: with the embedding, and without it, where it is looked up.
ACTIVE = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39,
    "qwen1.5-moe-a2.7b": 2.7,
    "qwen2-57b-a14b": 14,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22,
    "llama4-scout": 17,
    "llama4-maverick": 17,
}
ACTIVE_WITHOUT_EMBEDDING = {
    "deepseek-v2-lite": 2.4,
    "deepseek-v2": 21,
    "deepseek-v3": 37,
    "gpt-oss-20b": 3.6,
    "gpt-oss-120b": 5.1,
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameters_of_published_models(preset):
    assert count_parameters(spec_from_preset(preset).config) == PUBLISHED[preset]


@pytest.mark.parametrize("preset", ACTIVE | ACTIVE_WITHOUT_EMBEDDING)
def test_parameters_that_a_token_meets(preset):
    config = spec_from_preset(preset).config
    embedding = config.vocab_size * config.hidden_size if preset in ACTIVE else 0
    billions = (matmul_parameters(config) + embedding) / 1e9
    assert billions == pytest.approx((ACTIVE | ACTIVE_WITHOUT_EMBEDDING)[preset], rel=0.025)  # published are rounded


@pytest.mark.parametrize(("preset", "layers", "embeddings"), [("grok-1", 64, 1), ("grok-1-8x5b", 12, 2)])
def test_grok_by_hand(preset, layers, embeddings):
    hidden, ffn, experts = 6144, 32768, 8
    attention = 2 * hidden * hidden + 2 * hidden * 1024
    layer = attention + experts * (3 * hidden * ffn + hidden) + 4 * hidden
    assert count_parameters(spec_from_preset(preset).config) == embeddings * 131072 * hidden + layers * layer + hidden


@pytest.mark.parametrize(("preset", "layers", "bias"), [("gpt4-4x13b", 10, 0), ("gpt4-4x16b", 8, 1)])
def test_mixtures_of_gpt_by_hand(preset, layers, bias):
    hidden = 12288
    expert = 8 * hidden * hidden + bias * 5 * hidden
    layer = 4 * hidden * hidden + bias * 4 * hidden + 4 * (expert + hidden) + 4 * hidden
    assert count_parameters(spec_from_preset(preset).config) == 50257 * hidden + layers * layer + 2 * hidden


def test_models_cut_from_deepseek_v2_differ_in_layers_alone():
    full = spec_from_preset("deepseek-v2").config
    layer = (count_parameters(full) - count_parameters(replace(full, layers=full.layers[:1]))) // 59
    for preset, count in (("deepseek-v2-60b", 16), ("deepseek-v2-100b", 24)):
        config = spec_from_preset(preset).config
        assert count_parameters(full) - count_parameters(config) == (60 - count) * layer


@pytest.mark.parametrize("preset", ["deepseek-v2-lite", "gpt-oss-20b", "llama4-maverick", "qwen1.5-moe-a2.7b"])
def test_canonical_shapes_are_those_of_the_model(preset):
    from cordee.model.gpt import GPTModel

    config = spec_from_preset(preset).config
    short = replace(config, layers=config.layers[:2])
    specs = GPTModel(short, device="meta").parameter_specs()
    assert {name: spec.shape for name, spec in specs.items()} == canonical_shapes(short)


def test_the_page_of_a_mixture_tells_of_its_experts():
    page = dict(show("deepseek-v3"))
    assert (page["q_lora_rank"], page["kv_lora_rank"], page["qk_rope_head_dim"]) == ("1536", "512", "64")
    names = ("layers with experts", "num_experts", "moe_router_topk", "moe_ffn_hidden_size")
    assert [page[name] for name in names] == ["58", "256", "8", "2048"]
    assert page["ffn_hidden_size of shared experts"] == "2048" and page["matmul weights a token meets"][:2] == "36"
    assert "num_experts" not in dict(show("llama2-7b"))
