"""Every family, and the one way to name a model.

Owns the list of families, which are the modules of this package with a `FAMILY`, and `ModelSpec`, by which everything
above names a model: a family, its `config.json`, and the `ModelConfig` that it reads as. Knows no weights and no torch.
"""

import functools
import importlib
import logging
import pkgutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cordee.families
from cordee import sealed
from cordee.config.spelling import unknown
from cordee.errors import Problem, ProblemError, raise_all
from cordee.families.count import canonical_shapes
from cordee.families.family import Family, HFConfig, changed
from cordee.families.lenses import (
    LENSES,
    PATTERN,
    Words,
    differences,
    features_of,
    flag_of,
    missing,
    model_of,
    same,
    words_of,
)
from cordee.families.options import check, given_features, resolve, with_defaults
from cordee.families.presets import published
from cordee.families.reader import ConfigReader, read_object
from cordee.model.compare import canonical
from cordee.model.config import LowRankConfig, ModelConfig
from cordee.model.options import ModelOptions
from cordee.tensors.rules import Rule

logger = logging.getLogger("cordee")

GUIDE = "docs/adding-a-family.md shows how to add one"
ROPE_KEYS = {"rope_theta", "rope_scaling"}  # as transformers 4 writes them; 5 has both in rope_parameters


@functools.cache
def families() -> dict[str, Family]:
    """All families by name, with their presets: every module of this package that defines `FAMILY`."""
    names = sorted(module.name for module in pkgutil.iter_modules(cordee.families.__path__))
    modules = [importlib.import_module(f"cordee.families.{name}") for name in names]
    found = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return {family.name: replace(family, presets=published(family.name)) for family in found}


@dataclass(frozen=True)
class ModelSpec:
    """A model: its family, its `config.json`, and the `ModelConfig` that this reads as.

    base_prefix: whether the family's `base_prefix` begins the names in its checkpoint."""

    family: Family
    hf_config: HFConfig
    config: ModelConfig
    base_prefix: bool = True

    @property
    def dtype(self) -> str | None:
        """Name of the dtype of the stored weights, if the configuration has it."""
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
            prefix = self.family.base_prefix
            rules = {name: rule.named(str, lambda key: key.removeprefix(prefix)) for name, rule in rules.items()}
        return {name: rules[name] for name in shapes}

    def with_options(self, options: ModelOptions) -> "ModelSpec":
        """The same model changed by `options`. ProblemError if the family has no such model."""
        there, wanted = features_of(self.config), given_features(options)
        if "num_experts" not in there:
            wanted = with_defaults(wanted)
        if not wanted.keys().isdisjoint(PATTERN):
            wanted = {**{name: there[name] for name in PATTERN if name in there}, **wanted}
        before = words_of(self.config)
        form = resolve(options, {**there, **wanted}, before)
        new = missing(self.config, wanted)
        after = {**before, **new, **form}
        if after == before:
            return self
        old, keys = self.family.written(before), self.family.written(after)
        asked = {name for name in new if not same(new[name], before[name])}
        if placeless := [name for name in asked if self.family.written({**before, name: new[name]}) == old]:
            raise self._no_place(options, placeless)
        differing = {key: value for key, value in keys.items() if value != old[key]}
        try:
            return self._asked(options, differing, form, wanted)
        except ProblemError:  # an absent key may have followed from one that differs now: write all
            return self._asked(options, keys, form, wanted)

    def _asked(self, options: ModelOptions, values: HFConfig, form: Words, wanted: Words) -> "ModelSpec":
        """The same model with other `values` of keys. ProblemError if it has not this form and what is `wanted`."""
        spec = self._with_keys(values)
        if refused := _refused(self.config, spec.config, form, wanted):
            raise self._no_place(options, refused)
        return spec._with_fitting_tokens()

    def _no_place(self, options: ModelOptions, refused: Iterable[str]) -> ProblemError:
        flags = list(dict.fromkeys(map(flag_of, sorted(refused))))  # two words say the activation
        fits = f"family {self.family.name}, which has no place for {', '.join(flags)}"
        return ProblemError([_no_such_model(options, fits, flags)])

    def _with_keys(self, values: HFConfig) -> "ModelSpec":
        """The same model with other `values` of keys."""
        hf = dict(self.hf_config)
        if values.keys() & ROPE_KEYS and (rope := hf.pop("rope_parameters", None)):
            hf["rope_theta"] = rope.get("rope_theta")
            hf["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        spec = spec_from_hf(changed(hf, values), "model options")
        spec = replace(spec, base_prefix=self.base_prefix).adapted_as(self.config)
        return spec.with_heads(score=self.config.score, lm_head=self.config.lm_head)

    def _with_fitting_tokens(self) -> "ModelSpec":
        """The same model without special tokens that its vocabulary lacks."""
        rows = self.config.vocab_size
        if not (strange := _strange_tokens(self.hf_config, rows)):
            return self
        names = ", ".join(f"{key} = {self.hf_config[key]}" for key in strange)
        logger.warning("left out, as the vocabulary has %d tokens: %s", rows, names)
        return replace(self, hf_config=self.hf_config | dict.fromkeys(strange))  # null: a default may not fit either

    def with_tokens(self, bos: int | None, eos: int | None) -> "ModelSpec":
        """The same model for another tokenizer: texts begin with `bos` and end with `eos`, None for no such token."""
        known = self.hf_config.get("eos_token_id")
        if known is None or eos in (known if isinstance(known, list) else [known]):
            return self
        named = self.hf_config | {"bos_token_id": bos, "eos_token_id": eos}
        return replace(self, hf_config=named)._with_fitting_tokens()

    def with_vocab_size(self, vocab_size: int) -> "ModelSpec":
        """The same model with `vocab_size` rows in its embedding and head."""
        return self.with_options(ModelOptions(padded_vocab_size=vocab_size, vocab_size=vocab_size))

    def to_dict(self) -> dict[str, Any]:
        """The model as JSON, for `from_dict`."""
        found = {"family": self.family.name, "hf_config": self.hf_config, "base_prefix": self.base_prefix}
        adapters = {name: getattr(self.config, name) for name in ("low_rank", "tuned", "num_prefix_tokens")}
        adapters["low_rank"] = [asdict(each) for each in adapters["low_rank"]]
        heads = {"score": self.config.score, "lm_head": self.config.lm_head}
        heads = {name: value for name, value in heads.items() if value != (name == "lm_head")}
        return found | heads | {name: value for name, value in adapters.items() if value}

    @staticmethod
    def from_dict(stored: Mapping[str, Any]) -> "ModelSpec":
        """The model that `to_dict` stored, which is of the form `STORED_SPEC`. ProblemError with all that is wrong."""
        spec = spec_from_hf(stored["hf_config"], "stored model")
        if spec.family.name != stored["family"]:
            why = f"its configuration is of family {spec.family.name}"
            raise ProblemError.of("stored model: family", stored["family"], why, "copy the checkpoint again")
        low_rank = [LowRankConfig(**{**each, "targets": tuple(each["targets"])}) for each in stored.get("low_rank", ())]
        further = stored.get("tuned", ()), stored.get("num_prefix_tokens", 0)
        spec = replace(spec, base_prefix=stored["base_prefix"]).adapted(low_rank, *further)
        config = spec.config
        return spec.with_heads(score=stored.get("score", config.score), lm_head=stored.get("lm_head", config.lm_head))

    def adapted(self, low_rank: Iterable[LowRankConfig], tuned: Iterable[str], prefix: int = 0) -> "ModelSpec":
        """The same model with these adapters, tuned modules, and tokens of a prefix. ProblemError if it has none."""
        config = replace(self.config, low_rank=tuple(low_rank), tuned=tuple(tuned), num_prefix_tokens=prefix)
        return replace(self, config=config)

    def adapted_as(self, other: ModelConfig) -> "ModelSpec":
        """The same model with the adapters of another."""
        return self.adapted(other.low_rank, other.tuned, other.num_prefix_tokens)

    def with_heads(self, *, score: bool, lm_head: bool) -> "ModelSpec":
        """The same model with or without a value head, and a head over the vocabulary.

        The `config.json` of a reward model is that of transformers' classifier with one label, if the family has one.
        """
        hf, classifier = self.hf_config, self.family.classifier
        if score and not lm_head and classifier and not _is_classifier(self.family, hf):
            labels = {"num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
            padding = {"pad_token_id": _padding(hf, self.config.vocab_size)}
            hf = hf | {"architectures": [classifier]} | labels | padding
        return replace(self, hf_config=hf, config=replace(self.config, score=score, lm_head=lm_head))

    def without_values(self, option: str, notes: list[str]) -> "ModelSpec":
        """A language model without the value head that it may have. ProblemError, of `option`, for a reward model."""
        if not self.config.lm_head:
            why, fix = "it is a reward model, which has no head over the vocabulary", "give a language model"
            raise ProblemError.of(option, self.hf_config["architectures"][0], why, fix, "reward model")
        if self.config.score:
            notes.append("the value head of what is loaded is left out")
        return self.with_heads(score=False, lm_head=True)


_NAMES = sealed.listed(sealed.text())
_LOW_RANK = sealed.of(LowRankConfig, added=("dora",), targets=_NAMES)
STORED_SPEC = sealed.record(
    {"family": sealed.text(), "hf_config": sealed.record({}), "base_prefix": sealed.flag},
    {
        "score": sealed.flag,
        "lm_head": sealed.flag,
        "low_rank": sealed.listed(_LOW_RANK),
        "tuned": _NAMES,
        "num_prefix_tokens": sealed.count(),
    },
)


def _padding(hf: Mapping[str, Any], vocab_size: int) -> int:
    """The padding of a classifier, which takes the score at the last token that is another: what ends no sequence."""
    ends = ends if isinstance(ends := hf.get("eos_token_id"), list) else [ends]
    candidates = (hf.get("pad_token_id"), hf.get("bos_token_id"), *range(vocab_size - 1, 0, -1))
    return next(each for each in candidates if isinstance(each, int) and each >= 0 and each not in ends)


def _is_classifier(family: Family, hf: Mapping[str, Any]) -> bool:
    return family.classifier in (hf.get("architectures") or ())[:1]


def _strange_tokens(hf: Mapping[str, Any], vocab_size: int) -> list[str]:
    """Keys of special tokens that a vocabulary lacks: with those transformers may not even build the model."""
    ids = {key: value for key, value in hf.items() if key.endswith("_token_id")}
    several = {key: value if isinstance(value, list) else [value] for key, value in ids.items()}
    return [key for key, tokens in several.items() if any(isinstance(t, int) and t >= vocab_size for t in tokens)]


def spec_from_hf(hf: Mapping[str, Any], where: str = "config.json") -> ModelSpec:
    """The model that a Hugging Face configuration describes. ProblemError with all that is wrong with it."""
    spec, unread = _read(hf, where)
    if unread:
        logger.warning("%s: keys that family %s does not know: %s", where, spec.family.name, ", ".join(sorted(unread)))
    return spec


def _read(hf: Mapping[str, Any], where: str) -> tuple[ModelSpec, set[str]]:
    """The model, and the keys that mean nothing to its family."""
    family = _family_of(hf, where)
    complete = family.skeleton(hf)
    reader = ConfigReader(complete, where)
    try:
        config = family.read(reader)
    except ProblemError as error:  # of a model that is too large
        further = (replace(problem, option=f"{where}: {problem.option}") for problem in error.problems)
        raise ProblemError([*reader.problems, *further]) from error
    if scores := _is_classifier(family, hf):
        count = reader.integer("num_labels", len(reader.section("id2label")) or 2)
        if count != 1:
            fix = "take a reward model, which has one label: its score"
            reader.problem("num_labels", f"it has {count} labels, and a reward model has one", fix, "labels", count)
    reader.finish()
    config = replace(config, score=True, lm_head=False) if scores else config
    return ModelSpec(family, complete, config), set(reader.unread())


def _family_of(hf: Mapping[str, Any], where: str) -> Family:
    architectures = {name: family for family in families().values() for name in family.architectures}
    if given := hf.get("architectures"):
        if not isinstance(given, list) or not isinstance(given[0], str):
            why = "it is no array of names"
            raise ProblemError.of(f"{where}: architectures", given, why, "give the name in an array")
        if given[0] in architectures:
            return architectures[given[0]]
        why = f"no family for this architecture; {GUIDE}"
        raise ProblemError([unknown(f"{where}: architectures", given[0], architectures, why)])
    types = {name: family for family in families().values() for name in family.model_types}
    given = hf.get("model_type")
    if given is not None and not isinstance(given, str):
        raise ProblemError.of(f"{where}: model_type", given, "it is no name", "give the name of a model type")
    if given in types:
        return types[given]
    if given is None:
        why, fix = "neither architectures nor model_type is there", "take the config.json published with the weights"
        raise ProblemError.of(f"{where}: model_type", given, why, fix, "missing")
    raise ProblemError([unknown(f"{where}: model_type", given, types, f"no family for this model type; {GUIDE}")])


def spec_from_directory(path: str | Path) -> ModelSpec:
    """The model in a Hugging Face directory. ProblemError if there is none or its configuration is wrong."""
    file = Path(path) / "config.json"
    if not file.is_file():
        what, limit = (f"{file.name} in it", file.name) if file.parent.is_dir() else ("such directory", None)
        fix = "give the directory that holds config.json and the weights"
        raise ProblemError.of("model directory", path, f"there is no {what}", fix, "missing", limit=limit)
    return spec_from_hf(read_object(file), str(file))


def presets() -> dict[str, Family]:
    """The family of every preset by the preset's name."""
    return {name: family for family in families().values() for name in family.presets}


def spec_from_preset(name: str) -> ModelSpec:
    """The model with the published size `name`. ProblemError with the nearest names if there is none."""
    known = presets()
    if name not in known:
        raise ProblemError([unknown("--model", name, known, "unknown preset; `cordee models` lists them")])
    family = known[name]
    return spec_from_hf(family.skeleton(family.presets[name].config), f"preset {name}")


def spec_named(name: str) -> ModelSpec:
    """The model of --model: a preset or, if there is none, that of a `config.json` or of one in a directory."""
    path = Path(name)
    if name in presets() or not path.exists():
        return spec_from_preset(name)
    return spec_from_directory(path) if path.is_dir() else spec_from_hf(read_object(path), str(path))


def spec_from_options(options: ModelOptions, vocab_size: int | None = None) -> ModelSpec:
    """The model that options describe: `--model` and changes of it, or a model of flags alone.

    `vocab_size`, the tokenizer's, stands in where there is neither an option nor --model. ProblemError with all that is
    missing or contradictory, or if no family has such a model."""
    if options.model is not None:
        return spec_named(options.model).with_options(options)
    wanted = with_defaults(given_features(options))
    words = {**wanted, **resolve(options, wanted, None, vocab_size)}
    raise_all(check(words))
    model = model_of(words)
    tried = []
    for family in sorted(families().values(), key=lambda family: not family.plain):
        with suppress(ProblemError):  # this family has no such model, another may
            spec, _ = _read(family.to_hf(model, words), "model options")
            tried.append((differences(canonical(model), canonical(spec.config)), spec))
            if not tried[-1][0] and not missing(spec.config, wanted):
                return spec
    raise ProblemError([_no_such_model(options, *_nearest(tried))])


def _refused(before: ModelConfig, after: ModelConfig, form: Words, wanted: Words) -> set[str]:
    """The words that `after` lacks, and the features that it gains or loses unasked.

    Experts may be lost: few layers may all be among the leading dense ones."""
    ours, theirs = features_of(before), features_of(after)
    switches = {name for words in (ours, theirs) for name, value in words.items() if value is True}
    unasked = {name for name in switches - wanted.keys() - {"norm_topk_prob"} if ours.get(name) != theirs.get(name)}
    other = {name for name in form if not same(form[name], LENSES[name].get(after))}
    return other | missing(after, wanted).keys() | unasked


def _nearest(tried: list[tuple[dict[str, Any], ModelSpec]]) -> tuple[str, list[str]]:
    """The family that differs in the fewest places from a model that none has, for people, and in which."""
    fits = "models of --model, and changes of them"
    if not tried:
        return fits, []
    differing, spec = min(tried, key=lambda pair: len(pair[0]))
    places = sorted(differing) or ["something without an option"]
    return f"{fits}; the nearest family, {spec.family.name}, differs in {', '.join(places)}", places


def _no_such_model(options: ModelOptions, fits: str, differing: list[str]) -> Problem:
    given = {name: getattr(options, name) for name in ModelOptions.__dataclass_fields__}
    text = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    why = "no family has a model of this form"
    return Problem("model options", text, why, f"possible are: {fits}", "unknown", limit=differing)
