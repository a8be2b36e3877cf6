"""Random tiny configurations for the classes of transformers, by the name of their `Config` class.

A family whose original is in transformers has its entry here, and every test over random models covers it.
"""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from cordee.families.common import ACTIVATIONS

Config = dict[str, Any]

VOCAB = 61
LENGTH = 8  # of "training", where a scaling of positions has one: texts in the tests are longer


@st.composite
def heads(draw, most: int = 3, free_size: bool = True, grouped: bool = True) -> Config:
    """Query heads, groups, the size of a head and the hidden size; the size of a head may be `free` of the hidden."""
    groups, rows, head_dim = draw(st.integers(1, most)), draw(st.integers(1, most)), 2 * draw(st.integers(2, 6))
    rows = rows if grouped else 1
    shape = {"num_attention_heads": groups * rows, "num_key_value_heads": groups}
    if free_size and draw(st.booleans()):
        return {**shape, "head_dim": head_dim, "hidden_size": groups * rows * 2 * draw(st.integers(2, 6))}
    return {**shape, "hidden_size": groups * rows * head_dim}


def head_dim(config: Config) -> int:
    return config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])


@st.composite
def decoders(draw, shapes: st.SearchStrategy[Config] | None = None) -> Config:
    """What most classes have in common, positions left out."""
    return {
        **draw(heads() if shapes is None else shapes),
        "vocab_size": VOCAB,
        "intermediate_size": draw(st.integers(4, 40)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-3])),
        "tie_word_embeddings": draw(st.booleans()),
    }


# ---- rotary positions ------------------------------------------------------------------------------------------------


def _linear(draw, pairs: int) -> Config:
    return {"rope_type": "linear", "factor": draw(st.sampled_from([1.5, 4.0]))}


def _dynamic(draw, pairs: int) -> Config:
    return {"rope_type": "dynamic", "factor": draw(st.sampled_from([1.0, 6.0]))}


def _yarn(draw, pairs: int) -> Config:
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": LENGTH}
    more = [{}, {"truncate": False}, {"attention_factor": 0.7}, {"mscale": 0.8, "mscale_all_dim": 0.5}]
    borders = [{}, {"beta_fast": 4.0, "beta_slow": 0.5}]
    return scaling | draw(st.sampled_from(more)) | draw(st.sampled_from(borders))


def _llama3(draw, pairs: int) -> Config:
    return {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": LENGTH,
    }


def _longrope(draw, pairs: int) -> Config:
    factors = st.lists(st.sampled_from([1.0, 1.5, 4.0, 9.0]), min_size=pairs, max_size=pairs)
    more = [{}, {"attention_factor": 1.3}, {"factor": 32.0}]
    return {
        "rope_type": "longrope",
        "short_factor": draw(factors),
        "long_factor": draw(factors),
        "original_max_position_embeddings": LENGTH,
    } | draw(st.sampled_from(more))


SCALINGS = {
    "default": lambda draw, pairs: {"rope_type": "default"},
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}


@st.composite
def with_rope(draw, configs: st.SearchStrategy[Config], kinds: tuple[str, ...] = tuple(SCALINGS)) -> Config:
    """Configurations with rotary positions, scaled in one of these ways."""
    config, kind = draw(configs), draw(st.sampled_from(kinds))
    rope = {"rope_theta": draw(st.sampled_from([1e2, 1e4, 1e6])), **SCALINGS[kind](draw, head_dim(config) // 2)}
    if kind == "dynamic":
        config = {**config, "max_position_embeddings": LENGTH}
    return {**config, "rope_parameters": rope}


# ---- classes ---------------------------------------------------------------------------------------------------------


@st.composite
def llama(draw) -> Config:
    config = draw(with_rope(decoders()))
    act = draw(st.sampled_from(["silu", "swish"]))
    return {**config, "hidden_act": act, "attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}


@st.composite
def gpt2(draw) -> Config:
    size = draw(st.integers(1, 4))
    return {
        "vocab_size": VOCAB,
        "n_embd": 2 * size * draw(st.integers(2, 6)),
        "n_head": size,
        "n_layer": draw(st.integers(1, 3)),
        "n_positions": 32,
        "n_inner": draw(st.sampled_from([None, 30])),
        "activation_function": draw(st.sampled_from(sorted(ACTIVATIONS))),
        "scale_attn_weights": draw(st.booleans()),
        "scale_attn_by_inverse_layer_idx": draw(st.booleans()),
        "reorder_and_upcast_attn": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def mistral(draw) -> Config:
    return {**draw(with_rope(decoders())), "sliding_window": draw(st.sampled_from([None, 1, 2, 5, 11, 12, 40]))}


@st.composite
def qwen2(draw) -> Config:
    config = draw(with_rope(decoders()))
    window = {"use_sliding_window": draw(st.booleans()), "sliding_window": draw(st.integers(1, 13))}
    if draw(st.booleans()):
        return {**config, **window, "max_window_layers": draw(st.integers(0, 3))}
    count, kinds = config["num_hidden_layers"], ["full_attention", "sliding_attention"]
    types = draw(st.lists(st.sampled_from(kinds), min_size=count, max_size=count))
    return {**config, **window, "use_sliding_window": True, "layer_types": types}


@st.composite
def qwen3(draw) -> Config:
    config = draw(qwen2())
    return {**config, "head_dim": head_dim(config), "attention_bias": draw(st.booleans())}


@st.composite
def phi3(draw) -> Config:
    config = draw(with_rope(decoders(heads(free_size=False)), kinds=("default", "longrope")))
    config |= {"original_max_position_embeddings": LENGTH, "sliding_window": draw(st.sampled_from([None, 1, 5, 40]))}
    rope = config["rope_parameters"]
    pairs = draw(st.integers(1, head_dim(config) // 2))
    factor = 2 * pairs / head_dim(config)
    assert int(head_dim(config) * factor) == 2 * pairs
    lists = {key: rope[key][:pairs] for key in ("short_factor", "long_factor") if key in rope}
    return {**config, "rope_parameters": {**rope, **lists, "partial_rotary_factor": factor}}


@st.composite
def olmo2(draw) -> Config:
    return {**draw(with_rope(decoders())), "attention_bias": draw(st.booleans())}


@st.composite
def internlm3(draw) -> Config:
    config, bias = draw(with_rope(decoders())), draw(st.booleans())
    return {**config, "head_dim": head_dim(config), "attention_bias": bias, "mlp_bias": bias}


@st.composite
def bloom(draw) -> Config:
    count = draw(st.integers(1, 7))
    return {
        "vocab_size": VOCAB,
        "hidden_size": count * draw(st.integers(2, 8)),
        "n_head": count,
        "n_layer": draw(st.integers(1, 3)),
        "layer_norm_epsilon": draw(st.sampled_from([1e-5, 1e-3])),
        "apply_residual_connection_post_layernorm": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
    }


@st.composite
def glm(draw) -> Config:
    config = draw(with_rope(decoders(), kinds=("default", "linear", "yarn")))
    pairs = draw(st.integers(1, head_dim(config) // 2))
    rope = {**config["rope_parameters"], "partial_rotary_factor": 2 * pairs / head_dim(config)}
    more = {"head_dim": head_dim(config), "rope_parameters": rope, "attention_bias": draw(st.booleans())}
    return {**config, **more}


@st.composite
def gemma(draw) -> Config:
    config = draw(with_rope(decoders()))
    act = draw(st.sampled_from(["gelu", "gelu_new", "gelu_pytorch_tanh"]))
    return {**config, "head_dim": head_dim(config), "hidden_act": act, "attention_bias": draw(st.booleans())}


@st.composite
def gemma2(draw) -> Config:
    config = {key: value for key, value in draw(gemma()).items() if key != "hidden_act"}
    cap, count = st.sampled_from([None, 0.5, 3.0]), config["num_hidden_layers"]
    types = st.lists(st.sampled_from(["full_attention", "sliding_attention"]), min_size=count, max_size=count)
    return {
        **config,
        "attn_logit_softcapping": draw(cap),
        "final_logit_softcapping": draw(cap),
        "layer_types": draw(st.none() | types),
        "query_pre_attn_scalar": draw(st.integers(1, 40)),
        "sliding_window": draw(st.integers(1, 13)),
    }


@st.composite
def gemma3(draw) -> Config:
    config, kinds = draw(gemma2()), ("default", "linear")
    near, far = (draw(with_rope(st.just(config), kinds))["rope_parameters"] for _ in range(2))
    rope = {"sliding_attention": near, "full_attention": far}
    more = {"rope_parameters": rope, "sliding_window_pattern": draw(st.integers(1, 3))}
    return {**config, **more, "attn_logit_softcapping": None}


MODELS: dict[str, st.SearchStrategy[Config]] = {
    "Bloom": bloom(),
    "GPT2": gpt2(),
    "Gemma": gemma(),
    "Gemma2": gemma2(),
    "Gemma3Text": gemma3(),
    "Glm": glm(),
    "Glm4": glm(),
    "InternLM3": internlm3(),
    "Llama": llama(),
    "Mistral": mistral(),
    "Olmo2": olmo2(),
    "Phi3": phi3(),
    "Qwen2": qwen2(),
    "Qwen3": qwen3(),
}
