"""Every family, and the one way to name a model.

Owns the list of families, found by looking at the files of this package, and `ModelSpec`, which everything above takes
for "which model": a family, its `config.json`, and what that reads as. Knows no weights and no torch.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cordee.families
from cordee.config.schema import ModelOptions
from cordee.errors import Problem, ProblemError
from cordee.families.count import canonical_shapes
from cordee.families.family import Family, HFConfig
from cordee.families.features import Features, features_of, given_features, missing, unwanted, with_defaults
from cordee.families.options import Shape, resolve, shape_of
from cordee.families.reader import ConfigReader, nearest
from cordee.families.rules import Rule
from cordee.model.config import ModelConfig

logger = logging.getLogger("cordee")

GUIDE = "docs/adding-a-family.md tells how to add one"
OF_WEIGHTS = {"dtype", "torch_dtype"}  # keys that say how weights are stored
ROPE_KEYS = {"rope_theta", "rope_scaling"}  # as transformers 4 writes them; 5 has both in rope_parameters


@functools.cache
def families() -> dict[str, Family]:
    """All families by name: every module of this package that defines `FAMILY`."""
    names = sorted(module.name for module in pkgutil.iter_modules(cordee.families.__path__))
    modules = [importlib.import_module(f"cordee.families.{name}") for name in names]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.name: family for family in found}


@dataclass(frozen=True)
class ModelSpec:
    """Which model: what its family is, the `config.json` it is written with, and what that means.

    `base_prefix` tells whether the family's `base_prefix` begins the names in its checkpoint.
    """

    family: Family
    hf_config: HFConfig
    config: ModelConfig
    base_prefix: bool = True

    @property
    def dtype(self) -> str | None:
        """Name of the type the weights are stored in, as far as the configuration tells."""
        return self.hf_config.get("dtype") or self.hf_config.get("torch_dtype")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every parameter by canonical name."""
        return canonical_shapes(self.config)

    def rules(self) -> dict[str, Rule]:
        """The rule of every parameter by canonical name."""
        shapes = self.shapes()
        rules = {rule.canonical: rule for rule in self.family.weights(self.config) if rule.canonical in shapes}
        assert rules.keys() == shapes.keys(), f"{self.family.name} has no rule for {shapes.keys() - rules.keys()}"
        if not self.base_prefix:
            rules = {name: rule.named(str, self._bare) for name, rule in rules.items()}
        return {name: rules[name] for name in shapes}

    def _bare(self, foreign: str) -> str:
        return foreign.removeprefix(self.family.base_prefix)

    def with_options(self, options: ModelOptions) -> ModelSpec:
        """The same model with what `options` change. ProblemError if the family has no such model."""
        wanted = given_features(options)
        spec = self._with_shape(resolve(options, shape_of(self.config)), wanted)
        if spec is None:
            fits = f"family {self.family.name}: {self.family.changeable}"
            raise ProblemError([_no_such_model(options, fits)])
        return spec if spec is self else spec._with_fitting_tokens()

    def _with_shape(self, after: Shape, wanted: Features) -> ModelSpec | None:
        """The same model with this shape and the features that are `wanted`; None if the family has none."""
        before, differing = shape_of(self.config), missing(self.config, wanted)
        if before == after and not differing:
            return self
        changed = self.family.changes(before, after, differing)
        if changed is None:
            return None
        spec = self._with_keys(changed)
        return spec if shape_of(spec.config) == after and not missing(spec.config, wanted) else None

    def _with_keys(self, changed: HFConfig) -> ModelSpec:
        """The same model with other values of keys, None to take one out."""
        hf = dict(self.hf_config)
        if changed.keys() & ROPE_KEYS and (rope := hf.pop("rope_parameters", None)):
            hf["rope_theta"] = rope.get("rope_theta")
            hf["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        hf = {key: value for key, value in (hf | changed).items() if key not in changed or value is not None}
        return replace(spec_from_hf(hf, "model options"), base_prefix=self.base_prefix)

    def _with_fitting_tokens(self) -> ModelSpec:
        """The same model without special tokens that its vocabulary lacks."""
        rows = self.config.vocab_size
        if not (strange := _strange_tokens(self.hf_config, rows)):
            return self
        names = ", ".join(f"{key} = {self.hf_config[key]}" for key in strange)
        logger.warning("left out, as the vocabulary has %d tokens: %s", rows, names)
        return replace(self, hf_config=self.hf_config | dict.fromkeys(strange))  # null: a default may not fit either

    def with_vocab_size(self, vocab_size: int) -> ModelSpec:
        """The same model with `vocab_size` rows in its embedding and head."""
        return self.with_options(ModelOptions(padded_vocab_size=vocab_size, vocab_size=vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` needs, as JSON holds it."""
        return {"family": self.family.name, "hf_config": self.hf_config, "base_prefix": self.base_prefix}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> ModelSpec:
        """The model that `to_dict` stored."""
        spec = spec_from_hf(stored["hf_config"], "stored model")
        assert spec.family.name == stored["family"], f"{spec.family.name} is not {stored['family']}"
        return replace(spec, base_prefix=stored["base_prefix"])


def _is_no_token(key: str) -> bool:
    return not key.endswith("_token_id")


def _strange_tokens(hf: Mapping[str, Any], vocab_size: int) -> list[str]:
    """Keys of special tokens that a vocabulary lacks: with those transformers may not even build the model."""
    ids = {key: value if isinstance(value, list) else [value] for key, value in hf.items() if not _is_no_token(key)}
    return [key for key, tokens in ids.items() if any(isinstance(t, int) and t >= vocab_size for t in tokens)]


def spec_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The model that a Hugging Face configuration describes. ProblemError with all that is wrong with it."""
    family = _family_of(hf, where)
    complete = family.skeleton(hf)
    reader = ConfigReader(complete, where)
    config = family.read(reader)
    reader.finish()
    if unread := reader.unread():
        logger.warning("%s: keys that family %s does not know: %s", where, family.name, ", ".join(sorted(unread)))
    return ModelSpec(family, complete, config)


def _family_of(hf: Mapping[str, Any], where: str) -> Family:
    architectures = {name: family for family in families().values() for name in family.architectures}
    if given := hf.get("architectures"):
        if given[0] in architectures:
            return architectures[given[0]]
        why, fix = f"no family for this architecture; {nearest(given[0], architectures)}", GUIDE
        raise ProblemError([Problem(f"{where}: architectures", given[0], why, fix)])
    types = {name: family for family in families().values() for name in family.model_types}
    given = hf.get("model_type")
    if given in types:
        return types[given]
    if given is None:
        why, fix = "neither architectures nor model_type is there", "take the config.json published with the weights"
    else:
        why, fix = f"no family for this model type; {nearest(given, types)}", GUIDE
    raise ProblemError([Problem(f"{where}: model_type", given, why, fix)])


def spec_from_directory(path: str | Path) -> ModelSpec:
    """The model in a Hugging Face directory. ProblemError if there is none or its configuration is wrong."""
    file = Path(path) / "config.json"
    if not Path(path).is_dir():
        why, fix = "there is no such directory", "give the directory that holds config.json and the weights"
        raise ProblemError([Problem("model directory", path, why, fix)])
    if not file.is_file():
        why, fix = "there is no config.json in it", "give the directory that holds config.json and the weights"
        raise ProblemError([Problem("model directory", path, why, fix)])
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ProblemError([Problem(str(file), None, f"not JSON: {error}", "copy the file again")]) from error
    if not isinstance(hf, dict):
        raise ProblemError([Problem(str(file), None, "not a JSON object", "copy the file again")])
    return spec_from_hf(hf, str(file))


def presets() -> dict[str, Family]:
    """The family of every preset by the preset's name."""
    return {name: family for family in families().values() for name in family.presets}


def spec_from_preset(name: str) -> ModelSpec:
    """The model with the published size `name`. ProblemError with the nearest names if there is none."""
    known = presets()
    if name not in known:
        raise ProblemError(
            [Problem("--model", name, f"unknown preset; {nearest(name, known)}", "`cordee models` lists them")]
        )
    family = known[name]
    return spec_from_hf(family.skeleton(family.presets[name].config), f"preset {name}")


def spec_named(name: str) -> ModelSpec:
    """The model that --model names: a preset, or that of the `config.json` in a directory."""
    return spec_from_directory(name) if Path(name).is_dir() else spec_from_preset(name)


def spec_from_options(options: ModelOptions, vocab_size: int | None = None) -> ModelSpec:
    """The model that options describe: `--model` with what else they say, or a shape on its own.

    `vocab_size`, the tokenizer's, stands in where the options give none and there is no --model. ProblemError with all
    that is missing or contradictory, or if no family has such a model.
    """
    if options.model is not None:
        return spec_named(options.model).with_options(options)
    shape, wanted = resolve(options, None, vocab_size), with_defaults(given_features(options))
    spec = _of_family_of_shape(shape)
    if spec is None or missing(spec.config, wanted):
        spec = next(_like_presets(shape, wanted), None)
    if spec is None:
        raise ProblemError([_no_such_model(options, _possible(wanted))])
    return spec


def _of_family_of_shape(shape: Shape) -> ModelSpec | None:
    """The model of the first family that options alone lead to."""
    for family in families().values():
        hf = family.from_shape(shape) if family.from_shape else None
        if hf is not None:
            return spec_from_hf(family.skeleton(hf), "model options")
    return None


def _like_presets(shape: Shape, wanted: Features) -> Iterator[ModelSpec]:
    """Models of this shape, with the features that are `wanted` and no others, made of presets."""
    for name in presets():
        preset = spec_from_preset(name)
        # What a preset says of its tokens and of the type of its weights is not the new model's.
        own = {key: value for key, value in preset.hf_config.items() if key not in OF_WEIGHTS and _is_no_token(key)}
        spec = replace(preset, hf_config=own)._with_shape(shape, wanted)
        if spec is not None and not unwanted(spec.config, wanted):
            yield spec


def _possible(wanted: Features) -> str:
    """What there is instead of a model that no family has."""
    having = [name for name in presets() if wanted.keys() <= features_of(spec_from_preset(name).config).keys()]
    if not any(wanted.values()):
        fits = [f"{family.name}: {family.fits}" for family in families().values() if family.from_shape]
        return "; ".join([*fits, "others by --model"])
    if not having:
        return "--model with a preset or a config.json; none has all of that together"
    return f"--model with a preset that has these features ({', '.join(having)}), and what is to be different"


def _no_such_model(options: ModelOptions, fits: str) -> Problem:
    given = {name: getattr(options, name) for name in ModelOptions.__dataclass_fields__} | given_features(options)
    text = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    return Problem("model options", text, "no family has a model of this form", f"possible are: {fits}")
