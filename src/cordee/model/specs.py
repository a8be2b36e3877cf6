"""What every parameter of a model is, from its `ModelConfig` alone.

Owns the shapes, logical axes and initial distributions: modules declare the parameters that are described here, and
`families/count.py` counts them. Knows no torch, so that presets of any size are described at once."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from cordee.model.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    LowRankConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
    slice_of,
)

Origin = Literal["base", "tuned", "adapter", "head"]


@dataclass(frozen=True)
class ParameterSpec:
    """What a parameter is, whatever shard of it this process holds.

    `axes` names each dim of the global `shape`: "vocab", "embed", "position", "kv_group", "slot" (the q heads of a
    group, then k, then v; "q_slot", "kv_slot": some of these), "head_dim", "heads", "branch" (gate, up), "ffn",
    "latent", "expert", "choice" (what a router scores), "gate", "rank" (of an adapter), "virtual" (tokens of a prefix),
    "score" (of the value head).
    Initial values are normal with `std` where it is positive, or `uniform` of that spread, else the constant `fill`.
    A parameter that is not `trained` gets no gradient; `rate` multiplies its learning rate. `origin`: "base" weights
    are what a checkpoint of the model holds, "tuned" are those of them that are trained beside adapters, "adapter"
    parameters are added to it, and a "head" beside that over the vocabulary, or in its place, gives values."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    std: float = 0.0
    fill: float = 0.0
    decay: bool = True
    trained: bool = True
    uniform: bool = False
    rate: float = 1.0
    origin: Origin = "base"

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), f"{self.axes} does not name the dims of {self.shape}"


Specs = dict[str, ParameterSpec]  # by canonical name within the module described


def of_part(specs: Specs, part: str) -> Specs:
    """The specs of submodule `part`."""
    start = f"{part}."
    return {name.removeprefix(start): spec for name, spec in specs.items() if name.startswith(start)}


def _parts(**parts: Specs) -> Specs:
    return {f"{part}.{name}": spec for part, specs in parts.items() for name, spec in specs.items()}


def model_specs(config: ModelConfig) -> Specs:
    """Every parameter by canonical name: those of the layers in the order of the forward, then low-rank factors."""
    specs = _parts(embedding=table(config, "vocab", config.vocab_size))
    if config.learned_positions:
        specs |= _parts(position_embedding=table(config, "position", config.max_position_embeddings))
    if config.embedding_norm is not None:
        specs |= _parts(embedding_norm=norm(config.embedding_norm, config.hidden_size))
    layers = {layer: layer_specs(layer, config) for layer in dict.fromkeys(config.layers)}
    for i, layer in enumerate(config.layers):
        specs |= _parts(**{f"layers.{i}": layers[layer]})
    specs |= _parts(final_norm=norm(config.final_norm, config.hidden_size))
    if config.lm_head and not config.tie_word_embeddings:
        specs |= _parts(head=table(config, "vocab", config.vocab_size))
    if config.score:
        specs |= _parts(score=score(config))
    for path, name, chosen in config.adapted():
        weight = specs.get(f"{path}.weight", specs["embedding.weight"])  # a tied head shares it
        specs |= _parts(**{f"{path}.adapters.{name}": low_rank(chosen, weight, path, name)})
    return marked(specs, config)


def marked(specs: Specs, config: ModelConfig, path: str = "") -> Specs:
    """`specs` of the module `path` with how `config` trains them: beside adapters, not at all, at another rate."""
    if not (config.tuned or config.frozen or config.trained or config.rates):
        return specs
    return {name: _marked(spec, config, f"{path}.{name}".removeprefix(".")) for name, spec in specs.items()}


def _marked(spec: ParameterSpec, config: ModelConfig, name: str) -> ParameterSpec:
    origin = "tuned" if spec.origin == "base" and config.tunes(name) else spec.origin
    trained, rate = spec.trained and config.trains(name), spec.rate * config.rate_of(name)
    return replace(spec, origin=origin, trained=trained, rate=rate)


def layer_specs(layer: LayerConfig, model: ModelConfig) -> Specs:
    of_attention, of_mlp = layer.attention, layer.mlp
    if isinstance(of_attention, LatentAttentionConfig):
        attention = latent_attention(of_attention, model)
    else:
        attention = grouped_attention(of_attention, model)
    pre = norm(layer.norm, model.hidden_size)
    post = pre if layer.norm_placement == "sandwich" else {}
    return _parts(
        attention_norm=pre,
        attention=attention,
        attention_post_norm=post,
        mlp_norm=pre,
        mlp=moe(of_mlp, model) if isinstance(of_mlp, MoEConfig) else mlp(of_mlp, model),
        mlp_post_norm=post,
    )


def grouped_attention(config: AttentionConfig, model: ModelConfig) -> Specs:
    groups = {"kv_group": config.num_kv_heads}
    head = {"head_dim": config.head_dim}
    qkv = linear(model, groups | {"slot": config.q_per_group + 2} | head, "embed", model.hidden_size, config.qkv_bias)
    specs = _parts(qkv=qkv)
    if config.qk_norm is not None:
        for name, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
            specs |= _parts(**{name: norm(config.qk_norm.norm, *qk_norm_dim(config, heads))})
    if config.sinks:
        specs["sinks"] = _spec({"heads": config.num_heads}, std=model.init_std, decay=False)
    if model.num_prefix_tokens:
        prefix = groups | {"kv_slot": 2, "virtual": model.num_prefix_tokens} | head
        specs["prefix"] = _spec(prefix, std=model.init_std, origin="adapter")
    return specs | _parts(out=onto_residual(model, "heads", config.num_heads * config.head_dim, config.out_bias))


def qk_norm_dim(config: AttentionConfig, num_heads: int) -> tuple[int, str]:
    """Size and axis of what the norm of queries or keys runs over."""
    assert config.qk_norm is not None
    per_head = config.qk_norm.over == "head"
    return (config.head_dim, "head_dim") if per_head else (num_heads * config.head_dim, "heads")


def latent_attention(config: LatentAttentionConfig, model: ModelConfig) -> Specs:
    rank, latent = config.q_lora_rank, config.kv_lora_rank
    stored = {"latent": latent + config.rope_head_dim}  # of a token: compressed, and a rotary key
    queries = {"heads": config.num_heads, "head_dim": config.nope_head_dim + config.rope_head_dim}
    keys_values = {"heads": config.num_heads, "head_dim": config.nope_head_dim + config.v_head_dim}
    hidden = model.hidden_size
    if rank is None:
        specs = _parts(q=linear(model, queries, "embed", hidden))
    else:
        specs = _parts(
            q_down=linear(model, {"latent": rank}, "embed", hidden, config.bias),
            q_norm=norm(config.norm, rank, "latent"),
            q_up=linear(model, queries, "latent", rank),
        )
    specs |= _parts(
        kv_down=linear(model, stored, "embed", hidden, config.bias),
        kv_norm=norm(config.norm, latent, "latent"),
        kv_up=linear(model, keys_values, "latent", latent),
        out=onto_residual(model, "heads", config.num_heads * config.v_head_dim, config.bias),
    )
    if model.num_prefix_tokens:
        prefix = {"virtual": model.num_prefix_tokens} | stored
        specs["prefix"] = _spec(prefix, std=model.init_std, origin="adapter")
    return specs


def mlp(config: MLPConfig, model: ModelConfig, num_experts: int | None = None) -> Specs:
    """Of one MLP, or of the stacked MLPs of `num_experts`."""
    stack = {} if num_experts is None else {"expert": num_experts}
    ffn = config.ffn_hidden_size
    up, dims = ("gate_up", {"branch": 2, "ffn": ffn}) if config.gated else ("up", {"ffn": ffn})
    return _parts(
        **{up: linear(model, stack | dims, "embed", model.hidden_size, config.bias)},
        down=onto_residual(model, "ffn", ffn, config.bias, stack),
    )


def moe(config: MoEConfig, model: ModelConfig) -> Specs:
    return _parts(
        router=router(config.router, model),
        experts=mlp(config.expert, model, config.router.num_experts),
        shared={} if config.shared is None else mlp(config.shared, model),
        shared_gate=linear(model, {"gate": 1}, "embed", model.hidden_size) if config.shared_gate else {},
    )


def router(config: RouterConfig, model: ModelConfig) -> Specs:
    choices = {"choice": config.num_experts}
    specs = linear(model, choices, "embed", model.hidden_size, config.bias)
    if config.correction_bias:
        specs["correction_bias"] = _spec(choices, decay=False, trained=False)
    return specs


def linear(
    model: ModelConfig, out: dict[str, int], in_axis: str, in_size: int, bias: bool = False, std: float | None = None
) -> Specs:
    """Of a projection; `out` gives axis and size of each dim of the output. `std` is that of the model by default."""
    specs = {"weight": _spec(out | {in_axis: in_size}, std=model.init_std if std is None else std)}
    return specs | {"bias": _spec(out, decay=False)} if bias else specs


def onto_residual(model: ModelConfig, axis: str, size: int, bias: bool, stack: dict[str, int] | None = None) -> Specs:
    """Of a projection that adds to the residual: its initial spread keeps that from growing with depth (GPT-2)."""
    std = model.init_std / math.sqrt(2.0 * model.num_layers)
    return linear(model, (stack or {}) | {"embed": model.hidden_size}, axis, size, bias, std)


def table(model: ModelConfig, axis: str, num_rows: int) -> Specs:
    return {"weight": _spec({axis: num_rows, "embed": model.hidden_size}, std=model.init_std)}


def score(config: ModelConfig) -> Specs:
    """Of the value head."""
    return {"weight": _spec({"score": 1, "embed": config.hidden_size}, std=config.init_std, origin="head")}


def norm(config: NormConfig, size: int, axis: str = "embed") -> Specs:
    if not config.affine:
        return {}
    specs = {"weight": _spec({axis: size}, fill=0.0 if config.unit_offset else 1.0, decay=False)}
    return specs | {"bias": _spec({axis: size}, decay=False)} if config.kind == "layer" else specs


def low_rank(config: LowRankConfig, weight: ParameterSpec, path: str, name: str) -> Specs:
    """Factors a `[(expert,) rank, in_size]` and b `[(expert,) *shape of the slice, rank]` of an adapter; with DoRA the
    lengths m `[*shape of the slice]`, which begin as those of the rows of the weight.

    It belongs to slice `name` of the projection `path` with this `weight`. They begin as PEFT's: a uniform within
    1 / sqrt(in_size), b zeros."""
    stack = int(weight.axes[0] == "expert")
    sizes, axes = list(weight.shape), list(weight.axes)
    if (cut := slice_of(path, name)) is not None:
        dim = stack + cut.dim
        sizes[dim], axes[dim] = len(range(sizes[dim])[cut.start : cut.stop]), cut.axis
    a = ParameterSpec(
        (*sizes[:stack], config.rank, sizes[-1]),
        (*axes[:stack], "rank", axes[-1]),
        std=1 / math.sqrt(3 * sizes[-1]),
        uniform=True,
        origin="adapter",
    )
    b = ParameterSpec((*sizes[:-1], config.rank), (*axes[:-1], "rank"), rate=config.b_rate, origin="adapter")
    m = ParameterSpec(b.shape[:-1], b.axes[:-1], decay=False, origin="adapter")
    return {"a": a, "b": b} | ({"m": m} if config.dora else {})


def _spec(dims: dict[str, int], **how: Any) -> ParameterSpec:
    return ParameterSpec(tuple(dims.values()), tuple(dims), **how)
