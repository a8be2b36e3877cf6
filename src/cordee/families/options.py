"""The architecture options together: Megatron's defaults, what options imply for each other and for a known model, and
which exclude each other.

Owns the way from options to words (`families/lenses.py`). Knows no family."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

from cordee.config import laws
from cordee.config.option import to_flag
from cordee.errors import Problem, at_most, raise_all, requires
from cordee.families.lenses import Scaling, Words, sparse_layers
from cordee.families.rope import SCALINGS, mscale
from cordee.model.config import MAX_LAYERS, Activation, LinearScaling, Llama3Scaling, YarnScaling, too_large
from cordee.model.options import FeatureOptions, ModelOptions

T = TypeVar("T")

VOCAB_MULTIPLE = 128  # Megatron's default for models given by options
TOP_K = 2  # Megatron's default


def given_features(options: FeatureOptions) -> dict[str, Any]:
    """The features that `options` give, by name."""
    values = {field.name: getattr(options, field.name) for field in fields(FeatureOptions)}
    given = {name: value for name, value in values.items() if value is not None}
    if given.get("moe_router_load_balancing_type") == "softmax_topk" and given.get("norm_topk_prob"):
        given["moe_router_load_balancing_type"] = "aux_loss"  # the same mathematics
    return given


def with_defaults(given: Words) -> dict[str, Any]:
    """`given` with Megatron's defaults for MoE, where the model itself is dense."""
    if not given.get("num_experts"):
        return dict(given)
    return {"moe_router_topk": TOP_K, "moe_router_load_balancing_type": "aux_loss", **given}


def resolve(
    options: ModelOptions, features: Words, base: Words | None = None, vocab_size: int | None = None
) -> dict[str, Any]:
    """The words of the model's form that `options` set: on top of `base`, or on Megatron's defaults.

    `features` are those of the resulting model. `vocab_size` stands in where neither options nor base have one.
    ProblemError with everything that is missing or contradictory."""
    resolver = _Resolver(options, features, base)
    form = resolver.form(vocab_size)
    raise_all(resolver.problems)
    return form


def ignored(options: ModelOptions, words: Words) -> Iterator[str]:
    """Notes on `options` that change nothing in the model with these `words`, which they describe."""
    groups = options.num_query_groups
    if groups is not None and groups != words["num_query_groups"] == words["num_attention_heads"]:
        yield f"ignored: --num-query-groups {groups} (--group-query-attention is not given)"
    if options.add_gate is False and words["gated"]:
        yield "ignored: --no-add-gate (gate and up are one matrix in any gated MLP)"
    rows, multiple = options.padded_vocab_size, options.make_vocab_size_divisible_by
    if rows is not None and multiple is not None and rows % multiple:
        yield f"ignored: --make-vocab-size-divisible-by {multiple} (--padded-vocab-size is {rows})"
    if options.multi_head_latent_attention and not options.qk_layernorm:
        yield "latent attention normalises its latents, as in MindSpeed-LLM with --qk-layernorm"


ACTIVATIONS: dict[str, tuple[Activation, bool]] = {  # by option: the activation, and whether the MLP is gated
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "gelu_tanh": ("gelu_tanh", True),
    "openai_gelu": ("gelu_tanh", False),
}

SCALED_BY = {  # options of RoPE scaling and the types that have them
    "rope_scaling_factor": ("llama3", "yarn"),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "original_max_position_embeddings": ("llama3", "yarn"),
    "rope_scaling_beta_fast": ("yarn",),
    "rope_scaling_beta_slow": ("yarn",),
    "rope_scaling_mscale": ("yarn",),
}


class _Resolver:
    """Takes each value from the options, else from the base, else the default; collects problems."""

    def __init__(self, options: ModelOptions, features: Words, base: Words | None):
        self.options = options
        self.features = features
        self.base = base
        self.problems = [*laws.problems(options, ModelOptions)]

    def form(self, tokens: int | None) -> dict[str, Any]:
        hidden, heads = self.needed("hidden_size"), self.needed("num_attention_heads")
        activation, gated = self.activation()
        position = self.pick("position_embedding_type", "learned_absolute")
        bias = self.options.add_bias_linear
        width = self.width(hidden, gated)
        return {
            "vocab_size": self.vocabulary(tokens),
            "num_layers": self.layers(),
            "hidden_size": hidden,
            "ffn_hidden_size": width,
            "num_attention_heads": heads,
            "num_query_groups": self.groups(heads),
            "kv_channels": self.head_dim(hidden, heads),
            "max_position_embeddings": self.needed("max_position_embeddings"),
            "position_embedding_type": position,
            "rotary_base": self.pick("rotary_base", 10000.0),
            "rope_scaling": self.scaling(position),
            "normalization": self.pick("normalization", "LayerNorm"),
            "norm_epsilon": self.pick("norm_epsilon", 1e-5),
            "activation": activation,
            "gated": gated,
            "qkv_bias": self.first(self.options.add_qkv_bias, bias, self.of_base("qkv_bias"), True),
            "dense_bias": self.first(self.options.add_dense_bias, bias, self.of_base("dense_bias"), True),
            "mlp_bias": self.first(bias, self.of_base("mlp_bias"), True),
            "tied": self.tied(),
            "init_method_std": self.pick("init_method_std", 0.02),
            "attention_dropout": self.pick("attention_dropout", 0.1),
            "hidden_dropout": self.pick("hidden_dropout", 0.1),
            **({"moe_intermediate_size": width} if self.has_only_experts() else {}),
        }

    def problem(self, name: str, why: str, fix: str, kind: str = "excludes") -> None:
        self.problems.append(Problem(to_flag(name), getattr(self.options, name), why, fix, kind))

    @staticmethod
    def first(*values: T | None) -> T:
        """The first value that is given."""
        return next(value for value in values if value is not None)

    def pick(self, name: str, default: Any) -> Any:
        return self.first(getattr(self.options, name), self.of_base(name), default)

    def of_base(self, name: str) -> Any:
        return self.base[name] if self.base else None

    def needed(self, name: str) -> int:
        if (value := self.pick(name, 0)) == 0:
            self.problem(name, "the size of the model is not given", f"give {to_flag(name)}, or --model", "missing")
            return 1
        return value

    def layers(self) -> int:
        if (count := self.needed("num_layers")) > MAX_LAYERS:
            self.problems.append(too_large("--num-layers", count, MAX_LAYERS))
        return count

    def width(self, hidden: int, gated: bool) -> int:
        """Width of the layers' MLPs or, where all layers have experts, of one of these."""
        width = self.pick("ffn_hidden_size", hidden * 8 // 3 // 64 * 64 if gated else 4 * hidden)
        if not self.has_only_experts():
            return width
        assert self.base is not None
        narrow = self.features.get("moe_intermediate_size") or width
        had_experts = self.options.moe_intermediate_size is None and narrow == self.base["ffn_hidden_size"]
        return width if had_experts else narrow

    def has_only_experts(self) -> bool:
        """Whether a known model has experts in all of its layers."""
        layers = min(self.pick("num_layers", 1), MAX_LAYERS)
        known = self.base is not None and self.features.get("num_experts")
        return bool(known) and all(sparse_layers(layers, self.features))

    def head_dim(self, hidden: int, heads: int) -> int:
        base, options = self.base, self.options
        if self.features.get("multi_head_latent_attention"):
            size = self.features.get("qk_nope_head_dim", 1) + self.features.get("qk_rope_head_dim", 1)
            for name, value in (("kv_channels", size), ("num_query_groups", heads)):
                if getattr(options, name) not in (None, value):
                    fix = "leave the option out; --qk-nope-head-dim and --qk-rope-head-dim are the sizes"
                    self.problem(name, "heads of latent attention share one latent", fix)
            return size
        if base and base["kv_channels"] * base["num_attention_heads"] != base["hidden_size"]:
            return self.pick("kv_channels", 0)  # independent of the base's hidden size, so of that of the options
        if options.kv_channels is None and hidden % heads:
            why = f"--hidden-size {hidden} is not divisible by {heads} heads"
            self.problem("num_attention_heads", why, "take a divisor of --hidden-size or give --kv-channels", "divides")
        return self.first(options.kv_channels, max(1, hidden // heads))

    def groups(self, heads: int) -> int:
        """Number of KV heads: that of the heads, unless --group-query-attention or the base sets another."""
        given, grouped = self.options.num_query_groups, self.options.group_query_attention
        if grouped is False and given is not None:
            self.problem("num_query_groups", "--group-query-attention is off", "give only one of the two")
        base = self.of_base("num_query_groups")
        if base == self.of_base("num_attention_heads"):
            base = None
        if not self.first(grouped, base is not None):
            return heads  # whatever --num-query-groups is, as in Megatron
        groups = self.first(given, base, 1)
        if heads % groups:
            why = f"{heads} heads are not divisible by {groups} groups"
            self.problem("num_query_groups", why, "take a divisor of the heads", "divides")
            return heads
        return groups

    def activation(self) -> tuple[Activation, bool]:
        """Name of the activation and whether the MLP is gated."""
        given = [name for name in ACTIVATIONS if getattr(self.options, name)]
        add_gate = self.options.add_gate
        # AscendSpeed has a gate with --swiglu, which makes one matrix of gate and up, or with add_gate: two matrices.
        if given or add_gate:
            return ACTIVATIONS[given[0] if given else "swiglu"]
        refused = {form for name, form in ACTIVATIONS.items() if getattr(self.options, name) is False}
        base = (self.base["activation"], self.base["gated"]) if self.base else None
        if base and base not in refused and not (base[1] and False in (self.options.swiglu, add_gate)):
            return base
        return "gelu", False

    def scaling(self, position: str) -> Scaling | None:
        options, base = self.options, self.of_base("rope_scaling")
        kind = options.rope_scaling_type
        if position != "rope":
            for name in ("rotary_base", "rope_scaling_type", "rotary_seq_len_interpolation_factor"):
                if getattr(options, name) is not None:
                    self.problem(name, "there is no RoPE", "add --position-embedding-type rope", "requires")
        if kind is None and (stretch := options.rotary_seq_len_interpolation_factor) is not None:
            base = LinearScaling(factor=stretch) if stretch > 1 else None
        kind = kind or SCALINGS.get(type(base))
        self.only_with_their_scaling(kind)
        if kind is None or kind == "linear":
            return base
        same = base if SCALINGS.get(type(base)) == kind else None
        return self.llama3(same) if kind == "llama3" else self.yarn(same)

    def only_with_their_scaling(self, kind: str | None) -> None:
        for name, kinds in SCALED_BY.items():
            if getattr(self.options, name) is not None and kind not in kinds:
                why, fix = f"RoPE scaling is {kind or 'off'}", f"add --rope-scaling-type {' or '.join(kinds)}"
                self.problem(name, why, fix, "requires")

    def llama3(self, base: Scaling | None) -> Llama3Scaling:
        return Llama3Scaling(
            factor=self.of_scaling(base, "factor", "rope_scaling_factor"),
            low_freq_factor=self.of_scaling(base, "low_freq_factor"),
            high_freq_factor=self.of_scaling(base, "high_freq_factor"),
            original_max_position_embeddings=self.of_scaling(base, "original_max_position_embeddings"),
        )

    def yarn(self, base: Scaling | None) -> YarnScaling:
        options = self.options
        assert base is None or isinstance(base, YarnScaling)
        factor = self.of_scaling(base, "factor", "rope_scaling_factor")
        strength = options.rope_scaling_mscale
        known = base.attention_factor if base and base.factor == factor and strength is None else None
        all_dim = self.features.get("rope_scaling_mscale_all_dim", 0.0)
        sharper = mscale(factor, self.first(strength, 1.0)) / mscale(factor, all_dim)
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=self.of_scaling(base, "original_max_position_embeddings"),
            beta_fast=self.first(options.rope_scaling_beta_fast, base and base.beta_fast, 32.0),
            beta_slow=self.first(options.rope_scaling_beta_slow, base and base.beta_slow, 1.0),
            attention_factor=self.first(known, sharper),
            truncate=base.truncate if base else True,
        )

    def of_scaling(self, base: Scaling | None, name: str, option: str | None = None) -> Any:
        """A required value of a scaling: the option's, else that of `base`."""
        if value := self.first(getattr(self.options, option or name), getattr(base, name, None), 0):
            return value
        kind = self.options.rope_scaling_type
        usual = "Llama 3.1: 8, 1, 4, 8192" if kind == "llama3" else "Qwen2 on 32K tokens: 8, 4096"
        self.problem(option or name, f"--rope-scaling-type {kind} requires a value", f"give one ({usual})", "missing")
        return 1

    def tied(self) -> bool:
        untied = self.options.untie_embeddings_and_output_weights
        return self.first(None if untied is None else not untied, self.of_base("tied"), True)

    def vocabulary(self, tokens: int | None) -> int:
        """Rows of the embedding: tokens, rounded up, or --padded-vocab-size."""
        options, base = self.options, self.of_base("vocab_size")
        tokens = self.first(options.vocab_size, base, tokens, 0)
        if not tokens and not options.padded_vocab_size:
            self.problem("vocab_size", "the number of tokens is not given", "give it, or a tokenizer", "missing")
        if options.padded_vocab_size is None:
            multiple = self.first(options.make_vocab_size_divisible_by, 1 if base else VOCAB_MULTIPLE)
            return -(-tokens // multiple) * multiple
        if options.padded_vocab_size < tokens:
            self.problem("padded_vocab_size", f"there are {tokens} tokens", f"give at least {tokens}", "at least")
        return options.padded_vocab_size


_OF_EXPERTS = (
    *("first_k_dense_replace", "moe_intermediate_size", "moe_layer_freq", "moe_router_load_balancing_type"),
    *("moe_router_num_groups", "moe_router_topk", "n_shared_experts", "norm_topk_prob", "routed_scaling_factor"),
    "topk_group",
)
_OF_LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_WITH_LATENT = (*_OF_LATENT, "q_lora_rank", "rope_scaling_mscale_all_dim")


def check(words: Words) -> Iterator[Problem]:
    """What is missing or contradictory in these `words` of a model that options alone describe."""
    yield from _experts(words)
    yield from _positions(words)
    yield from _alone(words, _OF_EXPERTS, "num_experts")
    yield from _alone(words, _WITH_LATENT, "multi_head_latent_attention")
    if words.get("multi_head_latent_attention"):
        yield from _needed(words, _OF_LATENT, "multi_head_latent_attention")
    if words.get("moe_router_load_balancing_type") == "group_limited_greedy":
        # MindSpeed-LLM takes the expert-parallel ranks; here a model is the same on any.
        yield from _needed(words, ("moe_router_num_groups", "topk_group"), "moe_router_load_balancing_type")


def _experts(words: Words) -> Iterator[Problem]:
    experts, top_k = words.get("num_experts"), words.get("moe_router_topk", 0)
    if not experts:
        return
    yield from at_most("--moe-router-topk", top_k, experts, f"--num-experts {experts}", "num_experts")
    if not any(sparse_layers(words["num_layers"], words)):
        first = words.get("first_k_dense_replace")
        why = f"none of {words['num_layers']} layers has experts"
        yield Problem("--first-k-dense-replace", first, why, "give less, or leave --num-experts out", "at most")
    groups, top_groups = words.get("moe_router_num_groups", 1), words.get("topk_group", 1)
    if words.get("moe_router_load_balancing_type") != "group_limited_greedy":
        for name, count in (("moe_router_num_groups", groups), ("topk_group", top_groups)):
            if count > 1:
                fix = "give --moe-router-load-balancing-type group_limited_greedy"
                yield Problem(to_flag(name), count, "routing is not group-limited", fix, "requires")
    elif experts % groups or top_groups > groups or top_k > experts // groups * top_groups:
        why = f"{top_groups} of {groups} groups do not hold {top_k} of {experts} experts"
        yield Problem("--moe-router-num-groups", groups, why, "let groups divide the experts and hold enough of them")


def _positions(words: Words) -> Iterator[Problem]:
    rotary = words["position_embedding_type"] == "rope"
    if words.get("rotary_percent", 1.0) != 1.0 and not rotary:
        why, fix = "there is no RoPE", "add --position-embedding-type rope"
        yield Problem("--rotary-percent", words["rotary_percent"], why, fix, "requires")
    if words.get("multi_head_latent_attention"):
        if not rotary:
            why, fix = "latent attention requires RoPE", "give --position-embedding-type rope"
            yield Problem("--position-embedding-type", words["position_embedding_type"], why, fix, "requires")
        if words["qkv_bias"] != words["dense_bias"]:
            why = "latent attention has biases in all projections or in none"
            yield Problem("--add-dense-bias", words["dense_bias"], why, "give --add-qkv-bias the same")


def _alone(words: Words, names: tuple[str, ...], needed: str) -> Iterator[Problem]:
    flag = to_flag(needed)
    for name in names if not words.get(needed) else ():
        yield from requires(to_flag(name), words.get(name) or None, flag, f"{flag} is not given", needed)


def _needed(words: Words, names: tuple[str, ...], by: str) -> Iterator[Problem]:
    for name in names:
        if not words.get(name):
            why, fix = f"{to_flag(by)} {words[by]} requires a value", f"give {to_flag(name)}"
            yield Problem(to_flag(name), None, why, fix, "missing", (by,))
