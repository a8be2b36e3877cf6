"""Random tiny configurations of mixtures of experts, as `random_models.py` has them of other models."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.families.random_models import LENGTH, Config, decoders, head_dim, heads, with_rope


@st.composite
def experts(draw, key: str = "num_experts") -> Config:
    """How many experts there are, and how many of them a token visits."""
    count = draw(st.integers(1, 7))
    return {key: count, "num_experts_per_tok": draw(st.integers(1, count))}


def one_of_layers(config: Config, *values: object) -> st.SearchStrategy[list]:
    """One of the `values` for every layer."""
    count = config["num_hidden_layers"]
    return st.lists(st.sampled_from(values), min_size=count, max_size=count)


@st.composite
def mixtral(draw) -> Config:
    config = draw(with_rope(decoders())) | draw(experts("num_local_experts"))
    window = draw(st.sampled_from([None, 1, 5, 12, 40]))
    return {**config, "head_dim": head_dim(config), "sliding_window": window}


@st.composite
def qwen_moe(draw) -> Config:
    """What Qwen's mixtures have in common."""
    config = draw(with_rope(decoders())) | draw(experts())
    return {
        **config,
        "moe_intermediate_size": draw(st.integers(2, 12)),
        "norm_topk_prob": draw(st.booleans()),
        "decoder_sparse_step": draw(st.integers(1, 3)),
        "mlp_only_layers": draw(st.none() | st.lists(st.integers(0, config["num_hidden_layers"] - 1))),
        "use_sliding_window": draw(st.booleans()),
        "sliding_window": draw(st.integers(1, 13)),
    }


@st.composite
def qwen2_moe(draw) -> Config:
    config = draw(qwen_moe())
    return {
        **config,
        "qkv_bias": draw(st.booleans()),
        "shared_expert_intermediate_size": draw(st.integers(2, 12)),
        "max_window_layers": draw(st.integers(0, 3)),
    }


@st.composite
def qwen3_moe(draw) -> Config:
    config = draw(qwen_moe())
    return {**config, "attention_bias": draw(st.booleans())}


@st.composite
def deepseek(draw, rope_kinds: tuple[str, ...] = ("default", "linear", "yarn", "llama3")) -> Config:
    """What DeepSeek's models have in common: latent attention, and experts in groups."""
    config = draw(decoders(heads(free_size=False, grouped=False)))
    rope_dim = 2 * draw(st.integers(1, 4))
    config = draw(with_rope(st.just({**config, "head_dim": rope_dim}), rope_kinds))
    groups, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    top_groups = draw(st.integers(1, groups))
    return {
        **{key: value for key, value in config.items() if key != "head_dim"},
        "q_lora_rank": draw(st.none() | st.integers(4, 12)),
        "kv_lora_rank": 2 * draw(st.integers(2, 6)),  # of odd sizes transformers cannot make complex numbers
        "qk_nope_head_dim": 2 * draw(st.integers(1, 4)),
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": draw(st.integers(1, 8)),
        "attention_bias": draw(st.booleans()),
        "n_routed_experts": groups * size,
        "n_group": groups,
        "topk_group": top_groups,
        "num_experts_per_tok": draw(st.integers(2, top_groups * size)),
        "n_shared_experts": draw(st.integers(1, 2)),
        "moe_intermediate_size": draw(st.integers(2, 12)),
        "first_k_dense_replace": draw(st.integers(0, 2)),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
    }


@st.composite
def deepseek_v2(draw) -> Config:
    return {**draw(deepseek()), "topk_method": draw(st.sampled_from(["greedy", "group_limited_greedy"]))}


@st.composite
def deepseek_v3(draw) -> Config:
    return {**draw(deepseek()), "norm_topk_prob": draw(st.booleans())}


@st.composite
def gpt_oss(draw) -> Config:
    config = draw(with_rope(decoders(), kinds=("default", "yarn"))) | draw(experts("num_local_experts"))
    return {
        **config,
        "head_dim": head_dim(config),
        "attention_bias": draw(st.booleans()),
        "layer_types": draw(st.none() | one_of_layers(config, "full_attention", "sliding_attention")),
        "sliding_window": draw(st.integers(1, 13)),
        "swiglu_limit": draw(st.sampled_from([0.1, 7.0])),
    }


@st.composite
def llama4(draw) -> Config:
    config = draw(with_rope(decoders(), kinds=("default", "llama3"))) | draw(experts("num_local_experts"))
    numbers = st.lists(st.integers(0, config["num_hidden_layers"] - 1))
    return {
        **config,
        "head_dim": head_dim(config),
        "attention_bias": draw(st.booleans()),
        "intermediate_size_mlp": draw(st.integers(2, 12)),
        "interleave_moe_layer_step": draw(st.integers(1, 2)),
        "moe_layers": draw(st.none() | numbers),
        "no_rope_layer_interval": draw(st.integers(1, 3)),
        "no_rope_layers": draw(st.none() | one_of_layers(config, 0, 1)),
        "layer_types": draw(st.none() | one_of_layers(config, "full_attention", "chunked_attention")),
        "attention_chunk_size": draw(st.integers(1, 13)),
        "use_qk_norm": draw(st.booleans()),
        "attn_temperature_tuning": draw(st.booleans()),
        "attn_scale": draw(st.sampled_from([0.1, 0.5])),
        "floor_scale": draw(st.integers(1, LENGTH)),
    }


MIXTURES: dict[str, st.SearchStrategy[Config]] = {
    "DeepseekV2": deepseek_v2(),
    "DeepseekV3": deepseek_v3(),
    "GptOss": gpt_oss(),
    "Llama4Text": llama4(),
    "Mixtral": mixtral(),
    "Qwen2Moe": qwen2_moe(),
    "Qwen3Moe": qwen3_moe(),
}
