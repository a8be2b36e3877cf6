"""Published architectures that transformers does not have, written down in plain torch from what is published of them.

Each has the shapes of the tensors in its checkpoints and a forward of one sequence, without cache, padding or batches.
Nothing here is shared with what it tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from tests.families.oracle import Oracle, recorded

Config = dict[str, Any]
Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Original:
    shapes: Callable[[Config], Shapes]
    forward: Callable[[Config, Weights, Tensor], Tensor]  # ids [1, seq] to logits [seq, vocab]
    vocab_key: str = "vocab_size"


def original_oracle(original: Original, directory: Path, config: Config) -> Oracle:
    """A tiny random model of this architecture, saved to `directory`."""
    torch.manual_seed(sum(map(ord, json.dumps(config, sort_keys=True))))
    weights = {key: _random(key, shape).requires_grad_() for key, shape in original.shapes(config).items()}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    save_file({key: weight.detach() for key, weight in weights.items()}, directory / "model.safetensors")
    return recorded(
        lambda ids: original.forward(config, weights, ids)[None],
        lambda: {key: weight.grad for key, weight in weights.items() if weight.grad is not None},
        config[original.vocab_key],
        directory,
    )


def _random(name: str, shape: tuple[int, ...]) -> Tensor:
    if "norm" in name or "ln_" in name:
        return 1.0 + 0.1 * torch.randn(shape)
    return torch.randn(shape) * (0.15 if "embed" in name else 0.1)


# ---- parts -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def heads(x: Tensor, count: int) -> Tensor:
    """`[seq, count * dim]` to `[count, seq, dim]`."""
    return x.view(len(x), count, -1).transpose(0, 1)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Causal attention of q `[heads, seq, dim]` to k, v `[groups, seq, dim]`, as `[seq, heads * dim]`."""
    seq, times = q.shape[1], len(q) // len(k)
    k, v = (torch.stack([x[head // times] for head in range(len(q))]) for x in (k, v))
    scores = torch.einsum("hid,hjd->hij", q, k) / math.sqrt(q.shape[-1]) + bias
    later = torch.ones(seq, seq).triu(1).bool()
    return torch.einsum("hij,hjd->ihd", scores.masked_fill(later, -math.inf).softmax(-1), v).flatten(1)


def turns(seq: int, dim: int, theta: float) -> Tensor:
    """What pair j of `dim` dims at place i is multiplied by, as complex numbers `[seq, dim / 2]`."""
    speed = torch.tensor([theta ** (-2 * j / dim) for j in range(dim // 2)])
    angle = torch.arange(seq)[:, None] * speed
    return torch.polar(torch.ones_like(angle), angle)


def turned_halves(x: Tensor, theta: float = 10000.0) -> Tensor:
    """Rotary positions of `[heads, seq, dim]` where dim j is paired with dim j + dim / 2."""
    first, second = x.chunk(2, -1)
    pairs = torch.complex(first, second) * turns(x.shape[1], x.shape[2], theta)
    return torch.cat((pairs.real, pairs.imag), -1)


def turned_neighbours(x: Tensor, dim: int, theta: float) -> Tensor:
    """Rotary positions of the first `dim` dims of `[heads, seq, all dims]`, where dim 2j is paired with dim 2j + 1."""
    pairs = torch.view_as_complex(x[..., :dim].unflatten(-1, (-1, 2)).contiguous()) * turns(x.shape[1], dim, theta)
    return torch.cat((torch.view_as_real(pairs).flatten(-2), x[..., dim:]), -1)


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def llama_shapes(config: Config, attention: Shapes, mlp: Shapes) -> Shapes:
    """Tensors named as in LLaMA, with those of attention and of the MLP given for one layer."""
    vocab, hidden = config["vocab_size"], config["hidden_size"]
    one = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        **{f"self_attn.{name}.weight": shape for name, shape in attention.items()},
        **{f"mlp.{name}.weight": shape for name, shape in mlp.items()},
    }
    layers = range(config["num_hidden_layers"])
    shapes = {f"model.layers.{i}.{name}": shape for i in layers for name, shape in one.items()}
    shapes |= {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    return shapes if config["tie_word_embeddings"] else {**shapes, "lm_head.weight": (vocab, hidden)}


# ---- Baichuan --------------------------------------------------------------------------------------------------------


def baichuan_shapes(config: Config) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    attention = {"W_pack": (3 * hidden, hidden), "o_proj": (hidden, hidden)}
    return llama_shapes(
        config, attention, {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    )


def baichuan(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    eps, count, rotary = config["rms_norm_eps"], config["num_attention_heads"], "max_position_embeddings" in config
    x = weights["model.embed_tokens.weight"][ids[0]]
    place = torch.arange(len(x))
    bias = 0.0 if rotary else -torch.tensor(falls(count))[:, None, None] * (place[:, None] - place)
    for i in range(config["num_hidden_layers"]):
        layer = part(weights, f"model.layers.{i}.")
        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (heads(z, count) for z in (y @ layer["self_attn.W_pack.weight"].T).chunk(3, -1))
        if rotary:
            q, k = turned_halves(q), turned_halves(k)
        x = x + attend(q, k, v, bias) @ layer["self_attn.o_proj.weight"].T
        y = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        x = x + swiglu(y, *(layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    head = weights["lm_head.weight"]
    if "z_loss_weight" in config:  # Baichuan 2
        head = head / head.square().sum(-1, keepdim=True).sqrt()
    return rms_norm(x, weights["model.norm.weight"], eps) @ head.T


def falls(count: int) -> list[float]:
    """Slopes of scores over distance: 2^(-8/n), 2^(-16/n), ... for n heads, n a power of two.

    Else those of the next smaller power, and from those of the next larger one the first, the third and so on.
    """
    power = 2 ** int(math.log2(count))
    if power == count:
        return [2 ** (-8 * (head + 1) / count) for head in range(count)]
    return falls(power) + falls(2 * power)[::2][: count - power]


def part(weights: Weights, prefix: str) -> Weights:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


# ---- ChatGLM ---------------------------------------------------------------------------------------------------------


def chatglm_shapes(config: Config) -> Shapes:
    vocab, hidden, ffn = config["padded_vocab_size"], config["hidden_size"], config["ffn_hidden_size"]
    inner = config["num_attention_heads"] * config["kv_channels"]
    qkv = inner + 2 * config["multi_query_group_num"] * config["kv_channels"]
    one = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attention.query_key_value.weight": (qkv, hidden),
        "self_attention.query_key_value.bias": (qkv,),
        "self_attention.dense.weight": (hidden, inner),
        "mlp.dense_h_to_4h.weight": (2 * ffn, hidden),
        "mlp.dense_4h_to_h.weight": (hidden, ffn),
    }
    if config["add_bias_linear"]:
        one |= {"self_attention.dense.bias": (hidden,)}
        one |= {"mlp.dense_h_to_4h.bias": (2 * ffn,), "mlp.dense_4h_to_h.bias": (hidden,)}
    layers = range(config["num_layers"])
    return {
        "transformer.embedding.word_embeddings.weight": (vocab, hidden),
        **{f"transformer.encoder.layers.{i}.{name}": shape for i in layers for name, shape in one.items()},
        "transformer.encoder.final_layernorm.weight": (hidden,),
        "transformer.output_layer.weight": (vocab, hidden),
    }


def chatglm(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    eps, dim = config["layernorm_epsilon"], config["kv_channels"]
    count, groups = config["num_attention_heads"], config["multi_query_group_num"]
    theta = 10000.0 * config.get("rope_ratio", 1)
    x = weights["transformer.embedding.word_embeddings.weight"][ids[0]]
    for i in range(config["num_layers"]):
        layer = part(weights, f"transformer.encoder.layers.{i}.")

        def linear(y: Tensor, name: str, layer: Weights = layer) -> Tensor:
            return y @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0.0)

        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = linear(y, "self_attention.query_key_value").split([count * dim, groups * dim, groups * dim], -1)
        q, k = (turned_neighbours(heads(z, n), dim // 2, theta) for z, n in ((q, count), (k, groups)))
        base = y if config["apply_residual_connection_post_layernorm"] else x
        x = base + linear(attend(q, k, heads(v, groups)), "self_attention.dense")
        y = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        gate, up = linear(y, "mlp.dense_h_to_4h").chunk(2, -1)
        base = y if config["apply_residual_connection_post_layernorm"] else x
        x = base + linear(F.silu(gate) * up, "mlp.dense_4h_to_h")
    x = rms_norm(x, weights["transformer.encoder.final_layernorm.weight"], eps)
    return x @ weights["transformer.output_layer.weight"].T


# ---- MiniCPM ---------------------------------------------------------------------------------------------------------


def minicpm_shapes(config: Config) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    mlp: Shapes = {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    if experts := config.get("num_experts"):
        mlp = {"gate": (experts, hidden)}
        for e in range(experts):
            mlp |= {f"experts.{e}.{name}": (ffn, hidden) for name in ("w1", "w3")}
            mlp[f"experts.{e}.w2"] = (hidden, ffn)
    return llama_shapes(config, attention, mlp)


def minicpm(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    eps, groups = config["rms_norm_eps"], config["num_key_value_heads"]
    depth = config["scale_depth"] / math.sqrt(config["num_hidden_layers"])
    x = weights["model.embed_tokens.weight"][ids[0]] * config["scale_emb"]
    for i in range(config["num_hidden_layers"]):
        layer = part(weights, f"model.layers.{i}.")
        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (y @ layer[f"self_attn.{name}_proj.weight"].T for name in "qkv")
        q, k, v = heads(q, config["num_attention_heads"]), heads(k, groups), heads(v, groups)
        y = attend(turned_halves(q), turned_halves(k), v) @ layer["self_attn.o_proj.weight"].T
        x = x + y * depth
        y = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        x = x + minicpm_mlp(config, part(layer, "mlp."), y) * depth
    x = rms_norm(x, weights["model.norm.weight"], eps) * config["dim_model_base"] / config["hidden_size"]
    return x @ weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"].T


def minicpm_mlp(config: Config, weights: Weights, x: Tensor) -> Tensor:
    if "num_experts" not in config:
        return swiglu(x, *(weights[f"{name}_proj.weight"] for name in ("gate", "up", "down")))
    rows = []
    for token in x:
        share, chosen = (token @ weights["gate.weight"].T).softmax(-1).topk(config["num_experts_per_tok"])
        results = [
            swiglu(token, *(weights[f"experts.{e}.{name}.weight"] for name in ("w1", "w3", "w2"))) for e in chosen
        ]
        rows.append(sum(s * y for s, y in zip(share / share.sum(), results, strict=True)))
    return torch.stack(rows)


# ---- Aquila, InternLM ------------------------------------------------------------------------------------------------


def stretched_theta(config: Config, dim: int, seq: int) -> float:
    """The base of rotary positions, which with dynamic scaling grows with a text longer than those trained on."""
    rotary = config.get("rotary", {})
    scaling = config.get("rope_scaling") or rotary
    theta, length = rotary.get("base", config.get("rope_theta", 10000.0)), config["max_position_embeddings"]
    if scaling.get("type") != "dynamic" or seq <= length:
        return theta
    factor = scaling.get("factor", scaling.get("scaling_factor", 1.0))
    return theta * (factor * seq / length - (factor - 1)) ** (dim / (dim - 2))


def aquila_shapes(config: Config) -> Shapes:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    count = config["num_attention_heads"]
    kv = hidden // count * config.get("num_key_value_heads", count)
    attention = {"q_proj": (hidden, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, hidden)}
    shapes = llama_shapes(
        config, attention, {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    )
    if config.get("bias"):  # InternLM
        shapes |= {
            f"model.layers.{i}.self_attn.{name}.bias": shape[:1]
            for i in range(config["num_hidden_layers"])
            for name, shape in attention.items()
        }
    return shapes


def aquila(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    eps, count = config["rms_norm_eps"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads", count)
    theta = stretched_theta(config, config["hidden_size"] // count, ids.shape[1])
    x = weights["model.embed_tokens.weight"][ids[0]]
    for i in range(config["num_hidden_layers"]):
        layer = part(weights, f"model.layers.{i}.")
        y = rms_norm(x, layer["input_layernorm.weight"], eps)
        q, k, v = (linear(y, layer, f"self_attn.{name}_proj") for name in "qkv")
        q, k = turned_halves(heads(q, count), theta), turned_halves(heads(k, groups), theta)
        x = x + linear(attend(q, k, heads(v, groups)), layer, "self_attn.o_proj")
        y = rms_norm(x, layer["post_attention_layernorm.weight"], eps)
        x = x + swiglu(y, *(layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def internlm2_shapes(config: Config) -> Shapes:
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"]
    qkv = hidden + 2 * config["num_key_value_heads"] * (hidden // config["num_attention_heads"])
    one = {
        "attention_norm.weight": (hidden,),
        "ffn_norm.weight": (hidden,),
        "attention.wqkv.weight": (qkv, hidden),
        "attention.wo.weight": (hidden, hidden),
        "feed_forward.w1.weight": (ffn, hidden),
        "feed_forward.w2.weight": (hidden, ffn),
        "feed_forward.w3.weight": (ffn, hidden),
    }
    if config["bias"]:
        one |= {"attention.wqkv.bias": (qkv,), "attention.wo.bias": (hidden,)}
    return {
        "model.tok_embeddings.weight": (vocab, hidden),
        **{f"model.layers.{i}.{name}": s for i in range(config["num_hidden_layers"]) for name, s in one.items()},
        "model.norm.weight": (hidden,),
        "output.weight": (vocab, hidden),
    }


def internlm2(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    eps, groups, seq = config["rms_norm_eps"], config["num_key_value_heads"], ids.shape[1]
    dim = config["hidden_size"] // config["num_attention_heads"]
    theta = stretched_theta(config, dim, seq)
    x = weights["model.tok_embeddings.weight"][ids[0]]
    for i in range(config["num_hidden_layers"]):
        layer = part(weights, f"model.layers.{i}.")
        y = linear(rms_norm(x, layer["attention_norm.weight"], eps), layer, "attention.wqkv")
        q, k, v = [], [], []
        for group in heads(y, groups):  # its query heads, then its key, then its value
            *queries, key, value = group.split(dim, -1)
            q, k, v = q + queries, [*k, key], [*v, value]
        y = attend(turned_halves(torch.stack(q), theta), turned_halves(torch.stack(k), theta), torch.stack(v))
        x = x + linear(y, layer, "attention.wo")
        y = rms_norm(x, layer["ffn_norm.weight"], eps)
        x = x + swiglu(y, *(layer[f"feed_forward.{name}.weight"] for name in ("w1", "w3", "w2")))
    return rms_norm(x, weights["model.norm.weight"], eps) @ weights["output.weight"].T


# ---- Qwen ------------------------------------------------------------------------------------------------------------


def qwen_shapes(config: Config) -> Shapes:
    vocab, hidden, ffn = config["vocab_size"], config["hidden_size"], config["intermediate_size"] // 2
    one = {
        "ln_1.weight": (hidden,),
        "ln_2.weight": (hidden,),
        "attn.c_attn.weight": (3 * hidden, hidden),
        "attn.c_attn.bias": (3 * hidden,),
        "attn.c_proj.weight": (hidden, hidden),
        "mlp.w1.weight": (ffn, hidden),
        "mlp.w2.weight": (ffn, hidden),
        "mlp.c_proj.weight": (hidden, ffn),
    }
    return {
        "transformer.wte.weight": (vocab, hidden),
        **{f"transformer.h.{i}.{name}": s for i in range(config["num_hidden_layers"]) for name, s in one.items()},
        "transformer.ln_f.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }


def qwen(config: Config, weights: Weights, ids: Tensor) -> Tensor:
    eps, count, dim = config["layer_norm_epsilon"], config["num_attention_heads"], config["kv_channels"]
    seq, length, theta = ids.shape[1], config["seq_length"], config["rotary_emb_base"]
    if config["use_dynamic_ntk"]:
        alpha = max(2 ** math.ceil(math.log2(seq / length) + 1) - 1, 1)
        theta = theta * alpha ** (dim / (dim - 2))
    sharper = torch.ones(seq)
    if config["use_logn_attn"]:
        sharper = torch.tensor([math.log(max(place, length), length) for place in range(1, seq + 1)])
    x = weights["transformer.wte.weight"][ids[0]]
    for i in range(config["num_hidden_layers"]):
        layer = part(weights, f"transformer.h.{i}.")
        y = linear(rms_norm(x, layer["ln_1.weight"], eps), layer, "attn.c_attn")
        q, k, v = (heads(z, count) for z in y.chunk(3, -1))
        y = attend(turned_halves(q, theta) * sharper[:, None], turned_halves(k, theta), v)
        x = x + y @ layer["attn.c_proj.weight"].T
        y = rms_norm(x, layer["ln_2.weight"], eps)
        x = x + swiglu(y, *(layer[f"mlp.{name}.weight"] for name in ("w2", "w1", "c_proj")))
    return rms_norm(x, weights["transformer.ln_f.weight"], eps) @ weights["lm_head.weight"].T


ORIGINALS = {
    "aquila": Original(aquila_shapes, aquila),
    "internlm2": Original(internlm2_shapes, internlm2),
    "qwen": Original(qwen_shapes, qwen),
    "baichuan": Original(baichuan_shapes, baichuan),
    "chatglm": Original(chatglm_shapes, chatglm, "padded_vocab_size"),
    "minicpm": Original(minicpm_shapes, minicpm),
}
