"""The architectures of llama.cpp that files of GGUF may have: their keys, and which models they are.

Owns the table of them. A row says what of a file becomes which key of a `config.json`. The other way all have the same
keys, and a model is written as the architecture as which it is read again: no family needs to be named. Knows no files,
and never imports torch."""

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cordee.errors import Problem, ProblemError
from cordee.families.count import canonical_shapes
from cordee.families.family import KEYS, HFConfig, Keys
from cordee.families.lenses import MODEL, Scaling, Words, at, differences, words_of
from cordee.families.registry import ModelSpec, spec_from_hf
from cordee.families.rope import SCALINGS
from cordee.model import config as configs
from cordee.model.compare import OF_TRAINING
from cordee.model.config import AttentionConfig, ModelConfig, MoEConfig
from cordee.weights.gguf.tensors import rules

Values = Mapping[str, Any]  # of a file, by key
ROPE_FACTORS = "rope_freqs.weight"  # divides the frequency of each pair of RoPE's dims; no parameter of the model

# Keys that all have, without the architecture's name before them, and what `config.json` calls them.
_KEYS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "vocab_size": "vocab_size",
}
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # of special tokens, and their names in a file
# Tokens that end a turn or a message; llama.cpp stops at them as at eos.
FURTHER_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_EXPERTS = {"expert_used_count": "num_experts_per_tok", "expert_feed_forward_length": "moe_intermediate_size"}
Get = Callable[[str], Any]


def id_key(role: str) -> str:
    """The key of a file that holds the id of the special token with this role."""
    return f"tokenizer.ggml.{ROLES[role]}_token_id"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture as `name` has it, with experts or without.

    hf: keys of its `config.json` that the file does not have.
    keys: further keys of the file, and what `config.json` calls them.
    present: keys of `config.json` that say whether there are tensors of this name.
    derive: further keys of `config.json`, from those of the file.
    paired: RoPE rotates neighbouring pairs of dims of queries and keys."""

    name: str
    hf: HFConfig
    keys: Mapping[str, str] = field(default_factory=dict)
    present: Mapping[str, str] = field(default_factory=dict)
    derive: Callable[[Get], HFConfig] = lambda get: {}
    paired: bool = False

    @property
    def experts(self) -> bool:
        return "expert_count" in self.keys


def _gemma2(get: Get) -> HFConfig:
    """llama.cpp knows the 27B model, whose scores are scaled in another way, by its layers."""
    largest = get("block_count") == 46
    return {"query_pre_attn_scalar": get("embedding_length") // get("attention.head_count") if largest else _head(get)}


def _head(get: Get) -> int:
    return get("attention.key_length") or get("embedding_length") // get("attention.head_count")


def _model(name: str, model_type: str, activation: str = "silu", **more: Any) -> HFConfig:
    return {"architectures": [f"{name}ForCausalLM"], "model_type": model_type, "hidden_act": activation, **more}


_TANH = "gelu_pytorch_tanh"
ARCHITECTURES = (
    Architecture(
        name="llama",
        hf=_model("Llama", "llama"),
        present={"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"},
        paired=True,
    ),
    Architecture(
        name="llama",
        hf=_model("Mixtral", "mixtral", sliding_window=None),
        keys={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
        paired=True,
    ),
    Architecture(name="qwen2", hf=_model("Qwen2", "qwen2")),
    Architecture(name="qwen3", hf=_model("Qwen3", "qwen3")),
    Architecture(name="gemma", hf=_model("Gemma", "gemma", _TANH, hidden_activation=_TANH)),
    Architecture(
        name="gemma2",
        hf=_model("Gemma2", "gemma2", _TANH, hidden_activation=_TANH),
        keys={
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        derive=_gemma2,
    ),
    Architecture(
        name="qwen2moe",
        hf=_model("Qwen2Moe", "qwen2_moe", norm_topk_prob=False),
        keys={
            "expert_count": "num_experts",
            **_EXPERTS,
            "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
        },
        present={"qkv_bias": "blk.0.attn_q.bias"},
    ),
    Architecture(
        name="qwen3moe",
        hf=_model("Qwen3Moe", "qwen3_moe", norm_topk_prob=True),
        keys={"expert_count": "num_experts", **_EXPERTS},
    ),
)


def architecture_of(values: Values, where: str) -> Architecture:
    """The row of a file with these values. ProblemError if there is none."""
    name = values.get("general.architecture")
    experts = bool(values.get(f"{name}.expert_count"))
    for row in ARCHITECTURES:
        if (row.name, row.experts) == (name, experts):
            return row
    known = ", ".join(dict.fromkeys(row.name for row in ARCHITECTURES))
    why = f"no family reads this architecture{' with experts' * experts}; known are {known}"
    raise ProblemError.of(f"{where}: general.architecture", name, why, "take the Hugging Face model", "unknown")


def hf_config(row: Architecture, values: Values, names: Collection[str], factors: Sequence[float] | None) -> HFConfig:
    """The `config.json` of a file with these values and tensors of these names.

    factors: what `ROPE_FACTORS` holds, if it is there.
    ProblemError for a value that is no number, and for more layers than there are tensors."""

    def get(key: str) -> Any:
        value = values.get(f"{row.name}.{key}")
        if value is not None and type(value) not in (int, float):
            raise ProblemError([_strange(f"{row.name}.{key}", value, "it is no number")])
        return shortest(value) if isinstance(value, float) else value

    found = {name: get(key) for key, name in {**_KEYS, **row.keys}.items()}
    found |= {f"{role}_token_id": values.get(id_key(role)) for role in ("bos", "eos", "pad")}
    further = (values.get(key) for key in FURTHER_ENDS)
    ends = dict.fromkeys(i for i in (found["eos_token_id"], *further) if i is not None)
    if len(ends) > 1:
        found["eos_token_id"] = list(ends)
    hf = row.hf | {name: value for name, value in found.items() if value is not None}
    hf |= {name: tensor in names for name, tensor in row.present.items()}
    sizes = [hf.get(name) for name in ("num_attention_heads", "hidden_size")]
    if all(isinstance(size, int) and size > 0 for size in sizes):  # else reading the config reports them
        hf |= {"head_dim": _head(get), **row.derive(get)}
        hf.setdefault("num_key_value_heads", hf["num_attention_heads"])
    if hf.get("head_dim") and (rotated := get("rope.dimension_count")) not in (None, hf["head_dim"]):
        hf["partial_rotary_factor"] = rotated / hf["head_dim"]
    if (layers := hf.get("num_hidden_layers", 0)) > len(names):
        raise ProblemError([_strange(f"{row.name}.block_count", layers, f"the file has only {len(names)} tensors")])
    hf["rope_theta"] = get("rope.freq_base") or 10000.0
    if not 0 < hf["rope_theta"] < math.inf:
        raise ProblemError([_strange(f"{row.name}.rope.freq_base", hf["rope_theta"], "it is no positive number")])
    kind = values.get(f"{row.name}.rope.scaling.type")
    if not isinstance(kind, str | None):
        raise ProblemError([_strange(f"{row.name}.rope.scaling.type", kind, "it is no text")])
    if (scaling := _scaling(get, kind, factors, hf)) is not None:
        hf["rope_scaling"] = scaling
    hf["tie_word_embeddings"] = "output.weight" not in names
    return hf


def further_ends(config: HFConfig, eos: int | None) -> tuple[dict[str, int], list[int]]:
    """The tokens besides `eos` that a `config.json` says end a text, by the key of a file; those it has no key for."""
    given = config.get("eos_token_id")
    ends = [i for i in given if i != eos] if isinstance(given, list) else []
    return dict(zip(FURTHER_ENDS, ends, strict=False)), ends[len(FURTHER_ENDS) :]


def shortest(value: float) -> float:
    """The number with the fewest digits that is `value` in float32: 1e-05 for what is stored of it."""
    with np.errstate(over="ignore"):  # what is beyond float32 is infinite
        return float(str(np.float32(value)))


def _strange(key: str, value: object, why: str) -> Problem:
    return Problem(key, str(value)[:80], why, "take another file of the model")


def _scaling(get: Get, kind: str | None, factors: Sequence[float] | None, hf: HFConfig) -> HFConfig | None:
    """The `rope_scaling` of a `config.json`, of the type `kind`."""
    original = get("rope.scaling.original_context_length")
    if factors is not None:
        return _llama3(factors, original or _LLAMA3_LENGTH, hf)
    factor = get("rope.scaling.factor") or get("rope.scale_linear")
    if kind == "none" or (kind in (None, "linear") and factor in (None, 0, 1)):
        return None
    scaling: HFConfig = {"rope_type": kind or "linear", "factor": factor}
    if original is not None and kind != "linear":
        scaling["original_max_position_embeddings"] = original
    return scaling


_LLAMA3_LENGTH, _LLAMA3_LOW, _LLAMA3_HIGH = 8192, 1.0, 4.0  # of all models that were published


def _llama3(factors: Sequence[float], original: int, hf: HFConfig) -> HFConfig:
    """The scaling that makes `factors`, given one by one: computed from the pair with the lowest frequency."""
    wavelength = 2 * math.pi * hf["rope_theta"] ** (1 - 1 / len(factors))
    kept = (original / wavelength - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    kept = min(max(kept, 0.0), 1.0)
    slowed = 1 / factors[-1] - kept
    factor = (1 - kept) / slowed if slowed > 0 and kept < 1 else 1.0
    return {
        "rope_type": "llama3",
        "factor": float(f"{factor:.5g}"),
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": original,
    }


def _outside_tensors(words: Words) -> Scaling | None:
    """The scaling, but not Llama 3's: its factors are a tensor, and as keys they would scale all once more."""
    scaling = words["rope_scaling"]
    return None if isinstance(scaling, configs.Llama3Scaling) else scaling


# The keys of every file in their order, without the architecture's name before them, and the words of the model there.
_WRITTEN: Keys = {
    **{key: KEYS[name] for key, name in _KEYS.items()},
    "final_logit_softcapping": "output_logit_softcapping",
    "attention.key_length": "kv_channels",
    "attention.value_length": "kv_channels",
    "attention.sliding_window": "interleave_sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "rope.freq_base": "rotary_base",
    "rope.dimension_count": lambda words: round(words["rotary_percent"] * words["kv_channels"]),
    "rope.scaling.type": lambda words: SCALINGS.get(type(_outside_tensors(words))),
    "rope.scaling.factor": lambda words: getattr(_outside_tensors(words), "factor", None),
    "rope.scaling.original_context_length": lambda words: getattr(
        words["rope_scaling"], "original_max_position_embeddings", None
    ),
    "expert_count": "num_experts",
    "expert_used_count": "moe_router_topk",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": lambda words: at("layers.mlp.shared.ffn_hidden_size").get(words[MODEL]),
}


def choose(spec: ModelSpec, factors: Sequence[float] | None) -> tuple[Architecture, dict[str, Any], list[str]]:
    """The architecture that a model is written as, the values that describe it, and warnings.

    factors: what `ROPE_FACTORS` will hold, if it is needed.
    ProblemError if llama.cpp has no such model, as far as it is known here."""
    config, notes = _in_context(spec.config)
    experts, words = isinstance(config.layers[0].mlp, MoEConfig), words_of(config)
    described = {key: words[word] if isinstance(word, str) else word(words) for key, word in _WRITTEN.items()}
    tried: list[tuple[bool, int, str, dict[str, str]]] = []
    for row in (row for row in ARCHITECTURES if row.experts == experts):
        values: dict[str, Any] = {"general.architecture": row.name}
        values |= {f"{row.name}.{key}": value for key, value in described.items() if value is not None}
        readable, differing = _differences(config, row, values, factors)
        if not differing:
            return row, values, notes
        tried.append((not readable, len(differing), row.name, differing))
    *_, name, differing = min(tried, key=lambda row: row[:3])
    more = f"; and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
    why = f"family {spec.family.name}: none of the models of llama.cpp that are known here is such a one; the nearest, "
    why += f"{name}, differs: {'; '.join([*differing.values()][:_SHOWN])}{more}"
    fix = "choose another format"
    raise ProblemError.of("--save-model-type", "gguf", why, fix, "inexpressible", limit=list(differing))


_SHOWN = 6  # differences that are listed


def _in_context(config: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """A model without what it does only beyond a length, in a context that is no longer; and warnings.

    That is a window that all layers have, scores scaled by the logarithm of positions, and a base that grows."""
    limits, layers = set(), []
    same_window = len({getattr(layer.attention, "window", None) for layer in config.layers}) == 1
    for layer in config.layers:
        attention = layer.attention
        if isinstance(attention, AttentionConfig):
            if attention.window is not None and same_window:
                limits.add(attention.window)
                attention = replace(attention, window=None)
            if isinstance(attention.query_scaling, configs.LogNScaling):
                limits.add(attention.query_scaling.length)
                attention = replace(attention, query_scaling=None)
            scaling = attention.rope and attention.rope.scaling
            if attention.rope and isinstance(scaling, configs.DynamicNTKScaling | configs.QwenNTKScaling):
                limits.add(scaling.original_max_position_embeddings)
                attention = replace(attention, rope=replace(attention.rope, scaling=None))
        layers.append(replace(layer, attention=attention))
    if not limits:
        return config, []
    length = min(*limits, config.max_position_embeddings)
    note = f"the context is {length} tokens: llama.cpp does not know what this model does beyond them"
    return replace(config, layers=tuple(layers), max_position_embeddings=length), [note]


def _differences(
    config: ModelConfig, row: Architecture, values: Values, factors: Sequence[float] | None
) -> tuple[bool, dict[str, str]]:
    """Whether `values` can be read as a model, and where it would be another than `config`: in words, by place."""
    found = rules(config, row.paired)
    without = (re.sub(r"\.\d+\.", ".*.", name) for name in canonical_shapes(config) if name not in found)
    differing = {name: f"it has no tensor for {name}" for name in without}
    names = {name for rule in found.values() for name in rule.foreign}
    try:
        read = spec_from_hf(hf_config(row, values, names, factors), row.name).config
    except ProblemError as error:
        return False, differing | {p.option: f"{p.option}: {p.why}" for p in error.problems}
    pairs = differences(config, read, without=OF_TRAINING, stored=shortest)
    return True, differing | {place: f"{place} is {ours}, there {theirs}" for place, (ours, theirs) in pairs.items()}
