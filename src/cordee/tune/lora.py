"""Which modules of a model have low-rank adapters, and of what form (LoRA, Hu et al. 2021), by options.

Owns the names by which modules are given (canonical, of Hugging Face's and of Megatron's checkpoints), what options
mean for a model, and what they say of adapters that are loaded. What an adapter computes is `model/low_rank.py`'s."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace
from typing import Any

from cordee.config.option import to_flag
from cordee.config.spelling import unknown
from cordee.errors import Findings, Problem, Problems, raise_all
from cordee.families.registry import ModelSpec
from cordee.model.config import SLICES, LowRankConfig, ModelConfig
from cordee.tune.options import AdapterOptions, LoRAOptions
from cordee.weights.megatron import core, legacy
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.peft_parameters import compressed, held, modules_of

RANK, ALPHA = 16, 32.0  # as MindSpeed-LLM has them
ALL = "all-linear"
_DIALECTS = (core.local(), core.mindspeed(), legacy.LEGACY, legacy.ASCENDSPEED, legacy.ASCENDSPEED_MERGED)


def adapted(spec: ModelSpec, options: LoRAOptions) -> ModelConfig:
    """The model with the adapters that options ask for, or that `spec` has from where it was loaded. ProblemError if it
    has no such modules, or what is loaded is something else."""
    found, low_rank, tuned = Findings(), spec.config.low_rank, spec.config.tuned
    if spec.config.has_adapters:
        found.problems += found.attempt(lambda: list(check_stated(spec, options))) or []
    else:
        names, modules, rank = options.lora_target_modules or (), options.lora_modules_to_save, options.lora_r or RANK
        targets = found.attempt(lambda: targets_named(spec, names)) or ()
        tuned = found.attempt(lambda: modules_named(spec, modules or ())) or ()
        if spec.config.tied_head and (tied := {"embedding", "head"}.intersection(targets)):
            why = f"embedding and head are tied, of which {', '.join(tied)} would change alone"
            found.problems.append(Problem("--lora-target-modules", " ".join(names), why, "leave it out", "tied"))
        if spec.config.norm_head and "head" in targets:
            why = "rows of the head are normalised, so what is learned beside them is no change of them, to be merged"
            found.problems.append(Problem("--lora-target-modules", " ".join(names), why, "leave it out", "head"))
        scale = _scales(options.lora_alpha or ALPHA, rank)[options.use_rslora]
        low_rank = (LowRankConfig(targets=targets, rank=rank, scale=scale, dora=options.use_dora),)
    raise_all(found.problems)
    of_training = {"dropout": options.lora_dropout, "b_rate": options.lora_plus_lr_ratio}  # which may change any time
    given = {name: value for name, value in of_training.items() if value is not None}
    prefix = options.num_prefix_tokens or spec.config.num_prefix_tokens
    low_rank = tuple(replace(each, **given) for each in low_rank)
    return replace(spec.config, low_rank=low_rank, tuned=tuned, num_prefix_tokens=prefix)


def check_stated(spec: ModelSpec, options: AdapterOptions) -> Problems:
    """Whether the adapters that `spec` has are what options say. ProblemError if these name what is no module."""
    found, tuned, prefix = spec.config.low_rank, spec.config.tuned, spec.config.num_prefix_tokens
    alpha = options.lora_alpha or ALPHA
    laws: dict[str, Callable[[Any], bool]] = {
        "lora_r": lambda r: {each.rank for each in found} == {r},
        "lora_alpha": lambda alpha: found != () and all(each.scale in _scales(alpha, each.rank) for each in found),
        "lora_target_modules": lambda names: found != () and _parts(spec, targets_named(spec, names)) == _parts(spec),
        "lora_modules_to_save": lambda names: set(modules_named(spec, names)) == set(tuned),
        "num_prefix_tokens": lambda number: number == prefix,
        "use_dora": lambda _: found != () and all(each.dora for each in found),
        "use_rslora": lambda _: found != () and all(each.scale == _scales(alpha, each.rank)[1] for each in found),
    }
    forms = [f"rank {each.rank}, alpha {each.scale * each.rank:g} of {' '.join(each.targets)}" for each in found]
    forms += [f"a prefix of {prefix} tokens"] * bool(prefix)
    for name, fits in laws.items():
        if (value := getattr(options, name, None)) not in (None, False) and not fits(value):
            why, fix = f"what is loaded keeps its form: {'; '.join([*forms, *tuned])}", "leave it out"
            yield Problem(to_flag(name), value, why, fix, "stated", limit=forms)


def _scales(alpha: float, rank: int) -> tuple[float, float]:
    """Of LoRA, and of rsLoRA."""
    return alpha / rank, alpha / math.sqrt(rank)


def _parts(spec: ModelSpec, targets: tuple[str, ...] | None = None) -> set[str]:
    """What has adapters, or would have them, fused projections by slices."""
    low_rank = [each if targets is None else replace(each, targets=targets) for each in spec.config.low_rank]
    adapted = replace(spec.config, low_rank=tuple(low_rank)).adapted()
    return {f"{path}/{part}" for path, name, _ in adapted for part in SLICES.get(name, (name,))}


def targets_named(spec: ModelSpec, names: Collection[str]) -> tuple[str, ...]:
    """The projections, canonical and shortened, whose names end with one of `names`; `ALL` are those of all layers."""
    known = [full for _, _, full in spec.config.projections()]
    foreign = [(each.foreign, each.full) for each in held(spec)]
    chosen = _called("--lora-target-modules", [name for name in names if name != ALL], spec, known, foreign)
    if ALL in names:
        chosen |= {full for _, full in foreign if full.startswith("layers.")}
    for path, name, full in spec.config.projections():  # AscendSpeed's name for up is Megatron's for gate and up
        if full in chosen and name in SLICES:
            slices = {f"{path.removesuffix(name)}{part}" for part in SLICES[name]}
            chosen = chosen - {full} | slices if slices & chosen else chosen
    return compressed(known, chosen)


def modules_named(spec: ModelSpec, names: Collection[str]) -> tuple[str, ...]:
    """The modules, canonical and shortened, whose names end with one of `names`."""
    rules = {name.removesuffix(".weight"): rule for name, rule in spec.rules().items() if name.endswith(".weight")}
    foreign = [(rule.foreign[0].removesuffix(".weight"), of) for of, rule in rules.items() if len(rule.foreign) == 1]
    return compressed(rules, _called("--lora-modules-to-save", names, spec, list(rules), foreign))


def _called(
    option: str, names: Iterable[str], spec: ModelSpec, known: Collection[str], foreign: Collection[tuple[str, str]]
) -> set[str]:
    """What of the `known` is called by a name that ends with one of `names`: its own, or, if none is, the `foreign` one
    of its checkpoint, or that of a dialect of Megatron. ProblemError for names of nothing."""
    groups = [[(name, name) for name in known], foreign, *(list(_named(dialect, spec)) for dialect in _DIALECTS)]
    chosen, problems = set[str](), []
    for name in names:
        found = ({full for own, full in group if f".{own}".endswith(f".{name}")} for group in groups)
        if not (matches := next(filter(None, map(set(known).intersection, found)), None)):
            leaves = {own.rpartition(".")[2] for group in groups for own, _ in group}
            problems.append(unknown(option, name, leaves, "the model has no such module"))
        chosen |= matches or set()
    raise_all(problems)
    return chosen


def _named(dialect: Dialect, spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """What a dialect calls modules, and what that is of them: all, or gate and up apart."""
    for path in modules_of(spec.rules()):
        parent, _, leaf = path.rpartition(".")
        if path.startswith("layers."):
            _, number, part = path.split(".", 2)
            names = dialect.names_in_layer(f"{part}.weight", spec.config.layers[int(number)], int(number)) or ()
        else:
            names = dialect.model_names(f"{path}.weight") or ()
        parts = [f"{parent}.{part}" for part in SLICES[leaf]] if len(names) > 1 else [path]
        yield from zip((name.removesuffix(".weight") for name in names), parts, strict=False)
