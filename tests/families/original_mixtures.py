"""Mixtures of experts that transformers does not have, or not as published, as `originals.py` has other models."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.families.originals import (
    Config,
    Original,
    Shapes,
    Weights,
    heads,
    part,
    rms_norm,
    swiglu,
    turned_halves,
    turned_neighbours,
)


def scored(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scores of q `[heads, seq, dim]` over k `[groups, seq, dim]`."""
    k = k.repeat_interleave(len(q) // len(k), 0)
    return q @ k.mT * scale


def attended(scores: Tensor, v: Tensor) -> Tensor:
    """Causal attention with `scores` `[heads, seq, seq]` to v `[groups, seq, dim]`, as `[seq, heads * dim]`."""
    later = torch.ones(scores.shape[1:]).triu(1).bool()
    v = v.repeat_interleave(len(scores) // len(v), 0)
    return (scores.masked_fill(later, -math.inf).softmax(-1) @ v).transpose(0, 1).flatten(1)


def of_layers(config: Config, one: Shapes, count: int | None = None, start: int = 0) -> Shapes:
    stop = start + (config["num_hidden_layers"] if count is None else count)
    return {f"model.layers.{i}.{name}": shape for i in range(start, stop) for name, shape in one.items()}


def grouped_attention_shapes(config: Config, prefix: str, bias: bool = False) -> Shapes:
    hidden, kv = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    kv *= config.get("num_key_value_heads", config["num_attention_heads"])
    rows = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
    shapes: Shapes = {f"{prefix}{name}.weight": (size, hidden) for name, size in rows.items()}
    return shapes | ({f"{prefix}{name}.bias": (size,) for name, size in rows.items()} if bias else {})


# ---- Grok-1 ----------------------------------------------------------------------------------------------------------


def grok_shapes(config: Config) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    one = grouped_attention_shapes(config, "attn.") | {"moe_block.gate.weight": (config["num_experts"], hidden)}
    one |= {f"{name}_norm.scale": (hidden,) for name in ("pre_attn", "post_attn", "pre_moe", "post_moe")}
    for e in range(config["num_experts"]):
        one |= {f"moe_block.experts.{e}.{name}.weight": (ffn, hidden) for name in ("linear", "linear_v")}
        one[f"moe_block.experts.{e}.linear_1.weight"] = (hidden, ffn)
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.scale": (hidden,)}
    shapes |= of_layers(config, one)
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (config["vocab_size"], hidden)}


def grok(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    eps, cap = config["rms_norm_eps"], config["max_attn_value"]
    x = weights["model.embed_tokens.weight"][ids[0]] * config["embedding_multiplier_scale"]
    for i in range(config["num_hidden_layers"]):
        layer = part(weights, f"model.layers.{i}.")
        y = rms_norm(x, layer["pre_attn_norm.scale"], eps)
        q, k, v = (y @ layer[f"attn.{name}_proj.weight"].T for name in "qkv")
        groups = config["num_key_value_heads"]
        q, k, v = heads(q, config["num_attention_heads"]), heads(k, groups), heads(v, groups)
        scores = scored(turned_halves(q), turned_halves(k), config["attn_output_multiplier"])
        y = attended(cap * torch.tanh(scores / cap), v) @ layer["attn.o_proj.weight"].T
        x = x + rms_norm(y, layer["post_attn_norm.scale"], eps)
        y = grok_experts(config, part(layer, "moe_block."), rms_norm(x, layer["pre_moe_norm.scale"], eps))
        x = x + rms_norm(y, layer["post_moe_norm.scale"], eps)
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return rms_norm(x, weights["model.norm.scale"], eps) @ head.T * config["output_multiplier_scale"]


def grok_experts(config: Config, weights: Weights, x: Tensor) -> Tensor:
    rows = []
    for token in x:
        share, chosen = (weights["gate.weight"] @ token).softmax(-1).topk(config["num_experts_per_tok"])
        total = torch.zeros_like(token)
        for weight, e in zip(share, chosen.tolist(), strict=True):
            gate, up, down = (weights[f"experts.{e}.{name}.weight"] for name in ("linear", "linear_v", "linear_1"))
            total = total + weight * (down @ (F.gelu(gate @ token, approximate="tanh") * (up @ token)))
        rows.append(total)
    return torch.stack(rows)


GROK = {
    "architectures": ["Grok1ModelForCausalLM"],
    "model_type": "grok-1",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "attn_output_multiplier": 2.5,
    "embedding_multiplier_scale": 5.5,
    "output_multiplier_scale": 0.6,
    "max_attn_value": 1.5,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "tie_word_embeddings": True,
}


# ---- DeepSeek-V2 as its own code has it ------------------------------------------------------------------------------


def deepseek_v2_shapes(config: Config) -> Shapes:
    hidden, count, ffn = config["hidden_size"], config["num_attention_heads"], config["moe_intermediate_size"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent = config["kv_lora_rank"]
    one: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (count * (nope + rope), hidden),
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (count * (nope + v), latent),
        "self_attn.o_proj.weight": (hidden, count * v),
    }
    shapes = of_layers(config, one)
    vocab = (config["vocab_size"], hidden)
    shapes |= {"model.embed_tokens.weight": vocab, "model.norm.weight": (hidden,), "lm_head.weight": vocab}
    dense = swiglu_shapes("mlp.", hidden, config["intermediate_size"])
    sparse = {"mlp.gate.weight": (config["n_routed_experts"], hidden)}
    sparse |= swiglu_shapes("mlp.shared_experts.", hidden, ffn * config["n_shared_experts"])
    for e in range(config["n_routed_experts"]):
        sparse |= swiglu_shapes(f"mlp.experts.{e}.", hidden, ffn)
    for i in range(config["num_hidden_layers"]):
        shapes |= of_layers(config, sparse if is_sparse(config, i) else dense, 1, i)
    return shapes


def swiglu_shapes(prefix: str, hidden: int, ffn: int) -> Shapes:
    shapes: Shapes = {f"{prefix}{name}_proj.weight": (ffn, hidden) for name in ("gate", "up")}
    return {**shapes, f"{prefix}down_proj.weight": (hidden, ffn)}


def is_sparse(config: Config, layer: int) -> bool:
    return layer >= config["first_k_dense_replace"] and layer % config["moe_layer_freq"] == 0


def deepseek_v2(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][ids[0]]
    for i in range(config["num_hidden_layers"]):
        layer = part(weights, f"model.layers.{i}.")
        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        x = x + latent_attention(config, part(layer, "self_attn."), y)
        y, mlp = rms_norm(x, layer["post_attention_layernorm.weight"], eps), part(layer, "mlp.")
        x = x + (deepseek_experts(config, mlp, y) if is_sparse(config, i) else projected(mlp, y))
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def latent_attention(config: Config, weights: Weights, x: Tensor) -> Tensor:
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    count, theta = config["num_attention_heads"], config["rope_theta"]
    q = heads(x @ weights["q_proj.weight"].T, count)
    latent, k_rope = (x @ weights["kv_a_proj_with_mqa.weight"].T).split([config["kv_lora_rank"], rope], -1)
    latent = rms_norm(latent, weights["kv_a_layernorm.weight"], 1e-6)
    k, v = heads(latent @ weights["kv_b_proj.weight"].T, count).split([nope, config["v_head_dim"]], -1)
    k_rope = turned_neighbours(k_rope[None], rope, theta).expand(count, -1, -1)
    q = torch.cat((q[..., :nope], turned_neighbours(q[..., nope:], rope, theta)), -1)
    scores = scored(q, torch.cat((k, k_rope), -1), (nope + rope) ** -0.5)
    return attended(scores, v) @ weights["o_proj.weight"].T


def projected(weights: Weights, x: Tensor) -> Tensor:
    return swiglu(x, *(weights[f"{name}_proj.weight"] for name in ("gate", "up", "down")))


def deepseek_experts(config: Config, weights: Weights, x: Tensor) -> Tensor:
    rows = []
    for token in x:
        share, chosen = (weights["gate.weight"] @ token).softmax(-1).topk(config["num_experts_per_tok"])
        normalised = config["norm_topk_prob"] and config["num_experts_per_tok"] > 1
        share = share / share.sum() if normalised else share * config["routed_scaling_factor"]
        results = [projected(part(weights, f"experts.{e}."), token) for e in chosen.tolist()]
        rows.append(sum(weight * y for weight, y in zip(share, results, strict=True)))
    return torch.stack(rows) + projected(part(weights, "shared_experts."), x)


DEEPSEEK = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 10,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 5,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 2,
    "topk_method": "greedy",
    "routed_scaling_factor": 3.0,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-3,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
}


# ---- GPT with experts ------------------------------------------------------------------------------------------------


def gpt_moe_shapes(config: Config) -> Shapes:
    hidden, ffn, bias = config["hidden_size"], config["intermediate_size"], config["mlp_bias"]
    one = grouped_attention_shapes(config, "self_attn.", config["attention_bias"])
    one |= {"mlp.gate.weight": (config["num_local_experts"], hidden)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        one |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
    for e in range(config["num_local_experts"]):
        one |= {f"mlp.experts.{e}.up_proj.weight": (ffn, hidden), f"mlp.experts.{e}.down_proj.weight": (hidden, ffn)}
        one |= {f"mlp.experts.{e}.up_proj.bias": (ffn,), f"mlp.experts.{e}.down_proj.bias": (hidden,)} if bias else {}
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    return {**shapes, "model.norm.weight": (hidden,), "model.norm.bias": (hidden,), **of_layers(config, one)}


def gpt_moe(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    count, tanh = config["num_attention_heads"], "tanh" if config["hidden_act"] == "gelu_new" else "none"

    def norm(y: Tensor, weights: Weights, name: str) -> Tensor:
        centred = y - y.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + config["layer_norm_eps"]).rsqrt()
        return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(y: Tensor, weights: Weights, name: str) -> Tensor:
        return y @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    x = weights["model.embed_tokens.weight"][ids[0]]
    for i in range(config["num_hidden_layers"]):
        layer = part(weights, f"model.layers.{i}.")
        y = norm(x, layer, "input_layernorm")
        q, k, v = (heads(linear(y, layer, f"self_attn.{name}_proj"), count) for name in "qkv")
        scores = scored(turned_halves(q), turned_halves(k), q.shape[-1] ** -0.5)
        x = x + linear(attended(scores, v), layer, "self_attn.o_proj")
        rows = []
        for token in norm(x, layer, "post_attention_layernorm"):
            best, chosen = (layer["mlp.gate.weight"] @ token).topk(config["num_experts_per_tok"])
            total = torch.zeros_like(token)
            for weight, e in zip(best.softmax(-1), chosen.tolist(), strict=True):
                inner = F.gelu(linear(token, layer, f"mlp.experts.{e}.up_proj"), approximate=tanh)
                total = total + weight * linear(inner, layer, f"mlp.experts.{e}.down_proj")
            rows.append(total)
        x = x + torch.stack(rows)
    return norm(x, weights, "model.norm") @ weights["model.embed_tokens.weight"].T


GPT_MOE = {
    "architectures": ["GPTMoEForCausalLM"],
    "model_type": "gpt_moe",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "layer_norm_eps": 1e-3,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
DROPS = {"moe_expert_capacity_factor": 0.5, "moe_pad_expert_input_to_capacity": True}  # in training alone


ORIGINALS = {
    "deepseek_v2": Original(deepseek_v2_shapes, deepseek_v2),
    "gpt_moe": Original(gpt_moe_shapes, gpt_moe),
    "grok": Original(grok_shapes, grok),
}

MODELS = {
    "deepseek-v2 every other layer": ("deepseek_v2", DEEPSEEK),
    "deepseek-v2 normalised": ("deepseek_v2", {**DEEPSEEK, "norm_topk_prob": True, "moe_layer_freq": 1}),
    "deepseek-v2 one expert": ("deepseek_v2", {**DEEPSEEK, "norm_topk_prob": True, "num_experts_per_tok": 1}),
    "gpt_moe": ("gpt_moe", GPT_MOE),
    "gpt_moe no biases": ("gpt_moe", {**GPT_MOE, **DROPS, "attention_bias": False, "mlp_bias": False}),
    "gpt_moe tanh": ("gpt_moe", {**GPT_MOE, "hidden_act": "gelu_new", "num_experts_per_tok": 3}),
    "grok": ("grok", GROK),
    "grok untied, top 3": ("grok", {**GROK, "num_experts_per_tok": 3, "tie_word_embeddings": False}),
}
