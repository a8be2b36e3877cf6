"""Models given by options instead of a `config.json`.

Owns the meaning of the architecture options: Megatron's defaults, what the options imply for each other, and how they
change a known model. Knows no family: each turns a `Shape` into its own `config.json`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from cordee.config.option import to_flag
from cordee.config.schema import ModelOptions
from cordee.errors import Problem, raise_all
from cordee.families.features import Features, sparse_layers
from cordee.families.rope import mscale
from cordee.model.config import (
    MAX_LAYERS,
    Activation,
    AttentionConfig,
    LatentAttentionConfig,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    MoEConfig,
    YarnScaling,
    too_large,
)

T = TypeVar("T")

VOCAB_MULTIPLE = 128  # Megatron's default for models given by options

Scaling = LinearScaling | Llama3Scaling | YarnScaling  # what options can ask of rotary positions
SCALINGS = {LinearScaling: "linear", Llama3Scaling: "llama3", YarnScaling: "yarn"}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model of equal layers in the words of the options, each with a value. `vocab_size` counts rows, padded."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    max_position_embeddings: int
    position_embedding_type: str
    rotary_base: float
    rope_scaling: Scaling | None
    normalization: str
    norm_epsilon: float
    activation: Activation
    gated: bool
    qkv_bias: bool
    dense_bias: bool
    mlp_bias: bool
    tied: bool
    init_method_std: float
    attention_dropout: float
    hidden_dropout: float


def shape_of(config: ModelConfig) -> Shape:
    """`config`, as its first layer is, in the words of the options.

    Of a mixture of experts it tells what one of them is like, of latent attention how large the keys are.
    """
    attention, mlp, norm = config.layers[0].attention, config.layers[0].mlp, config.layers[0].norm
    latent = isinstance(attention, LatentAttentionConfig)
    if isinstance(mlp, MoEConfig):
        mlp = mlp.expert
    scaling = attention.rope.scaling if attention.rope else None
    return Shape(
        vocab_size=config.vocab_size,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=mlp.ffn_hidden_size,
        num_attention_heads=attention.num_heads,
        num_query_groups=attention.num_heads if latent else attention.num_kv_heads,
        kv_channels=attention.key_dim,
        max_position_embeddings=config.max_position_embeddings,
        position_embedding_type=_position_type(config),
        rotary_base=attention.rope.theta if attention.rope else 10000.0,
        rope_scaling=scaling if isinstance(scaling, Scaling) else None,
        normalization="RMSNorm" if norm.kind == "rms" else "LayerNorm",
        norm_epsilon=norm.eps,
        activation=mlp.activation,
        gated=mlp.gated,
        qkv_bias=attention.bias if latent else attention.qkv_bias,
        dense_bias=attention.bias if latent else attention.out_bias,
        mlp_bias=mlp.bias,
        tied=config.tie_word_embeddings,
        init_method_std=config.init_std,
        attention_dropout=config.attention_dropout,
        hidden_dropout=config.hidden_dropout,
    )


def _position_type(config: ModelConfig) -> str:
    if config.learned_positions:
        return "learned_absolute"
    attention = config.layers[0].attention
    return "alibi" if isinstance(attention, AttentionConfig) and attention.alibi else "rope"


def scaling_section(scaling: Scaling | None) -> dict[str, Any] | None:
    """What a `config.json` calls `rope_scaling`."""
    return None if scaling is None else {"rope_type": SCALINGS[type(scaling)], **vars(scaling)}


def followers(*shapes: Shape) -> set[str]:
    """The fields that in all `shapes` are what others make them, so that a family needs no key for them."""
    found = set()
    if all(shape.num_query_groups == shape.num_attention_heads for shape in shapes):
        found.add("num_query_groups")
    if all(shape.kv_channels * shape.num_attention_heads == shape.hidden_size for shape in shapes):
        found.add("kv_channels")
    if all(shape.ffn_hidden_size == 4 * shape.hidden_size for shape in shapes):
        found.add("ffn_hidden_size")
    return found


def resolve(
    options: ModelOptions,
    features: Features,
    base: Shape | None = None,
    vocab_size: int | None = None,
) -> Shape:
    """The shape that `options` give: on top of `base`, or on Megatron's defaults.

    `features` are those that the model will have. `vocab_size` stands in where neither options nor base say how many
    tokens there are. ProblemError with everything that is missing or cannot be together.
    """
    resolver = _Resolver(options, features, base)
    shape = resolver.shape(vocab_size)
    raise_all(resolver.problems)
    return shape


def ignored(options: ModelOptions, shape: Shape) -> Iterator[str]:
    """What `options` say in vain of the model of this `shape` that they led to, or leave out in vain, in words."""
    groups = options.num_query_groups
    if groups is not None and groups != shape.num_query_groups == shape.num_attention_heads:
        yield f"ignored: --num-query-groups {groups} (without --group-query-attention each head has its own keys)"
    if options.add_gate is False and shape.gated:
        yield "ignored: --no-add-gate (gate and up are one matrix here, which is what it asks of a gated MLP)"
    rows, multiple = options.padded_vocab_size, options.make_vocab_size_divisible_by
    if rows is not None and multiple is not None and rows % multiple:
        yield f"ignored: --make-vocab-size-divisible-by {multiple} (--padded-vocab-size is {rows})"
    if options.multi_head_latent_attention and not options.qk_layernorm:
        yield "latent attention has norms of its compressed vectors, as in MindSpeed-LLM with --qk-layernorm"


_ACTIVATIONS: dict[str, tuple[Activation, bool]] = {  # what options name: it, and whether the MLP is gated
    "swiglu": ("silu", True),
    "geglu": ("gelu", True),
    "gelu_tanh": ("gelu_tanh", True),
    "openai_gelu": ("gelu_tanh", False),
}

_SCALED_BY = {  # options of rotary scaling and the kinds that have them
    "rope_scaling_factor": ("llama3", "yarn"),
    "low_freq_factor": ("llama3",),
    "high_freq_factor": ("llama3",),
    "original_max_position_embeddings": ("llama3", "yarn"),
    "rope_scaling_beta_fast": ("yarn",),
    "rope_scaling_beta_slow": ("yarn",),
    "rope_scaling_mscale": ("yarn",),
}


class _Resolver:
    """Takes each value from the options, else from the base, else the default, and notes what is wrong."""

    def __init__(self, options: ModelOptions, features: Features, base: Shape | None):
        self.options = options
        self.features = features
        self.base = base
        self.problems: list[Problem] = []

    def shape(self, tokens: int | None) -> Shape:
        hidden, heads = self.needed("hidden_size"), self.needed("num_attention_heads")
        activation, gated = self.activation()
        position = self.pick("position_embedding_type", "learned_absolute")
        bias = self.options.add_bias_linear
        return Shape(
            vocab_size=self.vocabulary(tokens),
            num_layers=self.layers(),
            hidden_size=hidden,
            ffn_hidden_size=self.width(hidden, gated),
            num_attention_heads=heads,
            num_query_groups=self.groups(heads),
            kv_channels=self.head_dim(hidden, heads),
            max_position_embeddings=self.needed("max_position_embeddings"),
            position_embedding_type=position,
            rotary_base=self.pick("rotary_base", 10000.0),
            rope_scaling=self.scaling(position),
            normalization=self.pick("normalization", "LayerNorm"),
            norm_epsilon=self.pick("norm_epsilon", 1e-5),
            activation=activation,
            gated=gated,
            qkv_bias=self.first(self.options.add_qkv_bias, bias, self.base and self.base.qkv_bias, True),
            dense_bias=self.first(self.options.add_dense_bias, bias, self.base and self.base.dense_bias, True),
            mlp_bias=self.first(bias, self.base and self.base.mlp_bias, True),
            tied=self.tied(),
            init_method_std=self.pick("init_method_std", 0.02),
            attention_dropout=self.pick("attention_dropout", 0.1),
            hidden_dropout=self.pick("hidden_dropout", 0.1),
        )

    def problem(self, name: str, why: str, fix: str) -> None:
        value = getattr(self.options, name)
        self.problems.append(Problem(to_flag(name), value, why, fix))

    @staticmethod
    def first(*values: T | None) -> T:
        """The first value that is given."""
        return next(value for value in values if value is not None)

    def pick(self, name: str, default: Any) -> Any:
        return self.first(getattr(self.options, name), getattr(self.base, name, None), default)

    def needed(self, name: str) -> int:
        if (value := self.pick(name, 0)) == 0:
            self.problem(name, "nothing says how large the model is", f"give --{name.replace('_', '-')}, or --model")
            return 1
        return value

    def layers(self) -> int:
        if (count := self.needed("num_layers")) > MAX_LAYERS:
            self.problems.append(too_large("--num-layers", count, MAX_LAYERS))
        return count

    def width(self, hidden: int, gated: bool) -> int:
        """Width of the first layer's MLP or, where it has experts, of one of these."""
        width = self.pick("ffn_hidden_size", hidden * 8 // 3 // 64 * 64 if gated else 4 * hidden)
        if self.base is None or not self.features.get("num_experts") or not sparse_layers(1, self.features)[0]:
            return width
        narrow = self.features.get("moe_intermediate_size", width)
        had_experts = self.options.moe_intermediate_size is None and narrow == self.base.ffn_hidden_size
        return width if had_experts else narrow

    def head_dim(self, hidden: int, heads: int) -> int:
        base, options = self.base, self.options
        if self.features.get("multi_head_latent_attention"):
            size = self.features.get("qk_nope_head_dim", 1) + self.features.get("qk_rope_head_dim", 1)
            for name, value in (("kv_channels", size), ("num_query_groups", heads)):
                if getattr(options, name) not in (None, value):
                    fix = "leave it out; --qk-nope-head-dim and --qk-rope-head-dim are the sizes"
                    self.problem(name, "heads of latent attention have parts and share their keys already", fix)
            return size
        if base and base.kv_channels * base.num_attention_heads != base.hidden_size:
            return self.pick("kv_channels", 0)  # a free choice of the base, which other options leave alone
        if options.kv_channels is None and hidden % heads:
            why = f"{hidden} hidden channels cannot be shared by {heads} heads"
            self.problem("num_attention_heads", why, "take a divisor of --hidden-size, or give --kv-channels")
        return self.first(options.kv_channels, max(1, hidden // heads))

    def groups(self, heads: int) -> int:
        """Key and value heads: one for each head, unless --group-query-attention or the base says otherwise."""
        given, grouped = self.options.num_query_groups, self.options.group_query_attention
        if grouped is False and given is not None:
            self.problem("num_query_groups", "--group-query-attention is off", "give only one of the two")
        base = self.base.num_query_groups if self.base else None
        if self.base and base == self.base.num_attention_heads:
            base = None
        if not self.first(grouped, base is not None):
            return heads  # whatever --num-query-groups says, as in Megatron
        groups = self.first(given, base, 1)
        if heads % groups:
            self.problem(
                "num_query_groups", f"{heads} heads cannot share {groups} groups", "take a divisor of the heads"
            )
            return heads
        return groups

    def activation(self) -> tuple[Activation, bool]:
        """Name of the activation and whether the MLP is gated."""
        given = [name for name in _ACTIVATIONS if getattr(self.options, name)]
        for name in given[1:]:
            self.problem(name, f"--{given[0].replace('_', '-')} sets another activation", "give only one of the two")
        add_gate = self.options.add_gate
        if add_gate and given and not _ACTIVATIONS[given[0]][1]:
            self.problem("add_gate", f"an MLP with {to_flag(given[0])} has no gate", "give only one of the two")
        # AscendSpeed has a gate with --swiglu, which makes one matrix of gate and up, or with add_gate: two matrices.
        if given or add_gate:
            return _ACTIVATIONS[given[0] if given else "swiglu"]
        refused = {form for name, form in _ACTIVATIONS.items() if getattr(self.options, name) is False}
        base = (self.base.activation, self.base.gated) if self.base else None
        if base and base not in refused and not (base[1] and False in (self.options.swiglu, add_gate)):
            return base
        return "gelu", False

    def scaling(self, position: str) -> Scaling | None:
        options, base = self.options, self.base.rope_scaling if self.base else None
        kind = options.rope_scaling_type
        if position != "rope":
            for name in ("rotary_base", "rope_scaling_type", "rotary_seq_len_interpolation_factor"):
                if getattr(options, name) is not None:
                    self.problem(name, "positions are not rotary", "add --position-embedding-type rope")
        if kind is not None and options.rotary_seq_len_interpolation_factor is not None:
            self.problem(
                "rope_scaling_type", "--rotary-seq-len-interpolation-factor says another", "give one of the two"
            )
        elif (stretch := options.rotary_seq_len_interpolation_factor) is not None:
            base = LinearScaling(factor=stretch) if stretch > 1 else None
        kind = kind or (SCALINGS[type(base)] if base else None)
        self.only_with_their_scaling(kind)
        if kind is None or kind == "linear":
            return base
        same = base if base is not None and SCALINGS[type(base)] == kind else None
        return self.llama3(same) if kind == "llama3" else self.yarn(same)

    def only_with_their_scaling(self, kind: str | None) -> None:
        for name, kinds in _SCALED_BY.items():
            if getattr(self.options, name) is not None and kind not in kinds:
                how = "not scaled" if kind is None else f"scaled by {kind}"
                self.problem(name, f"rotary frequencies are {how}", f"add --rope-scaling-type {' or '.join(kinds)}")

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
        """A value that a scaling needs: the option's, else that of `base`."""
        if value := self.first(getattr(self.options, option or name), getattr(base, name, None), 0):
            return value
        kind = self.options.rope_scaling_type
        usual = "Llama 3.1: 8, 1, 4, 8192" if kind == "llama3" else "Qwen2 on 32K tokens: 8, 4096"
        self.problem(option or name, f"--rope-scaling-type {kind} needs it", f"give it ({usual})")
        return 1

    def tied(self) -> bool:
        untied = self.options.untie_embeddings_and_output_weights
        return self.first(None if untied is None else not untied, self.base and self.base.tied, True)

    def vocabulary(self, tokens: int | None) -> int:
        """Rows of the embedding: tokens, rounded up or as said."""
        options = self.options
        base = self.base.vocab_size if self.base else None
        tokens = self.first(options.vocab_size, base, tokens, 0)
        if not tokens and not options.padded_vocab_size:
            self.problem("vocab_size", "nothing says how many tokens there are", "give --vocab-size or a tokenizer")
        if options.padded_vocab_size is None:
            multiple = self.first(options.make_vocab_size_divisible_by, 1 if base else VOCAB_MULTIPLE)
            return -(-tokens // multiple) * multiple
        if options.padded_vocab_size < tokens:
            self.problem("padded_vocab_size", f"there are {tokens} tokens", f"take at least {tokens}")
        return options.padded_vocab_size
