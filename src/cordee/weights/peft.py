"""Adapters in the files of the PEFT library: `adapter_config.json` and `adapter_model.safetensors`.

Owns what stands in them and which of it can be used: LoRA of linear layers and embeddings, whole tensors trained beside
it, prefixes. Names are those of Hugging Face's modules, so any base can take them, whatever its own format."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from cordee.errors import Problem, ProblemError, raise_all, requires
from cordee.families.registry import ModelSpec
from cordee.files import read_json
from cordee.model.config import AttentionConfig
from cordee.tensors.views import Leaf, Op, View, whole
from cordee.weights.adapter import Adapter, Change, Given, LowRank, is_factor
from cordee.weights.files import COPY_AGAIN, BinFile, SafetensorsFile, TensorFile, opened, unfit
from cordee.weights.ruled import foreign_tensors

CONFIG = "adapter_config.json"
FILES: Mapping[str, Callable[[Path], TensorFile]] = {
    "adapter_model.safetensors": SafetensorsFile,
    "adapter_model.bin": BinFile,
}
PREFIX = "base_model.model."
PREFIX_TUNING, PROMPT = "PREFIX_TUNING", "prompt_embeddings"  # the type, and its one tensor
_TOKENS, _ATTENTION = "num_virtual_tokens", "layers.{}.attention"
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
    "use_qalora",
    "velora_config",
)
LONGEST = 200  # characters of a pattern
MOST_PATTERNS, MOST_CHOICES = 10_000, 60  # of them, and of what can match in several ways in all of them
T = TypeVar("T")
LENGTHS = "lora_magnitude_vector"  # of rows, as DoRA has them
_FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB]|magnitude_vector)(?:\.weight)?")


def is_adapter(path: Path) -> bool:
    """Whether a directory is of PEFT."""
    return (path / CONFIG).is_file()


@dataclass
class _Factors:
    """The names in the file of A and B of one tensor."""

    embedding: bool
    names: dict[str, str] = field(default_factory=dict)


def read(given: Given, spec: ModelSpec) -> "PeftAdapter | PeftPrefix":
    """The adapter at `given.path`, for a base model `spec`. ProblemError with everything that is wrong with it."""
    config = _read_config(given.path)
    if config.get("peft_type") == PREFIX_TUNING:
        return PeftPrefix(given, config, spec)
    raise_all(_check_config(given, config))
    return PeftAdapter(given, config, spec, _open(given.path))


def _read_config(path: Path) -> dict[str, Any]:
    config = opened(path / CONFIG, read_json)
    if not isinstance(config, dict):
        raise ProblemError.of(str(path / CONFIG), None, "not a JSON object", COPY_AGAIN)
    return config


def _check_config(given: Given, config: Mapping[str, Any]) -> Iterator[Problem]:
    where, fix = str(given.path / CONFIG), "merge it with PEFT's own merge_and_unload, and convert the result"
    if (kind := config.get("peft_type")) != "LORA":
        yield Problem(f"{where}: peft_type", kind, "only LoRA and PREFIX_TUNING are known", fix, "unsupported")
    for key in UNMERGEABLE:
        if config.get(key):
            yield Problem(f"{where}: {key}", config[key], "such an adapter is no sum of matrices", fix, "unsupported")
    if not is_factor(config.get("lora_alpha")):
        yield Problem(f"{where}: lora_alpha", config.get("lora_alpha"), "it must be a positive number", COPY_AGAIN)
    if not _is_rank(config.get("r")):
        yield Problem(f"{where}: r", config.get("r"), "it must be a whole positive number", COPY_AGAIN)
    for key in ("fan_in_fan_out", "use_rslora", "use_dora"):
        if not isinstance(config.get(key) or False, bool):
            yield Problem(f"{where}: {key}", config[key], "it must be true or false", COPY_AGAIN)
    yield from _check_patterns(f"{where}: alpha_pattern", config.get("alpha_pattern"), _is_finite)
    yield from _check_patterns(f"{where}: rank_pattern", config.get("rank_pattern"), _is_rank)
    for flag, value, key in (("--lora-r", given.r, "r"), ("--lora-alpha", given.alpha, "lora_alpha")):
        if value is not None and value != config.get(key):
            yield Problem(
                flag, value, f"{where} has {config.get(key)}", "leave it out", "stated", limit=config.get(key)
            )


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_finite(value: object) -> bool:
    return value == 0 or is_factor(value) or (type(value) in (int, float) and is_factor(-value))  # type: ignore


def _check_patterns(option: str, patterns: object, valid: Callable[[object], bool]) -> Iterator[Problem]:
    if patterns is None:
        return
    if not isinstance(patterns, dict):
        yield Problem(option, type(patterns).__name__, "it must be an object of names and numbers", COPY_AGAIN)
        return
    for pattern, value in patterns.items():
        if not valid(value):
            yield Problem(f"{option}: {pattern[:LONGEST]}", value, "it is no number that can stand there", COPY_AGAIN)
    costs = {pattern: _choices(pattern) for pattern in patterns}
    fix = "write the names of the modules themselves"
    if wrong := next((pattern for pattern, cost in costs.items() if cost is None), None):
        why = "it is no name and no simple pattern, and matching it might never end"
        yield Problem(option, wrong[:LONGEST], why, fix, "unbounded")
    elif len(costs) > MOST_PATTERNS or sum(cost or 0 for cost in costs.values()) > MOST_CHOICES:
        yield Problem(
            option, None, f"there are {len(costs)} patterns, and matching them might never end", fix, "unbounded"
        )


def _choices(pattern: str) -> int | None:
    """How many parts of a pattern can match in several ways, which multiply; None if it is not simple.

    The signs that could repeat a group at a distance (comments, flags, spaces between) are not allowed at all."""
    plain = re.sub(r"\\.", "x", pattern).replace("(?:", "(")
    choices = len(re.findall(r"[*+?{(]", plain))
    if len(pattern) > LONGEST or choices > 3 or re.search(r"\)[*+?{]|\(\?|[^\w.\-^$|()\[\]*+?{},/]", plain):
        return None
    try:
        _compiled(pattern)
    except (re.error, OverflowError, RecursionError):
        return None
    return choices


def _compiled(pattern: str) -> re.Pattern[str]:
    """Patterns are of what names of modules end with, by PEFT's own law."""
    return re.compile(rf"(.*\.)?({pattern})$")


def _open(path: Path) -> TensorFile:
    for name, kind in FILES.items():
        if (path / name).is_file():
            return opened(path / name, kind)
    why = f"there is neither {' nor '.join(FILES)}"
    raise ProblemError.of(str(path), None, why, "copy the file of the adapter too", "missing")


class PeftAdapter(Adapter):
    """LoRA in a file of PEFT, by the family's names of tensors."""

    def __init__(self, given: Given, config: Mapping[str, Any], spec: ModelSpec, file: TensorFile):
        self.path = given.path
        self._config = config
        self.file = file
        self._spec = replace(spec, base_prefix=True)
        self._rules = self._spec.rules()
        tensors = foreign_tensors(self._rules, self._spec.shapes())
        self._shapes = {foreign: shape for _, foreign, shape in tensors}
        self._factors: dict[str, _Factors] = {}
        self.whole: dict[str, str] = {}  # tensors that take the place of the base's, by its names
        self._twice: list[str] = []  # what others in the file stand for already
        self._alphas, self._ranks = (
            [(_compiled(pattern), value) for pattern, value in (config.get(key) or {}).items()]
            for key in ("alpha_pattern", "rank_pattern")
        )
        self._changes: dict[str, Change] = {}
        unknown = self._sort()
        raise_all([*self._check_names(unknown), *given.check_modules(self._factors)])
        raise_all([*self._check_tensors(), *self._check_tied()])
        self.low_ranks = {name: self._low_rank(name) for name in self._factors}
        self._changes |= self.low_ranks
        self._changes |= {name: self._replacement(name) for name in self.whole}

    def changes(self, name: str) -> tuple[Op, Sequence[Change | None]] | None:
        rule = self._rules[name]
        changes = [self._changes.get(foreign) for foreign in rule.foreign]
        return (rule.op, changes) if any(changes) else None

    def matrices(self, foreign: str) -> tuple[Tensor, Tensor]:
        """A `[r, in]` and B `[out, r]` of the weight of a module, in float32; a table's rows are outputs."""
        names = (self._factors[foreign].names[letter] for letter in "AB")
        a, b = (self.file.read(name, whole(self.file.tensors[name].shape)).float() for name in names)
        return (b.t(), a.t()) if self._factors[foreign].embedding else (a, b)

    def _sort(self) -> list[str]:
        """Sort the tensors of the file into factors and whole ones; those that are neither."""
        unknown = []
        for name in self.file.tensors:
            inner = name.removeprefix(PREFIX)
            if match := _FACTOR.fullmatch(inner):
                module, embedding, letter = match.groups()
                foreign = self._known(f"{module}.weight")
                if foreign is not None:
                    factors = self._factors.setdefault(foreign, _Factors(bool(embedding)))
                    if factors.names.setdefault(letter, name) != name or factors.embedding != bool(embedding):
                        self._twice.append(name)
                    continue
            elif (foreign := self._known(inner.replace(".base_layer.", "."))) is not None:
                if self.whole.setdefault(foreign, name) != name:
                    self._twice.append(name)
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
            yield Problem(str(self.file.path), None, why, fix, "unknown", limit=sorted(unknown))
        if self._twice:
            why = f"other tensors in it are of the same weights as {', '.join(sorted(self._twice)[:5])}"
            yield Problem(str(self.file.path), None, why, COPY_AGAIN, "repeated")
        for foreign, factors in self._factors.items():
            dora = bool(self._config.get("use_dora"))
            if factors.names.keys() != {"A", "B", *[LENGTHS[5:]] * dora}:
                why = f"of {foreign} it has just {', '.join(factors.names.values())}, and use_dora is {dora}"
                yield Problem(str(self.file.path), None, why, COPY_AGAIN, "missing", limit=foreign)
        if not self._factors and not self.whole and not unknown:
            yield Problem(str(self.file.path), None, "there is nothing in it", COPY_AGAIN, "empty")

    def _check_tensors(self) -> Iterator[Problem]:
        fix = "take the adapter of this model"
        for foreign, name in self.whole.items():
            yield from unfit(self.file, name, self._shapes[foreign], fix)
        for foreign, factors in self._factors.items():
            shape, r = self._shapes[foreign], self._configured(factors, self._ranks, "r")
            outer, *inner = reversed(shape) if self._transposed(factors) else shape
            yield from unfit(self.file, factors.names["A"], (r, *inner), f"{fix}, of rank {r} as by its {CONFIG}")
            yield from unfit(self.file, factors.names["B"], (outer, r), f"{fix}, of rank {r} as by its {CONFIG}")
            if (lengths := factors.names.get(LENGTHS[5:])) is not None:
                yield from unfit(self.file, lengths, (outer,), fix)

    def _check_tied(self) -> Iterator[Problem]:
        """PEFT trains one end of a tied pair alone, which one tensor for both cannot express."""
        (embedding,) = self._rules["embedding.weight"].foreign
        if self._spec.config.tied_head and embedding in self._factors:
            why = "it changes the embedding, but not the head, which is tied to it"
            fix = 'untie them in the base first: a copy as head, and "tie_word_embeddings": false in config.json'
            yield Problem(f"{self.file.path}: {embedding}", None, why, fix, "tied")

    def _transposed(self, factors: _Factors) -> bool:
        return factors.embedding or bool(self._config.get("fan_in_fan_out"))

    def _low_rank(self, foreign: str) -> LowRank:
        factors = self._factors[foreign]
        a, b = (partial(self.file.read, factors.names[letter]) for letter in "AB")
        r = self.file.tensors[factors.names["A"]].shape[0]
        alpha = self._configured(factors, self._alphas, "lora_alpha")
        scale = alpha / (math.sqrt(r) if self._config.get("use_rslora") else r)
        name = factors.names.get(LENGTHS[5:])
        m = None if name is None else self.file.read(name, whole(self.file.tensors[name].shape)).float()
        return LowRank(a, b, r, scale, self._transposed(factors), m)

    def _configured(self, factors: _Factors, patterns: Sequence[tuple[re.Pattern[str], T]], key: str) -> T:
        """What the configuration says of a module, by the first pattern that its name in the file matches, if any."""
        factor = _FACTOR.fullmatch(factors.names["A"].removeprefix(PREFIX))
        module = factor[1] if factor else ""
        return next((value for pattern, value in patterns if pattern.match(module)), self._config[key])

    def _replacement(self, foreign: str) -> Change:
        name = self.whole[foreign]
        low_rank = self._changes.get(foreign)

        def change(view: View, dtype: torch.dtype) -> View:
            whole = Leaf(view.shape, lambda index: self.file.read(name, index).to(dtype))
            return whole if low_rank is None else low_rank(whole, dtype)

        return change


class PrefixForm:
    """The prefix of a model as PEFT stores it, `[tokens, layers * (key, value) * kv_heads * head_dim]`: what is in
    transformers' cache before the first token, so keys are already rotated and in the order of the family's files."""

    def __init__(self, spec: ModelSpec, option: str, value: str):
        """ProblemError, about `option`, if PEFT has no such prefix."""
        attentions = [layer.attention for layer in spec.config.layers]
        kinds = {(a.num_kv_heads, a.head_dim) for a in attentions if isinstance(a, AttentionConfig) and not a.alibi}
        if len(kinds) > 1 or not all(isinstance(a, AttentionConfig) and not a.alibi for a in attentions):
            why = "latent attention, ALiBi or heads that differ between layers are not of its form of a prefix"
            raise ProblemError.of(option, value, why, "keep it in checkpoints of runs", "unsupported")
        ((self.heads, self.dim),) = kinds
        self.num_layers = len(attentions)
        name = f"{_ATTENTION.format(0)}.qkv.weight"
        probe = torch.full((*spec.shapes()[name][:-1], 1), -1.0)
        probe[0, -2, :, 0] = torch.arange(self.dim)  # dims of a key, to be found again
        parts = torch.cat([part.flatten() for part in spec.rules()[name].inverse(probe)])
        self._order = parts[parts >= 0].long()  # of the files

    def write(self, read: Callable[[str], Tensor]) -> Tensor:
        prefixes = torch.stack([read(f"{_ATTENTION.format(i)}.prefix").float() for i in range(self.num_layers)])
        prefixes[:, :, 0] = prefixes[:, :, 0][..., self._order]
        return prefixes.permute(3, 0, 2, 1, 4).flatten(1)

    def read(self, prompt: Tensor) -> dict[str, View]:
        prefixes = prompt.unflatten(1, (self.num_layers, 2, self.heads, self.dim)).permute(1, 3, 2, 0, 4).contiguous()
        prefixes[:, :, 0] = prefixes[:, :, 0][..., self._order.argsort()]
        named = {f"{_ATTENTION.format(i)}.prefix": prefix for i, prefix in enumerate(prefixes)}
        return {name: Leaf(tuple(prefix.shape), prefix.__getitem__) for name, prefix in named.items()}


class PeftPrefix(Adapter):
    """Learned keys and values (prefix tuning), by the names of our parameters."""

    def __init__(self, given: Given, config: Mapping[str, Any], spec: ModelSpec):
        form, file, count = PrefixForm(spec, "--lora-load", str(given.path)), _open(given.path), config.get(_TOKENS)
        if type(count) is not int or count < 1 or PROMPT not in file.tensors:
            why = f"it must be a whole positive number, with {PROMPT} in the file"
            raise ProblemError.of(f"{given.path / CONFIG}: {_TOKENS}", count, why, COPY_AGAIN)
        raise_all(unfit(file, PROMPT, (count, form.num_layers * 2 * form.heads * form.dim), "take that of this model"))
        stated = {"--lora-r": given.r, "--lora-alpha": given.alpha, "--lora-target-modules": given.modules}
        stated["--load of a prefix"] = spec.config.num_prefix_tokens or None
        raise_all(p for each in stated.items() for p in requires(*each, "LoRA as --lora-load", "that is a prefix"))
        self.prefixes = form.read(file.read(PROMPT, whole(file.tensors[PROMPT].shape)).float())


def prefix_to_peft(spec: ModelSpec, read: Callable[[str], Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `peft_parameters.to_peft`."""
    if spec.config.low_rank or spec.config.tuned or not spec.config.lm_head:
        why = "PEFT has no file of a prefix with LoRA, or a value head, beside it"
        raise ProblemError.of("--save-model-type", "peft", why, "train them apart", "unsupported")
    form = PrefixForm(spec, "--save-model-type", "peft")
    kind = {"peft_type": PREFIX_TUNING, "task_type": "CAUSAL_LM", "inference_mode": True, "prefix_projection": False}
    heads = {"num_attention_heads": form.heads, "token_dim": form.heads * form.dim, "num_transformer_submodules": 1}
    sizes = {_TOKENS: spec.config.num_prefix_tokens, "num_layers": form.num_layers}
    return {PROMPT: form.write(read)}, kind | heads | sizes
