"""Adapters in the files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`.

Owns what stands in them and which of it can be merged: LoRA of linear layers and embeddings, and whole tensors trained
beside it. Names are those of Hugging Face's modules, so any base can take them, whatever its own format.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cordee.errors import Problem, ProblemError, raise_all
from cordee.families.registry import ModelSpec
from cordee.families.rules import Leaf, Op, Shape, View
from cordee.files import read_json
from cordee.weights.adapter import Change, Given, LowRank
from cordee.weights.files import COPY_AGAIN, UNREADABLE, BinFile, SafetensorsFile, TensorFile

CONFIG = "adapter_config.json"
FILES: Mapping[str, type[SafetensorsFile] | type[BinFile]] = {
    "adapter_model.safetensors": SafetensorsFile,
    "adapter_model.bin": BinFile,
}
PREFIX = "base_model.model."
# Settings under which the merged weights are something else than W + scale * B A.
UNMERGEABLE = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")


def is_adapter(path: Path) -> bool:
    """Whether a directory is of PEFT."""
    return (path / CONFIG).is_file()


@dataclass
class _Factors:
    """The names in the file of A and B of one tensor."""

    embedding: bool
    names: dict[str, str] = field(default_factory=dict)


def read(given: Given, spec: ModelSpec) -> PeftAdapter:
    """The adapter at `given.path`, for a base model `spec`. ProblemError with everything that is wrong with it."""
    config = _read_config(given.path)
    raise_all(_check_config(given, config))
    return PeftAdapter(given, config, spec, _open(given.path))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = read_json(path / CONFIG)
    except (OSError, ValueError) as error:
        raise ProblemError([Problem(str(path / CONFIG), None, f"it cannot be read: {error}", COPY_AGAIN)]) from error
    if not isinstance(config, dict):
        raise ProblemError([Problem(str(path / CONFIG), None, "not a JSON object", COPY_AGAIN)])
    return config


def _check_config(given: Given, config: Mapping[str, Any]) -> Iterator[Problem]:
    where, fix = str(given.path / CONFIG), "merge it with PEFT's own merge_and_unload, and convert the result"
    if (kind := config.get("peft_type")) != "LORA":
        yield Problem(f"{where}: peft_type", kind, "only LoRA can be merged into weights", fix)
    for key in UNMERGEABLE:
        if config.get(key):
            yield Problem(f"{where}: {key}", config[key], "such an adapter is no sum of matrices", fix)
    for key, kinds in (("r", int), ("lora_alpha", int | float)):
        if not isinstance(config.get(key), kinds) or config[key] <= 0:
            yield Problem(f"{where}: {key}", config.get(key), "it must be a positive number", COPY_AGAIN)
    for flag, value, key in (("--lora-r", given.r, "r"), ("--lora-alpha", given.alpha, "lora_alpha")):
        if value is not None and value != config.get(key):
            yield Problem(flag, value, f"{where} says {config.get(key)}", "leave it out")


def _open(path: Path) -> TensorFile:
    for name, kind in FILES.items():
        if (path / name).is_file():
            try:
                return kind(path / name)
            except UNREADABLE as error:
                why = f"the file cannot be read: {error}"
                raise ProblemError([Problem(str(path / name), None, why, COPY_AGAIN)]) from error
    why = f"there is neither {' nor '.join(FILES)}"
    raise ProblemError([Problem(str(path), None, why, "copy the file of the adapter too")])


class PeftAdapter:
    """LoRA in a file of PEFT, by the family's names of tensors."""

    def __init__(self, given: Given, config: Mapping[str, Any], spec: ModelSpec, file: TensorFile):
        self.notes: tuple[str, ...] = ()
        self._path = given.path
        self._config = config
        self._file = file
        self._spec = replace(spec, base_prefix=True)
        self._rules = self._spec.rules()
        shapes = self._spec.shapes()
        self._shapes = {
            foreign: shape
            for name, rule in self._rules.items()
            for foreign, shape in zip(rule.foreign, rule.foreign_shapes(shapes[name]), strict=True)
        }
        self._factors: dict[str, _Factors] = {}
        self._whole: dict[str, str] = {}  # tensors that take the place of the base's, by its names
        self._changes: dict[str, Change] = {}
        unknown = self._sort()
        raise_all([*self._check_names(unknown), *self._check_modules(given.modules)])
        raise_all([*self._check_shapes(), *self._check_tied()])
        self._changes = {name: self._low_rank(name) for name in self._factors}
        self._changes |= {name: self._replacement(name) for name in self._whole}

    def changes(self, name: str) -> tuple[Op, Sequence[Change | None]] | None:
        rule = self._rules[name]
        changes = [self._changes.get(foreign) for foreign in rule.foreign]
        return (rule.op, changes) if any(changes) else None

    # ---- what is there -----------------------------------------------------------------------------------------------

    def _sort(self) -> list[str]:
        """Sort the tensors of the file into factors and whole ones; those that are neither."""
        unknown = []
        for name in self._file.tensors:
            inner = name.removeprefix(PREFIX)
            if match := _FACTOR.fullmatch(inner):
                module, embedding, letter = match.groups()
                foreign = self._known(f"{module}.weight")
                if foreign is not None:
                    factors = self._factors.setdefault(foreign, _Factors(bool(embedding)))
                    factors.names[letter] = name
                    continue
            elif (foreign := self._known(inner.replace(".base_layer.", "."))) is not None:
                self._whole[foreign] = name
                continue
            unknown.append(name)
        return unknown

    def _known(self, name: str) -> str | None:
        """The family's name of a tensor; adapters of a model without head lack what names begin with."""
        candidates = (name, self._spec.family.base_prefix + name)
        return next((candidate for candidate in candidates if candidate in self._shapes), None)

    def _check_names(self, unknown: list[str]) -> Iterator[Problem]:
        if unknown:
            why = f"family {self._spec.family.name} has no such tensors: {', '.join(sorted(unknown)[:5])}"
            fix = "take an adapter of this model, or merge it with PEFT's own merge_and_unload"
            yield Problem(str(self._file.path), None, why, fix)
        for foreign, factors in self._factors.items():
            if len(factors.names) < 2:
                why = f"of {foreign} it has only {', '.join(factors.names.values())}"
                yield Problem(str(self._file.path), None, why, COPY_AGAIN)
        if not self._factors and not self._whole and not unknown:
            yield Problem(str(self._file.path), None, "there is nothing in it", COPY_AGAIN)

    def _check_modules(self, given: tuple[str, ...] | None) -> Iterator[Problem]:
        found = {foreign.split(".")[-2] for foreign in self._factors}
        if given is not None and set(given) != found:
            why = f"the adapter is of {', '.join(sorted(found))}"
            yield Problem("--lora-target-modules", " ".join(given), why, "leave it out")

    def _check_shapes(self) -> Iterator[Problem]:
        fix = "take the adapter of this model"
        for foreign, factors in self._factors.items():
            a, b = (self._stored(factors.names[letter]) for letter in "AB")
            made = (b[0], a[-1]) if not self._transposed(factors) else (a[-1], b[0])
            if (len(a), len(b)) != (2, 2) or a[0] != b[1] or made != self._shapes[foreign]:
                why = f"A of {list(a)} and B of {list(b)} do not make {list(self._shapes[foreign])}"
                yield Problem(f"{self._file.path}: {foreign}", None, why, fix)
        for foreign, name in self._whole.items():
            if (shape := self._stored(name)) != self._shapes[foreign]:
                why = f"its shape is {list(shape)}, that of the model {list(self._shapes[foreign])}"
                yield Problem(f"{self._file.path}: {name}", None, why, fix)

    def _check_tied(self) -> Iterator[Problem]:
        """PEFT trains one end of a tied pair alone, which one tensor for both cannot express."""
        (embedding,) = self._rules["embedding.weight"].foreign
        if self._spec.config.tie_word_embeddings and embedding in self._factors:
            why = "it changes the embedding, but not the head, which is tied to it"
            fix = 'untie them in the base first: a copy as head, and "tie_word_embeddings": false in config.json'
            yield Problem(f"{self._file.path}: {embedding}", None, why, fix)

    def _stored(self, name: str) -> Shape:
        return self._file.tensors[name].shape

    def _transposed(self, factors: _Factors) -> bool:
        return factors.embedding or bool(self._config.get("fan_in_fan_out"))

    # ---- what becomes of the base ------------------------------------------------------------------------------------

    def _low_rank(self, foreign: str) -> LowRank:
        factors = self._factors[foreign]
        a, b = (partial(self._file.read, factors.names[letter]) for letter in "AB")
        r = self._stored(factors.names["A"])[0]
        alpha = self._alpha(foreign.removesuffix(".weight"))
        scale = alpha / (math.sqrt(r) if self._config.get("use_rslora") else r)
        return LowRank(a, b, r, scale, self._transposed(factors))

    def _alpha(self, module: str) -> float:
        """Modules may have one of their own, by a pattern that their name ends with."""
        patterns: Mapping[str, float] = self._config.get("alpha_pattern") or {}
        return next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), self._config["lora_alpha"])

    def _replacement(self, foreign: str) -> Change:
        name = self._whole[foreign]
        low_rank = self._changes.get(foreign)

        def change(view: View, dtype: torch.dtype) -> View:
            whole = Leaf(view.shape, lambda index: self._file.read(name, index).to(dtype))
            return whole if low_rank is None else low_rank(whole, dtype)

        return change
