"""What a family of models is.

Owns the form that every family file fills: how its `config.json` reads, how its weights are laid out, which sizes are
known by name. Knows no single family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cordee.families.options import Shape, followers, scaling_section
from cordee.families.reader import ConfigReader
from cordee.families.rules import Rule
from cordee.model.config import ModelConfig

HFConfig = dict[str, Any]

# Which key of a `config.json` holds what options may say of a model: the names that most families share.
KEYS: Mapping[str, str | Callable[[Any], HFConfig]] = {
    "attention_dropout": "attention_dropout",
    "hidden_dropout": "hidden_dropout",
    "ffn_hidden_size": "intermediate_size",
    "hidden_size": "hidden_size",
    "init_method_std": "initializer_range",
    "kv_channels": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
    "norm_epsilon": "rms_norm_eps",
    "num_attention_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
    "num_query_groups": "num_key_value_heads",
    "rope_scaling": lambda scaling: {"rope_scaling": scaling_section(scaling)},
    "rotary_base": "rope_theta",
    "tied": "tie_word_embeddings",
    "vocab_size": "vocab_size",
}


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published size: the keys of its `config.json` that matter, and under which licence its weights are given."""

    config: HFConfig
    licence: str


@dataclass(frozen=True)
class LeftOut:
    """A part of published models that is not built: what it is, for people, the beginnings of the names of its tensors,
    and what `config.json` says without it.
    """

    what: str
    prefixes: tuple[str, ...]
    config: HFConfig


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of models, as data.

    architectures: names in `config.json`; the first is written where a configuration has none.
    read: takes the values of a `config.json`; wrong ones it notes in the reader.
    weights: how every parameter of such a model is laid out in a checkpoint, weight and bias of all modules;
        rules for parameters that a given model lacks are left out (`ModelSpec.rules`).
    base_prefix: what names begin with in a checkpoint with a head, and lack in one of the bare base model.
    ignored: names in checkpoints that carry no weights, `{i}` standing for a number.
    left_out: the part of published models that `read` leaves out, in a model of this `config.json`.
    from_shape: the `config.json` of a model given by options alone, or None if the family has no such model; families
        that no options lead to have no such function.
    fits: which options lead to the family, for people.
    keys: without `from_shape`, which key holds each field of a `Shape`, or each feature, that options may change in a
        model, or what makes keys of its value.
    """

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    read: Callable[[ConfigReader], ModelConfig]
    weights: Callable[[ModelConfig], list[Rule]]
    base_prefix: str = ""
    ignored: tuple[str, ...] = ()
    left_out: Callable[[HFConfig], LeftOut] | None = None
    from_shape: Callable[[Shape], HFConfig | None] | None = None
    fits: str = ""
    keys: Mapping[str, str | Callable[[Any], HFConfig]] = field(default_factory=lambda: KEYS)
    presets: Mapping[str, Preset] = field(default_factory=dict)

    def config(self, hf: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The model that a `config.json` describes; ProblemError with all that is wrong with it."""
        reader = ConfigReader(hf, where)
        config = self.read(reader)
        reader.finish()
        return config

    def changes(self, before: Shape, after: Shape, features: Mapping[str, Any]) -> HFConfig | None:
        """Keys of `config.json` that make `after` of `before` and set `features`, None for those to take out.

        None if nothing can.
        """
        if self.from_shape is not None:
            if features:
                return None
            old, new = self.from_shape(before), self.from_shape(after)
            if old is None or new is None:
                return None
            return {key: new.get(key) for key in old | new if old.get(key) != new.get(key)}
        differing = {name: value for name, value in vars(after).items() if value != getattr(before, name)}
        if "qk_nope_head_dim" in self.keys:
            differing.pop("kv_channels", None)  # of latent attention it is a sum
        if differing.keys() - self.keys.keys() <= followers(before, after) and features.keys() <= self.keys.keys():
            differing |= features
            changed = [(self.keys[name], value) for name, value in differing.items() if name in self.keys]
            parts = [{key: value} if isinstance(key, str) else key(value) for key, value in changed]
            return {key: value for part in parts for key, value in part.items()}
        return None

    @property
    def changeable(self) -> str:
        """What options may say of a model, for people."""
        return self.fits or f"options may change {', '.join(sorted(self.keys))}"

    def skeleton(self, hf: Mapping[str, Any]) -> HFConfig:
        """`hf` with the keys that say which family it is."""
        return {"architectures": [self.architectures[0]], "model_type": self.model_types[0], **hf}
