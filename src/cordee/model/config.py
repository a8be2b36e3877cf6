"""What a model is: shapes and mathematics, free of torch, files and placement.

Owns the words in which a model is described. A family reads its `config.json` into a `ModelConfig`; the model is built
from nothing else. Whatever differs between layers differs in their `LayerConfig`, so no model code asks for a family or
a layer number."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import accumulate
from typing import Literal, NamedTuple

from cordee.errors import Problem, raise_all

# Far above any model there is. What is larger is a slip or a damaged file, and would fill the memory with lists of
# layers and tensors long before anything else is found to be wrong.
MAX_LAYERS = 10_000
MAX_EXPERTS = 1_000_000  # of all layers together
MAX_WIDTH = 2**24  # channels of the residual stream, inside an MLP, and of all heads together
MAX_TOKENS = 2**31 - 1  # of a vocabulary or a sequence: ids and positions are int32 where they are stored


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """Root mean square norm (Zhang & Sennrich 2019) or layer norm (Ba et al. 2016), over the last dim.

    With `unit_offset` the stored weight is the distance from one (Gemma); without `affine` there is no weight at all.
    """

    kind: Literal["rms", "layer"]
    eps: float
    unit_offset: bool = False
    affine: bool = True


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All positions divided by `factor` (Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class DynamicNTKScaling:
    """The base grows with a sequence that is longer than `original_max_position_embeddings`."""

    factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class QwenNTKScaling:
    """Qwen's dynamic NTK: in evaluation the base grows in steps of powers of two of the training length."""

    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """Frequencies blended between kept and stretched by their number of rotations (Peng et al. 2023).

    `attention_factor` multiplies cos and sin. `truncate` rounds the borders of the blend to whole dims."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Frequency scaling of Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, blended between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LongRopeScaling:
    """A stretch for every pair of dims (Ding et al. 2024); the long list from the original length on."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float = 1.0


RopeScaling = LinearScaling | DynamicNTKScaling | QwenNTKScaling | YarnScaling | Llama3Scaling | LongRopeScaling


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (Su et al. 2021) on halves: dims j and j + half of the first `rotary_dim` (None: all).

    Families whose files pair neighbouring dims are brought into this order by their weight rules."""

    theta: float = 10000.0
    rotary_dim: int | None = None
    scaling: RopeScaling | None = None


@dataclass(frozen=True, kw_only=True)
class LogNScaling:
    """In evaluation, queries at positions past `length` are multiplied by log_length(position + 1) (Su 2021; Qwen)."""

    length: int


@dataclass(frozen=True, kw_only=True)
class TemperatureScaling:
    """Queries are multiplied by 1 + scale * log(1 + floor((position + 1) / floor_scale)) (Llama 4)."""

    scale: float
    floor_scale: float


@dataclass(frozen=True, kw_only=True)
class QKNormConfig:
    """Norm of queries and keys: over each head, or over `all` heads together (OLMo 2); before or after rope."""

    norm: NormConfig
    over: Literal["head", "all"] = "head"
    after_rope: bool = False


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Self-attention with query groups.

    `scale` multiplies the scores (None: head_dim ** -0.5). `window` w: key j is visible to query i iff 0 <= i - j < w.
    `chunk` c: only keys of the same c positions. `softcap` c: scores become c * tanh(score / c). `sinks`: one learned
    score a head joins the softmax and drops out. `alibi`: scores fall by a slope a head times the distance."""

    num_heads: int
    num_kv_heads: int  # groups; equal to num_heads for multi-head, 1 for multi-query attention
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    rope: RopeConfig | None = None
    alibi: bool = False
    scale: float | None = None
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: bool = False
    qk_norm: QKNormConfig | None = None
    query_scaling: LogNScaling | TemperatureScaling | None = None

    @property
    def q_per_group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def key_dim(self) -> int:
        return self.head_dim


@dataclass(frozen=True, kw_only=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2): keys and values from one compressed vector a token.

    Each head has `nope_head_dim` dims without and `rope_head_dim` dims with rotary positions; the rotary key is shared
    by all heads. Queries are compressed too if `q_lora_rank` is given."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    norm: NormConfig  # of the compressed vectors
    rope: RopeConfig
    scale: float
    bias: bool = False

    @property
    def key_dim(self) -> int:
        return self.nope_head_dim + self.rope_head_dim


Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"]


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """down(act(gate(x)) * up(x)) if `gated`, else down(act(up(x))).

    "swiglu_clamped" (GPT-OSS) is gated: gate <= limit, |up| <= limit, gate * sigmoid(1.702 * gate) * (up + 1)."""

    ffn_hidden_size: int
    activation: Activation
    gated: bool
    bias: bool = False
    limit: float | None = None


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How tokens choose experts.

    Scores are the softmax or sigmoid of the logits, over all experts ("before") or over the chosen ones ("after" the
    top-k). `correction_bias` is added for the choice only. With `num_groups` the choice is limited to the
    `top_groups` groups with the largest `group_score`. Weights are normalised to sum to one, then scaled."""

    num_experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    score_when: Literal["before", "after"] = "before"
    normalise: bool = False
    scale: float = 1.0
    bias: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """Auxiliary losses that keep experts evenly used, each with its coefficient (0: off).

    `expert` is E * sum_e f_e P_e (Fedus et al. 2021); `per_sequence` averages it over sequences (DeepSeek-V2);
    `device` and `communication` are DeepSeek-V2's losses over `num_devices` groups of experts; `z` is the mean squared
    logsumexp of the logits (Zoph et al. 2022)."""

    expert: float = 0.0
    per_sequence: bool = False
    device: float = 0.0
    communication: float = 0.0
    num_devices: int = 1
    top_devices: int = 1
    z: float = 0.0


@dataclass(frozen=True, kw_only=True)
class CapacityConfig:
    """In training at most ceil(tokens * top_k / experts * factor) tokens an expert; the rest is dropped, by weight or
    position. The tokens are those of a micro-batch, so that results depend on its size."""

    factor: float
    drop: Literal["probs", "position"] = "probs"
    pad: bool = False  # every expert computes exactly its capacity


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Mixture of experts (MoE), each an MLP, beside `shared` experts that see every token.

    `weight_input`: the router's weight multiplies the expert's input instead of its output (Llama 4). `shared_gate`:
    the shared output is multiplied by a learned sigmoid gate (Qwen2-MoE)."""

    router: RouterConfig
    expert: MLPConfig
    shared: MLPConfig | None = None
    shared_gate: bool = False
    weight_input: bool = False
    balance: BalanceConfig = BalanceConfig()
    capacity: CapacityConfig | None = None


@dataclass(frozen=True, kw_only=True)
class LowRankConfig:
    """Low-rank adapters (LoRA, Hu et al. 2021): y = W x + scale * B A dropout(x) at all projections in `targets`.

    A target is a canonical name without its beginning: "layers.3.attention.q" is one projection, "attention.q" that of
    every layer, "q", "experts.up", "out", "down", "kv_up", "head", "embedding" accordingly. A fused projection can be
    named whole ("qkv", "gate_up": its slices share an A) or by slices (q, k, v; gate, up). `scale` is alpha / rank, or
    alpha / sqrt(rank) (rsLoRA, Kalajdzievski 2023). `b_rate` multiplies the learning rate of B (LoRA+, Hayou et al.
    2024). With `dora` the rows of W + scale * B A are brought to learned lengths (DoRA, Liu et al. 2024)."""

    targets: tuple[str, ...]
    rank: int
    scale: float
    dropout: float = 0.0
    b_rate: float = 1.0
    dora: bool = False

    def names(self, projection: str) -> bool:
        return any(f".{projection}".endswith(f".{target}") for target in self.targets)


class Slice(NamedTuple):
    """A part of a fused projection's output: indices `start` to `stop` of a dim, with an axis of their own."""

    dim: int
    start: int
    stop: int | None
    axis: str


SLICES: dict[str, dict[str, Slice]] = {
    "qkv": {"q": Slice(1, 0, -2, "q_slot"), "k": Slice(1, -2, -1, "kv_slot"), "v": Slice(1, -1, None, "kv_slot")},
    "gate_up": {"gate": Slice(0, 0, 1, "branch"), "up": Slice(0, 1, 2, "branch")},
}


def slice_of(path: str, name: str) -> Slice | None:
    """The slice `name` of the projection `path`, None for all of it."""
    return SLICES.get(path.rpartition(".")[2], {}).get(name)


def _projections(layer: "LayerConfig") -> Iterator[str]:
    attention, mlp = layer.attention, layer.mlp
    if isinstance(attention, LatentAttentionConfig):
        queries = ("q",) if attention.q_lora_rank is None else ("q_down", "q_up")
        yield from (f"attention.{name}" for name in (*queries, "kv_down", "kv_up", "out"))
    else:
        yield from ("attention.qkv", "attention.out")
    parts = {"mlp": mlp} if isinstance(mlp, MLPConfig) else {"mlp.experts": mlp.expert, "mlp.shared": mlp.shared}
    for path, part in parts.items():
        if part is not None:
            yield from (f"{path}.gate_up" if part.gated else f"{path}.up", f"{path}.down")
    if isinstance(mlp, MoEConfig) and mlp.shared_gate:
        yield "mlp.shared_gate"


def too_large(option: str, size: int, limit: int) -> Problem:
    """The problem of a size above its limit."""
    why, fix = f"no model is so large: the limit is {limit:,}", "correct the model's description"
    return Problem(option, size, why, fix, "at most", limit=limit)


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """One layer; each half is `x + residual_scale * f(x)` with the norms where `norm_placement` says.

    "pre": f(norm(x)); "post": norm(f(x)) (OLMo 2); "sandwich": norm(f(norm(x))) (Gemma 2). With `residual_from_norm`
    the sum starts from norm(x) instead of x (Bloom's apply_residual_connection_post_layernorm)."""

    attention: AttentionConfig | LatentAttentionConfig
    mlp: MLPConfig | MoEConfig
    norm: NormConfig
    norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    residual_from_norm: bool = False
    residual_scale: float = 1.0


def matches(pattern: str, parameter: str) -> bool:
    """Whether a shell-style pattern matches the canonical name of a parameter, or of a module that it is in."""
    return any(fnmatchcase(name, pattern) for name in accumulate(parameter.split("."), "{}.{}".format))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder. `norm_head`: logits are products with the L2-normalised rows of the head (Baichuan 2). `score`: it
    has a value head, which scores every position; a reward model has no other, for without `lm_head` there is none over
    the vocabulary.

    ProblemError for one that is larger than the limits above."""

    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    final_norm: NormConfig
    learned_positions: bool = False
    embedding_norm: NormConfig | None = None
    embedding_scale: float = 1.0
    tie_word_embeddings: bool = False
    norm_head: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0
    init_std: float = 0.02
    low_rank: tuple[LowRankConfig, ...] = ()  # the first one that names a projection counts there
    tuned: tuple[str, ...] = ()  # modules that are trained as a whole beside adapters, by the ends of their names
    score: bool = False
    lm_head: bool = True
    frozen: tuple[str, ...] = ()  # patterns of the names of parameters, or of modules, that are not trained
    trained: tuple[str, ...] = ()  # the only ones that are; none: all
    rates: tuple[tuple[str, float], ...] = ()  # by what the learning rate of some is multiplied, once for each pattern
    num_prefix_tokens: int = 0  # learned keys and values in every layer, which every query sees (Li & Liang 2021)

    def __post_init__(self) -> None:
        raise_all(too_large(name, size, limit) for name, size, limit in self._sizes() if size > limit)
        raise_all(self._adapter_problems())

    def _adapter_problems(self) -> Iterator[Problem]:
        known = [name for _, _, name in self.projections()] if self.low_rank else []
        for low_rank in self.low_rank:
            if low_rank.rank < 1:
                yield Problem("low_rank: rank", low_rank.rank, "it is less than 1", "give a positive rank")
            if not 0 <= low_rank.dropout < 1:
                why = "it is no probability below 1"
                yield Problem("low_rank: dropout", low_rank.dropout, why, "give a number from 0 to below 1")
            for target in low_rank.targets:
                if not any(f".{name}".endswith(f".{target}") for name in known):
                    fix = "give canonical names, such as q, k, v, out, gate, up, down"
                    yield Problem("low_rank: targets", target, "the model has no such projection", fix)
        first: dict[str, tuple[str, str, object]] = {}
        for path, name, low_rank in self.adapted():
            outside = path in ("head", "embedding") or ".experts." in path
            refused = {"dora": outside, "dropout": outside or low_rank.dora}
            for field in (each for each in refused if refused[each] and getattr(low_rank, each)):
                first.setdefault(field, (path, name, getattr(low_rank, field)))
        for field, (path, name, value) in first.items():
            why = f"{path} takes none: only projections of whole sequences in a layer do, one of dropout and DoRA"
            yield Problem(f"low_rank: {field}", value, why, f"adapt {name} without it")
        if self.num_prefix_tokens < 0:
            why = "it is less than 0"
            yield Problem("num_prefix_tokens", self.num_prefix_tokens, why, "give a number of virtual tokens")
        if self.context_length < 1:
            why = f"it leaves no token of the {self.max_position_embeddings} positions that the model holds"
            yield Problem("num_prefix_tokens", self.num_prefix_tokens, why, "give less")

    def tunes(self, parameter: str) -> bool:
        """Whether a parameter of the base is trained beside adapters."""
        return any(f".{module}." in f".{parameter}." for module in self.tuned)

    def trains(self, parameter: str) -> bool:
        """Whether patterns leave a parameter trained."""
        left = not self.trained or any(matches(pattern, parameter) for pattern in self.trained)
        return left and not any(matches(pattern, parameter) for pattern in self.frozen)

    def rate_of(self, parameter: str) -> float:
        """What patterns multiply the learning rate of a parameter by."""
        return math.prod(rate for pattern, rate in self.rates if matches(pattern, parameter))

    def projections(self) -> Iterator[tuple[str, str, str]]:
        """What can be adapted: canonical name of a module, of it or of a slice of it, and the latter's full name."""
        layers = (f"layers.{i}.{name}" for i, layer in enumerate(self.layers) for name in _projections(layer))
        for path in ("embedding", *layers, *(["head"] if self.lm_head else [])):
            parent, dot, leaf = path.rpartition(".")
            for name in (leaf, *SLICES.get(leaf, ())):
                yield path, name, f"{parent}{dot}{name}"

    def gemms(self) -> set[str]:
        """The projections of layers, but for the gate of shared experts."""
        return {path for path, _, _ in self.projections() if path.startswith("layers.") and path[-5:] != "_gate"}

    def adapted(self) -> Iterator[tuple[str, str, LowRankConfig]]:
        """The low-rank adapters: module, slice (or the module's own name), and what is asked for there."""
        if self.low_rank:
            for path, name, full in self.projections():
                if (found := next((each for each in self.low_rank if each.names(full)), None)) is not None:
                    yield path, name, found

    def _sizes(self) -> Iterator[tuple[str, int, int]]:
        """What has a limit: name, size and limit."""
        yield "vocab_size", self.vocab_size, MAX_TOKENS
        yield "hidden_size", self.hidden_size, MAX_WIDTH
        yield "max_position_embeddings", self.max_position_embeddings, MAX_TOKENS
        yield "num_layers", len(self.layers), MAX_LAYERS
        moes = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoEConfig)]
        yield "num_experts of all layers", sum(mlp.router.num_experts for mlp in moes), MAX_EXPERTS
        dense = [layer.mlp for layer in self.layers if isinstance(layer.mlp, MLPConfig)]
        widths = (mlp.ffn_hidden_size for mlp in (*dense, *(moe.expert for moe in moes)))
        yield "ffn_hidden_size", max(widths, default=0), MAX_WIDTH
        heads = (layer.attention.num_heads * layer.attention.key_dim for layer in self.layers)
        yield "num_attention_heads x kv_channels", max(heads, default=0), MAX_WIDTH

    @property
    def tied_head(self) -> bool:
        """Whether there is a head over the vocabulary, and it is the embedding."""
        return self.lm_head and self.tie_word_embeddings

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def context_length(self) -> int:
        """How many tokens of a sequence have positions."""
        return self.max_position_embeddings - self.num_prefix_tokens

    @property
    def has_adapters(self) -> bool:
        """Whether there is something that is trained alone, over a base."""
        return bool(self.low_rank or self.tuned or self.num_prefix_tokens)

    def with_vocab_size(self, vocab_size: int) -> "ModelConfig":
        return replace(self, vocab_size=vocab_size)
