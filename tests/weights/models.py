"""Tiny models of many families, small enough to be split over 4 tensor ranks and 3 stages."""

from __future__ import annotations

from cordee.families.registry import families

_COMMON = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def _hf(architecture: str, model_type: str, **more: object) -> dict[str, object]:
    return {"architectures": [architecture], "model_type": model_type, **_COMMON, **more}


_DEEPSEEK = {
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 2,
    "scoring_func": "softmax",
}
_V2 = {"topk_method": "greedy", **_DEEPSEEK}
_V3 = {
    **_DEEPSEEK,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "n_group": 2,
    "topk_group": 2,
    "q_lora_rank": 16,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}

DENSE = {
    "llama": _hf("LlamaForCausalLM", "llama", attention_bias=True),
    "llama tied": _hf("LlamaForCausalLM", "llama", tie_word_embeddings=True),
    "qwen2": _hf("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _hf("Qwen3ForCausalLM", "qwen3", head_dim=8),
    "gemma2": _hf("Gemma2ForCausalLM", "gemma2", head_dim=8, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True),
    "internlm2": _hf("InternLM2ForCausalLM", "internlm2"),
    "chatglm": {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "padded_vocab_size": 61,
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "num_layers": 6,
        "num_attention_heads": 8,
        "multi_query_attention": True,
        "multi_query_group_num": 4,
        "kv_channels": 8,
        "seq_length": 32,
        "layernorm_epsilon": 1e-5,
        "add_qkv_bias": True,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 61,
        "n_embd": 32,
        "n_head": 8,
        "n_layer": 6,
        "n_positions": 32,
        "layer_norm_epsilon": 1e-5,
    },
    "bloom": {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "vocab_size": 61,
        "hidden_size": 32,
        "n_layer": 6,
        "n_head": 8,
        "layer_norm_epsilon": 1e-5,
    },
}
SPARSE = {
    "mixtral": _hf("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": _hf(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=16,
    ),
    "deepseek_v2": _hf("DeepseekV2ForCausalLM", "deepseek_v2", q_lora_rank=16, **_V2),
    "deepseek_v2 lite": _hf("DeepseekV2ForCausalLM", "deepseek_v2", q_lora_rank=None, **_V2),
    "deepseek_v3": _hf("DeepseekV3ForCausalLM", "deepseek_v3", **_V3),
}
MODELS = {**DENSE, **SPARSE}

# A size for every key that says one, so that a preset of any family becomes tiny.
_SMALL = {
    "vocab_size": 61,
    "padded_vocab_size": 61,
    "hidden_size": 64,
    "n_embd": 64,
    "n_embed": 64,
    "intermediate_size": 24,
    "ffn_hidden_size": 24,
    "n_inner": 24,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_layers": 4,
    "num_attention_heads": 8,
    "n_head": 8,
    "num_key_value_heads": 4,
    "multi_query_group_num": 4,
    "head_dim": 8,
    "kv_channels": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 32,
    "n_positions": 32,
    "seq_length": 32,
    "sliding_window": 8,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 24,
    "first_k_dense_replace": 2,
    "dim_model_base": 16,
}


def tiny_preset(family: str) -> dict[str, object]:
    """The first preset of a family, shrunk."""
    found = families()[family]
    config = next(iter(found.presets.values())).config
    small = {key: size for key, size in _SMALL.items() if config.get(key)}
    if config.get("num_key_value_heads") == config.get("num_attention_heads"):
        small["num_key_value_heads"] = 8
    return found.skeleton({**config, **{key: size for key, size in small.items() if key in config}})
