"""What a family of models is.

Owns the form of every family file: how its `config.json` reads, how its weights are laid out, its presets. Knows no
single family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.families import common
from cordee.families.lenses import Words, scaling_of, words_of
from cordee.families.reader import ConfigReader
from cordee.families.rope import write_scaling
from cordee.model.config import LayerConfig, ModelConfig
from cordee.tensors.rules import Rule, each_layer, module

HFConfig = dict[str, Any]
OF_WEIGHTS = {"dtype", "torch_dtype"}  # keys of the stored weights, not of the model

Keys = Mapping[str, str | Callable[[Words], Any]]

# The keys of a `config.json` by the words of the options: a word, or a function of several. Most families share these.
KEYS: Keys = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "max_position_embeddings": "max_position_embeddings",
    "initializer_range": "init_method_std",
    "rms_norm_eps": "norm_epsilon",
    "rope_theta": "rotary_base",
    "rope_scaling": lambda words: write_scaling(scaling_of(words)),
    "tie_word_embeddings": "tied",
    "attention_dropout": "attention_dropout",
    "hidden_dropout": lambda words: words["hidden_dropout"] or None,  # transformers has no such key
}


def keys(without: str = "", **more: str | Callable[[Words], Any]) -> Keys:
    """The usual keys except those in `without`, and `more`."""
    return {**{key: word for key, word in KEYS.items() if key not in without.split()}, **more}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published size: the relevant keys of its `config.json`, and the licence of its weights."""

    config: HFConfig
    licence: str


@dataclass(frozen=True)
class LeftOut:
    """A part of published models that is not built: its description, the prefixes of its tensor names, and the
    `config.json` without it."""

    what: str
    prefixes: tuple[str, ...]
    config: HFConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, as data.

    architectures: names in `config.json`; the first is written where a configuration has none, `classifier` is that of
        transformers' classifiers of sequences, which reward models are written as.
    model_types: as `architectures`, the family's own `name` unless they are others.
    read: reads a `config.json`; problems are collected in the reader.
    layer_weights, layer_prefix: rules of the parameters of a layer, and what their names in a checkpoint begin with;
        `{i}` is the layer. By default LLaMA's, as are `outer_weights`, the rules of all other parameters.
    base_prefix: prefix of names in a checkpoint with a head, absent in one of the base model alone.
    ignored: names in checkpoints that are no weights; `{i}` is a number.
    left_out: the part of published models that `read` leaves out, in a model of this `config.json`.
    keys: the keys that follow from a model. All others are as in the first preset.
    plain: models of options alone are matched with this family before others.
    presets: published models by name; the registry takes them from `presets.yaml`."""

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...] = ()
    read: Callable[[ConfigReader], ModelConfig]
    layer_weights: Callable[[LayerConfig], list[Rule]] = common.layer_weights
    layer_prefix: str = "model.layers.{i}."
    outer_weights: tuple[Rule, ...] = common.outer_weights("model.embed_tokens", "model.norm")
    base_prefix: str = "model."
    ignored: tuple[str, ...] = ()
    left_out: Callable[[HFConfig], LeftOut] | None = None
    keys: Keys = field(default_factory=lambda: KEYS)
    plain: bool = False
    presets: Mapping[str, Preset] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "model_types", self.model_types or (self.name,))

    @property
    def classifier(self) -> str | None:
        return next((name for name in self.architectures if name.endswith("ForSequenceClassification")), None)

    def config(self, hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The model that a `config.json` describes; ProblemError with all that is wrong with it."""
        reader = ConfigReader(hf, where)
        config = self.read(reader)
        reader.finish()
        return config

    def weights(self, config: ModelConfig) -> list[Rule]:
        """The rule of every parameter in a checkpoint, weight and bias of all modules, also of those it lacks."""
        layers = each_layer(config, self.layer_weights, self.layer_prefix)
        return [*self.outer_weights, *layers, *module("score", "score")]

    def written(self, words: Words) -> HFConfig:
        """The values of `keys` for a model with these words."""
        return {key: words[word] if isinstance(word, str) else word(words) for key, word in self.keys.items()}

    def to_hf(self, config: ModelConfig, given: Words | None = None) -> HFConfig:
        """A `config.json` that reads as `config` if the family has such a model.

        `given`: words as the user gave them, exact where those of `config` are rounded."""
        preset = next(iter(self.presets.values()), None)
        hf = {key: value for key, value in preset.config.items() if key not in OF_WEIGHTS} if preset else {}
        hf = {key: value for key, value in hf.items() if not key.endswith("_token_id")}  # of the preset's own tokenizer
        return changed(self.skeleton(hf), self.written({**words_of(config), **(given or {})}))

    def skeleton(self, hf: Mapping[str, Any]) -> HFConfig:
        """`hf` with the keys that name the family."""
        return {"architectures": [self.architectures[0]], "model_type": self.model_types[0], **hf}


def changed(hf: HFConfig, values: HFConfig) -> HFConfig:
    """`hf` with these `values`; None makes an existing key null and adds no other."""
    return {**hf, **{key: value for key, value in values.items() if value is not None or key in hf}}
