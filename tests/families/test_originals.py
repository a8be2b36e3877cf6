"""Families that transformers does not have against their architectures in plain torch."""

from __future__ import annotations

import pytest

from tests.families import oracle, original_mixtures
from tests.families.originals import ORIGINALS, original_oracle

BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
}
ROTARY, FALLING = {"max_position_embeddings": 64}, {"model_max_length": 64}
SECOND = {"z_loss_weight": 0, "model_max_length": 64}
CHATGLM = {
    "architectures": ["ChatGLMModel"],
    "model_type": "chatglm",
    "padded_vocab_size": 61,
    "hidden_size": 32,
    "ffn_hidden_size": 40,
    "num_layers": 3,
    "num_attention_heads": 6,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "kv_channels": 8,
    "seq_length": 64,
    "layernorm_epsilon": 1e-3,
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
}
MINICPM = {
    "architectures": ["MiniCPMForCausalLM"],
    "model_type": "minicpm",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "tie_word_embeddings": True,
}

AQUILA = {
    "architectures": ["AquilaForCausalLM"],
    "model_type": "aquila",
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "max_position_embeddings": 8,  # the texts are longer
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": False,
}
INTERNLM = {**AQUILA, "architectures": ["InternLMForCausalLM"], "model_type": "internlm", "bias": True}
GROWING = {"rotary": {"base": 1000, "type": "dynamic", "scaling_factor": 3.0}}
INTERNLM2 = {
    **AQUILA,
    "architectures": ["InternLM2ForCausalLM"],
    "model_type": "internlm2",
    "num_key_value_heads": 2,
    "rope_theta": 1000000,
    "bias": False,
}
QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "vocab_size": 61,
    "hidden_size": 40,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "kv_channels": 10,
    "seq_length": 4,
    "max_position_embeddings": 64,
    "layer_norm_epsilon": 1e-3,
    "rotary_emb_base": 10000,
    "no_bias": True,
    "use_dynamic_ntk": False,
    "use_logn_attn": False,
    "tie_word_embeddings": False,
}

MODELS = {
    "aquila": ("aquila", AQUILA),
    "aquila grouped, growing": (
        "aquila",
        {**AQUILA, "num_key_value_heads": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "internlm": ("aquila", {**INTERNLM, "rotary": {"base": 1000, "type": "origin"}}),
    "internlm growing": ("aquila", {**INTERNLM, **GROWING}),
    "internlm without biases": ("aquila", {**INTERNLM, **GROWING, "bias": False}),
    "internlm2": ("internlm2", INTERNLM2),
    "internlm2 biases, growing": (
        "internlm2",
        {**INTERNLM2, "bias": True, "num_key_value_heads": 1, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    ),
    "qwen": ("qwen", QWEN),
    "qwen growing": ("qwen", {**QWEN, "use_dynamic_ntk": True}),
    "qwen sharper": ("qwen", {**QWEN, "use_logn_attn": True}),
    "qwen both": ("qwen", {**QWEN, "seq_length": 7, "use_dynamic_ntk": True, "use_logn_attn": True}),
    "baichuan rotary": ("baichuan", {**BAICHUAN, **ROTARY, "architectures": ["BaiChuanForCausalLM"]}),
    "baichuan falling": ("baichuan", {**BAICHUAN, **FALLING}),
    "baichuan 2 rotary": ("baichuan", {**BAICHUAN, **ROTARY, **SECOND}),
    "baichuan 2 falling": ("baichuan", {**BAICHUAN, **SECOND, "num_attention_heads": 4}),
    "chatglm": ("chatglm", CHATGLM),
    "chatglm long": ("chatglm", {**CHATGLM, "rope_ratio": 500, "multi_query_group_num": 1, "kv_channels": 12}),
    "chatglm biases": ("chatglm", {**CHATGLM, "add_bias_linear": True}),
    "chatglm residual from norm": ("chatglm", {**CHATGLM, "apply_residual_connection_post_layernorm": True}),
    "minicpm": ("minicpm", MINICPM),
    "minicpm grouped, untied": ("minicpm", {**MINICPM, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "minicpm experts": ("minicpm", {**MINICPM, "num_experts": 5, "num_experts_per_tok": 2}),
    "minicpm experts, top 3": ("minicpm", {**MINICPM, "num_experts": 4, "num_experts_per_tok": 3, "scale_emb": 1}),
    **original_mixtures.MODELS,
}


@pytest.fixture(scope="module")
def oracles(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            kind, config = MODELS[name]
            original = (ORIGINALS | original_mixtures.ORIGINALS)[kind]
            made[name] = original_oracle(original, tmp_path_factory.mktemp("model"), config)
        return made[name]

    return make


@pytest.mark.parametrize("name", MODELS)
def test_mathematics(oracles, name):
    oracle.check_mathematics(oracles(name))


@pytest.mark.parametrize("name", MODELS)
def test_cache(oracles, name):
    oracle.check_cache(oracles(name))


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(oracles, name, tmp_path):
    oracle.check_round_trip(oracles(name), tmp_path / "out")
