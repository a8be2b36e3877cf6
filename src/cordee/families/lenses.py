"""The options of a model and the places in a `ModelConfig` that they set: one table, for both directions.

Owns a lens for each word: how to read a word from a model, and how to put a word into one. Words are named as the
options; a few, such as `activation`, stand for several. Of layers that differ, the first with the place is read. Knows
no family: a family declares which key of its `config.json` holds a word."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from cordee.config.option import to_flag
from cordee.families.rope import mscale
from cordee.model import config as configs
from cordee.model.compare import differences as differing_places
from cordee.model.compare import rounded
from cordee.model.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from cordee.model.options import FeatureOptions

Words = Mapping[str, Any]  # values by the name of a lens
Scaling = configs.LinearScaling | configs.Llama3Scaling | configs.YarnScaling  # RoPE scalings that options can set
Draft = dict[str, Any]  # the fields of an unfinished `ModelConfig`

LATENT_EPS = 1e-6  # of the norms of compressed vectors, in every model that has them
MODEL = "model"  # the word of a whole `ModelConfig`
PATTERN = ("first_k_dense_replace", "moe_layer_freq")  # which layers have experts, together
_ABSENT = object()


@dataclass(frozen=True, kw_only=True)
class Lens:
    """How to read a word from a model, and to put a word into a draft that has the words before it in the table.

    neutral: the word of a model without the feature.
    places: the places in a `ModelConfig` that the word sets, so that differences there are named by it."""

    get: Callable[[ModelConfig], Any]
    put: Callable[[Draft, Any], Draft]
    neutral: Any = None
    places: tuple[str, ...] = ()


def _read(node: Any, place: str) -> Any:
    """What is at `place` below `node`, in the first of several layers that have it; `_ABSENT` if nothing has."""
    if isinstance(node, tuple):
        return next((value for item in node if (value := _read(item, place)) is not _ABSENT), _ABSENT)
    name, _, rest = place.partition(".")
    value = getattr(node, name, _ABSENT)
    return _read(value, rest) if rest and value is not None and value is not _ABSENT else _ABSENT if rest else value


def _written(node: Any, place: str, value: Any) -> Any:
    """`node` with `value` at `place`, in all layers that have it."""
    if isinstance(node, tuple):
        done = {id(item): _written(item, place, value) for item in node}
        return tuple(done[id(item)] for item in node)
    name, _, rest = place.partition(".")
    if isinstance(node, dict):
        return {**node, name: _written(node.get(name), rest, value) if rest else value}
    if name not in getattr(node, "__dataclass_fields__", ()):
        return node
    return replace(node, **{name: _written(getattr(node, name), rest, value) if rest else value})


def at(*places: str, neutral: Any = None, read: Mapping[Any, Any] | None = None) -> Lens:
    """The word in all of these `places`; `read` maps values to words where they differ."""
    meant = {word: value for value, word in read.items()} if read else {}

    def get(config: ModelConfig) -> Any:
        value = next((value for value in (_read(config, place) for place in places) if value is not _ABSENT), None)
        word = read.get(value) if read else value
        return neutral if word is None else word

    def put(draft: Draft, word: Any) -> Draft:
        for place in places:
            draft = _written(draft, place, meant.get(word, word))
        return draft

    return Lens(get=get, put=put, neutral=neutral, places=places)


def _each(draft: Draft, field: str, change: Callable[[int, Any], Any]) -> Draft:
    """`draft` with this field of every layer changed, given the layer's number and what it has."""
    layers = (replace(layer, **{field: change(i, getattr(layer, field))}) for i, layer in enumerate(draft["layers"]))
    return {**draft, "layers": tuple(layers)}


def _position_type(config: ModelConfig) -> str:
    if config.learned_positions:
        return "learned_absolute"
    return "alibi" if _read(config, "layers.attention.alibi") is True else "rope"


def _put_position_type(draft: Draft, kind: str) -> Draft:
    draft = _written(draft, "learned_positions", kind == "learned_absolute")
    draft = _written(draft, "layers.attention.alibi", kind == "alibi")
    return _written(draft, "layers.attention.rope", configs.RopeConfig() if kind == "rope" else None)


def _scaling(config: ModelConfig) -> tuple[Scaling | None, configs.RopeScaling | None]:
    """The RoPE scaling as a pair, of which one is None: one that options can set, one that they cannot."""
    scaling = at("layers.attention.rope.scaling").get(config)
    return (scaling, None) if isinstance(scaling, Scaling) else (None, scaling)


def scaling_of(words: Words) -> configs.RopeScaling | None:
    """The RoPE scaling of a model with these words."""
    return words["rope_scaling"] or _scaling(words[MODEL])[1]


def _put_latent(draft: Draft) -> Draft:
    def latent(number: int, plain: AttentionConfig) -> LatentAttentionConfig:
        return LatentAttentionConfig(
            num_heads=plain.num_heads,
            q_lora_rank=None,
            kv_lora_rank=1,
            nope_head_dim=1,
            rope_head_dim=1,
            v_head_dim=1,
            norm=configs.NormConfig(kind="rms", eps=LATENT_EPS),
            rope=plain.rope or configs.RopeConfig(),
            scale=1.0,
            bias=plain.qkv_bias,
        )

    return _each(draft, "attention", latent)


def _sharper(attention: LatentAttentionConfig, strength: float) -> float:
    """The factor by which YaRN of this strength (mscale) multiplies queries and keys."""
    scaling = attention.rope.scaling
    return mscale(scaling.factor, strength) if isinstance(scaling, configs.YarnScaling) else 1.0


def _put_strength(draft: Draft, strength: float) -> Draft:
    def scaled(number: int, attention: Any) -> Any:
        if not isinstance(attention, LatentAttentionConfig):
            return attention
        return replace(attention, scale=attention.key_dim**-0.5 * _sharper(attention, strength) ** 2)

    return _each(draft, "attention", scaled)


def _strength(config: ModelConfig) -> float:
    """The strength (mscale_all_dim) with which YaRN scales attention scores; 0.0 if it does not."""
    attention = config.layers[0].attention
    if not isinstance(attention, LatentAttentionConfig) or not isinstance(attention.rope.scaling, configs.YarnScaling):
        return 0.0
    sharper = attention.scale / attention.key_dim**-0.5
    return 0.0 if math.isclose(sharper, 1.0) else (math.sqrt(sharper) - 1.0) / (_sharper(attention, 1.0) - 1.0)


def _latent_size(field: str) -> Lens:
    """The size of a part of a head, which sets the softmax scale too."""
    plain = at(f"layers.attention.{field}")
    return replace(plain, put=lambda draft, size: _put_strength(plain.put(draft, size), 0.0))


def _has_qk_norm(config: ModelConfig) -> bool:
    attention = config.layers[0].attention
    return isinstance(attention, LatentAttentionConfig) or attention.qk_norm is not None


def _put_qk_norm(draft: Draft) -> Draft:
    norm = replace(draft["final_norm"], unit_offset=False)
    return _written(draft, "layers.attention.qk_norm", configs.QKNormConfig(norm=norm))


def _rotary_percent(config: ModelConfig) -> float:
    attention = config.layers[0].attention
    if isinstance(attention, LatentAttentionConfig) or not attention.rope:
        return 1.0
    return (attention.rope.rotary_dim or attention.head_dim) / attention.head_dim


def _put_rotary_percent(draft: Draft, percent: float) -> Draft:
    def rotated(number: int, attention: Any) -> Any:
        dim = round(attention.key_dim * percent)
        return _written(attention, "rope.rotary_dim", None if dim == attention.key_dim else dim)

    return _each(draft, "attention", rotated)


def _query_scalar(config: ModelConfig) -> float | None:
    attention = config.layers[0].attention
    if isinstance(attention, LatentAttentionConfig):
        return None
    return attention.head_dim if attention.scale is None else attention.scale**-2


def _windows(every: int) -> Lens:
    """The sliding window of every `every`-th layer, where the others have none."""

    def get(config: ModelConfig) -> int | None:
        found = [getattr(layer.attention, "window", None) for layer in config.layers]
        return found[0] if found == [None if i % every else found[0] for i in range(len(found))] else None

    def put(draft: Draft, width: int) -> Draft:
        def narrowed(number: int, attention: Any) -> Any:
            return attention if number % every else _written(attention, "window", width)

        return _each(draft, "attention", narrowed)

    return Lens(get=get, put=put, places=("layers.attention.window",))


def sparse_layers(num_layers: int, words: Words) -> list[bool]:
    """Which layers of an MoE model have experts: after the dense ones, those whose number the frequency divides."""
    first, every = words.get("first_k_dense_replace") or 0, words.get("moe_layer_freq") or 1
    return [number >= first and number % every == 0 for number in range(num_layers)]


def _put_experts(draft: Draft, count: int | None) -> Draft:
    def mixture(number: int, mlp: configs.MLPConfig) -> configs.MoEConfig:
        return configs.MoEConfig(router=configs.RouterConfig(num_experts=count or 1, top_k=1), expert=mlp)

    return _each(draft, "mlp", mixture) if count else draft


def _pattern(name: str) -> Lens:
    """Where experts begin, or how often they come, if such a rule gives the layers that have them."""

    def get(config: ModelConfig) -> int | None:
        have = [isinstance(layer.mlp, configs.MoEConfig) for layer in config.layers]
        if not any(have):
            return _NO_PATTERN[name]
        first, *more = (i for i, sparse in enumerate(have) if sparse)
        steps = (more[0] - first,) if more else range(1, 1 + len(have))
        rules = ({PATTERN[0]: first, PATTERN[1]: every} for every in steps)
        return next((rule[name] for rule in rules if sparse_layers(len(have), rule) == have), _NO_PATTERN[name])

    def put(draft: Draft, value: int) -> Draft:
        sparse = sparse_layers(len(draft["layers"]), {name: value})
        return _each(draft, "mlp", lambda i, mlp: mlp if sparse[i] else getattr(mlp, "expert", mlp))

    return Lens(get=get, put=put, neutral=_NO_PATTERN[name])


_NO_PATTERN = {PATTERN[0]: None, PATTERN[1]: 1}


def _shared_experts(config: ModelConfig) -> int | float | None:
    shared, width = (_read(config, f"layers.mlp.{part}") for part in ("shared", "expert.ffn_hidden_size"))
    if shared is _ABSENT or shared is None:
        return None
    count = shared.ffn_hidden_size / width
    return int(count) if count.is_integer() else count


def _put_shared_experts(draft: Draft, count: int) -> Draft:
    def shared(number: int, mlp: Any) -> Any:
        if isinstance(mlp, configs.MLPConfig):
            return mlp
        return replace(mlp, shared=replace(mlp.expert, ffn_hidden_size=count * mlp.expert.ffn_hidden_size))

    return _each(draft, "mlp", shared) if count else draft


def _balancing(config: ModelConfig) -> str | None:
    """Megatron's name of a routing. Its softmax over the top-k equals that over all experts, normalised."""
    router = _read(config, "layers.mlp.router")
    if router is _ABSENT:
        return None
    if router.num_groups > 1:
        return "group_limited_greedy"
    return "aux_loss" if router.score_when == "after" or router.normalise else "softmax_topk"


def _put_routed_scale(draft: Draft, scale: float) -> Draft:
    """DeepSeek-V2 scales only router weights that are not normalised."""
    router = _read(draft["layers"], "mlp.router")
    limited = router is not _ABSENT and router.num_groups > 1 and router.normalise
    return draft if limited else _written(draft, "layers.mlp.router.scale", scale)


def _switch(get: Callable[[ModelConfig], bool], put: Callable[[Draft], Draft], *places: str) -> Lens:
    """A feature that a model has or has not; `put` adds it."""
    return Lens(get=get, put=lambda draft, on: put(draft) if on else draft, neutral=False, places=places)


_POSITIONS = ("learned_positions", "layers.attention.alibi", "layers.attention.rope")
_NORMS = ("layers.norm", "final_norm", "layers.attention.qk_norm.norm", "embedding_norm")

# The sizes and the form of a model; every model has a value of each.
FORM = {
    "vocab_size": at("vocab_size"),
    "num_layers": replace(at("num_layers"), put=lambda draft, count: draft | {"layers": draft["layers"] * count}),
    "hidden_size": at("hidden_size"),
    "ffn_hidden_size": at("layers.mlp.ffn_hidden_size", "layers.mlp.expert.ffn_hidden_size"),
    "num_attention_heads": at("layers.attention.num_heads"),
    "num_query_groups": replace(
        at("layers.attention.num_kv_heads", "layers.attention.num_heads"), put=at("layers.attention.num_kv_heads").put
    ),
    "kv_channels": at("layers.attention.head_dim", "layers.attention.key_dim"),
    "max_position_embeddings": at("max_position_embeddings"),
    "position_embedding_type": Lens(get=_position_type, put=_put_position_type, places=_POSITIONS),
    "rotary_base": at("layers.attention.rope.theta", neutral=10000.0),
    "rope_scaling": replace(at("layers.attention.rope.scaling"), get=lambda config: _scaling(config)[0]),
    "normalization": at(*(f"{norm}.kind" for norm in _NORMS), read={"rms": "RMSNorm", "layer": "LayerNorm"}),
    "norm_epsilon": at(*(f"{norm}.eps" for norm in _NORMS)),
    "activation": at("layers.mlp.activation", "layers.mlp.expert.activation"),
    "gated": at("layers.mlp.gated", "layers.mlp.expert.gated"),
    "qkv_bias": at("layers.attention.qkv_bias", "layers.attention.bias"),
    "dense_bias": at("layers.attention.out_bias", "layers.attention.bias"),
    "mlp_bias": at("layers.mlp.bias", "layers.mlp.expert.bias"),
    "tied": at("tie_word_embeddings"),
    "init_method_std": at("init_std"),
    "attention_dropout": at("attention_dropout"),
    "hidden_dropout": at("hidden_dropout", "embedding_dropout"),
}

# Further features that a model may have: `FeatureOptions`.
FEATURES = {
    "multi_head_latent_attention": _switch(
        lambda config: isinstance(config.layers[0].attention, LatentAttentionConfig), _put_latent, "layers.attention"
    ),
    "q_lora_rank": at("layers.attention.q_lora_rank"),
    "kv_lora_rank": at("layers.attention.kv_lora_rank"),
    "qk_nope_head_dim": _latent_size("nope_head_dim"),
    "qk_rope_head_dim": _latent_size("rope_head_dim"),
    "v_head_dim": at("layers.attention.v_head_dim"),
    "rope_scaling_mscale_all_dim": Lens(get=_strength, put=_put_strength, neutral=0.0),
    "qk_layernorm": _switch(_has_qk_norm, _put_qk_norm, "layers.attention.qk_norm"),
    "rotary_percent": Lens(
        get=_rotary_percent, put=_put_rotary_percent, neutral=1.0, places=("layers.attention.rope.rotary_dim",)
    ),
    "sliding_window": _windows(1),
    "interleave_sliding_window": _windows(2),
    "attn_logit_softcapping": at("layers.attention.softcap"),
    "query_pre_attn_scalar": Lens(
        get=_query_scalar,
        put=lambda draft, scalar: _written(draft, "layers.attention.scale", scalar**-0.5) if scalar else draft,
        places=("layers.attention.scale",),
    ),
    "post_norm": at("layers.norm_placement", neutral=False, read={"sandwich": True, "pre": False}),
    "add_rmsnorm_offset": at("layers.norm.unit_offset", "final_norm.unit_offset", neutral=False),
    "embed_layernorm": _switch(
        lambda config: config.embedding_norm is not None,
        lambda draft: draft | {"embedding_norm": draft["final_norm"]},
        "embedding_norm",
    ),
    "apply_residual_connection_post_layernorm": at("layers.residual_from_norm", neutral=False),
    "lm_norm_weight": at("norm_head", neutral=False),
    "scale_emb": at("embedding_scale", neutral=1.0),
    "input_embeds_norm": _switch(
        lambda config: math.isclose(config.embedding_scale, math.sqrt(config.hidden_size)),
        lambda draft: draft | {"embedding_scale": draft["hidden_size"] ** 0.5},
    ),
    "output_multiplier_scale": at("logit_scale", neutral=1.0),
    "dim_model_base": Lens(
        get=lambda config: None if config.logit_scale == 1.0 else config.logit_scale * config.hidden_size,
        put=lambda draft, base: draft | {"logit_scale": base / draft["hidden_size"]} if base else draft,
    ),
    "output_logit_softcapping": at("logit_softcap"),
    "scale_depth": Lens(
        get=lambda config: (
            ((scale := config.layers[0].residual_scale) != 1.0 and scale * config.num_layers**0.5) or None
        ),
        put=lambda draft, depth: (
            _written(draft, "layers.residual_scale", depth / len(draft["layers"]) ** 0.5) if depth else draft
        ),
        places=("layers.residual_scale",),
    ),
    "num_experts": replace(
        at("layers.mlp.router.num_experts"), put=_put_experts, places=("layers.mlp", "layers.mlp.router.num_experts")
    ),
    "moe_router_topk": at("layers.mlp.router.top_k"),
    **{name: _pattern(name) for name in PATTERN},
    "moe_intermediate_size": at("layers.mlp.expert.ffn_hidden_size"),
    "n_shared_experts": Lens(get=_shared_experts, put=_put_shared_experts, places=("layers.mlp.shared",)),
    "moe_router_load_balancing_type": Lens(
        get=_balancing, put=lambda draft, kind: _written(draft, "layers.mlp.router.normalise", kind == "aux_loss")
    ),
    "moe_router_num_groups": at("layers.mlp.router.num_groups", neutral=1),
    "topk_group": at("layers.mlp.router.top_groups", neutral=1),
    "norm_topk_prob": _switch(
        at("layers.mlp.router.normalise", neutral=False).get,
        lambda draft: _written(draft, "layers.mlp.router.normalise", True),
        "layers.mlp.router.normalise",
    ),
    "routed_scaling_factor": replace(at("layers.mlp.router.scale", neutral=1.0), put=_put_routed_scale),
}

# The training of experts.
TRAINING = {
    "moe_aux_loss_coeff": at("layers.mlp.balance.expert", neutral=0.0),
    "moe_expert_capacity_factor": at("layers.mlp.capacity.factor"),
}

LENSES = {**FORM, **FEATURES, **TRAINING}
assert FEATURES.keys() == {field.name for field in fields(FeatureOptions)}

_FLAGS = {  # of words that are not named as an option
    "activation": "the activation",
    "dense_bias": "--add-dense-bias",
    "gated": "the activation",
    "mlp_bias": "--add-bias-linear",
    "qkv_bias": "--add-qkv-bias",
    "rope_scaling": "--rope-scaling-type",
    "tied": "--untie-embeddings-and-output-weights",
}


def words_of(config: ModelConfig) -> dict[str, Any]:
    """Every word of the table, read from `config`, and `MODEL`: `config` itself, for what has no word."""
    return {**{name: lens.get(config) for name, lens in LENSES.items()}, MODEL: config}


def features_of(config: ModelConfig) -> dict[str, Any]:
    """The features of `config` that are not neutral."""
    words = {name: lens.get(config) for name, lens in FEATURES.items()}
    attention = config.layers[0].attention
    found = {name: value for name, value in words.items() if not same(value, FEATURES[name].neutral)}
    if isinstance(attention, AttentionConfig) and same(found.get("query_pre_attn_scalar"), attention.head_dim):
        del found["query_pre_attn_scalar"]
    return found


def model_of(words: Words) -> ModelConfig:
    """The model with these words, and the defaults of `ModelConfig` for everything else."""
    norm = configs.NormConfig(kind="layer", eps=1e-5)
    layer = configs.LayerConfig(
        attention=AttentionConfig(num_heads=1, num_kv_heads=1, head_dim=1),
        mlp=configs.MLPConfig(ffn_hidden_size=1, activation="gelu", gated=False),
        norm=norm,
    )
    draft: Draft = {"layers": (layer,), "final_norm": norm}
    for name, lens in LENSES.items():
        if name in words:
            draft = lens.put(draft, words[name])
    return ModelConfig(**draft)


def same(ours: Any, theirs: Any) -> bool:
    """Whether two values of a word are equal: numbers up to rounding, False as None."""
    if isinstance(ours, int | float) and isinstance(theirs, int | float) and ours and theirs:
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return (ours or None) == (theirs or None)


def missing(config: ModelConfig, wanted: Words) -> dict[str, Any]:
    """The features that are `wanted` and differ in `config`."""
    there = {name: FEATURES[name].get(config) for name in {*wanted, *PATTERN}}
    found = {name: value for name, value in wanted.items() if not same(there[name], value)}
    if wanted.get("norm_topk_prob") and FEATURES["moe_router_num_groups"].get(config) != 1:
        found.pop("routed_scaling_factor", None)  # DeepSeek-V2 scales only weights that are not normalised
    pattern = {name: wanted[name] for name in PATTERN if name in wanted}
    if pattern:
        found = {name: value for name, value in found.items() if name not in PATTERN}
        have = [isinstance(layer.mlp, configs.MoEConfig) for layer in config.layers]
        asked = sparse_layers(config.num_layers, {**{name: there[name] for name in PATTERN}, **pattern})
        dense = not any(have) and all(asked)  # neutral values, for a model without experts
        found |= {} if have == asked or dense else pattern
    return found


def flag_of(word: str) -> str:
    """The flag of a word, for messages."""
    return _FLAGS.get(word, to_flag(word))


def differences(ours: ModelConfig, theirs: ModelConfig, **how: Any) -> dict[str, tuple[Any, Any]]:
    """The differences of two models, as pairs of values: by flag or, where no flag sets the place, by place.

    how: arguments of `model.compare.differences`."""
    found: dict[str, tuple[Any, Any]] = {}
    for place, values in differing_places(ours, theirs, **how).items():
        words = ((flag_of(name), (_shown(name, ours), _shown(name, theirs))) for name in _words_at(place))
        whole = (pair for pair in words if not same(*pair[1]) and not all(map(is_dataclass, pair[1])))
        flag, pair = next(whole, (place, values))
        found[flag] = pair
    return found


def _shown(name: str, config: ModelConfig) -> Any:
    value = LENSES[name].get(config)
    return rounded(value) if isinstance(value, float) else value


def _words_at(place: str) -> list[str]:
    """The words that set a place of a model, or one around it, the nearest first."""
    places = {name: [at for at in lens.places if f"{place}.".startswith(f"{at}.")] for name, lens in LENSES.items()}
    around = {name: max(map(len, found), default=0) for name, found in places.items()}
    return sorted((name for name, length in around.items() if length), key=lambda name: -around[name])
