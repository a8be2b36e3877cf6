"""Which modules of a model have low-rank adapters, and of what form (LoRA, Hu et al. 2021), by options.

Owns the names by which modules are given (canonical, of Hugging Face's and of Megatron's checkpoints), what options
mean for a model, and what they say of adapters that are loaded. What an adapter computes is `model/low_rank.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace

from cordee.config.spelling import unknown
from cordee.errors import Findings, Problem, Problems, raise_all
from cordee.families.registry import ModelSpec
from cordee.log import counted
from cordee.model.config import SLICES, LowRankConfig, ModelConfig
from cordee.tune.options import LoRAOptions
from cordee.weights.megatron import core, legacy
from cordee.weights.peft_parameters import compressed, held, modules_of

RANK, ALPHA = 16, 32.0  # as MindSpeed-LLM has them
ALL = "all-linear"
_DIALECTS = (core.local(), core.mindspeed(), legacy.LEGACY, legacy.ASCENDSPEED, legacy.ASCENDSPEED_MERGED)


def adapted(spec: ModelSpec, options: LoRAOptions) -> ModelConfig:
    """The model with the adapters that options ask for, or those that `spec` has from where it was loaded.

    ProblemError if the model has no such modules, or what is loaded is something else.
    """
    if spec.config.low_rank or spec.config.tuned:
        raise_all(_check_loaded(spec, options))
        return replace(spec.config, low_rank=tuple(_trained(each, options) for each in spec.config.low_rank))
    names, modules, found = options.lora_target_modules or (), options.lora_modules_to_save or (), Findings()
    targets = found.attempt(lambda: targets_named(spec, names)) or ()
    tuned = found.attempt(lambda: modules_named(spec, modules)) or ()
    if spec.config.tie_word_embeddings and (tied := [name for name in targets if name in ("embedding", "head")]):
        why, fix = f"embedding and head are tied, and {tied[0]} alone would change", "leave it out"
        found.problems.append(Problem("--lora-target-modules", " ".join(names), why, fix, "tied"))
    raise_all(found.problems)
    rank = options.lora_r or RANK
    scale = (options.lora_alpha or ALPHA) / (math.sqrt(rank) if options.use_rslora else rank)
    low_rank = _trained(LowRankConfig(targets=targets, rank=rank, scale=scale), options)
    return replace(spec.config, low_rank=(low_rank,), tuned=tuned)


def _trained(low_rank: LowRankConfig, options: LoRAOptions) -> LowRankConfig:
    """With what concerns training alone, which may change where a run resumes."""
    dropout, rate = options.lora_dropout, options.lora_plus_lr_ratio
    return replace(
        low_rank,
        dropout=low_rank.dropout if dropout is None else dropout,
        b_rate=low_rank.b_rate if rate is None else rate,
    )


# ---- adapters that are loaded ------------------------------------------------------------------------------------------


def check_stated(spec: ModelSpec, r: int | None, alpha: float | None, modules: Collection[str] | None) -> Problems:
    """Whether the adapters of `spec` are what options say, None for what they do not."""
    fix, found = "leave it out: adapters that are loaded keep their form", spec.config.low_rank
    if r is not None and (ranks := {each.rank for each in found}) != {r}:
        why = f"the adapters have rank {', '.join(map(str, sorted(ranks)))}"
        yield Problem("--lora-r", r, why, fix, "stated", limit=ranks)
    alphas = [(each.scale * each.rank, each.scale * math.sqrt(each.rank)) for each in found]  # plain, and of rsLoRA
    if alpha is not None and not all(any(math.isclose(alpha, own) for own in pair) for pair in alphas):
        why = f"the adapters have alpha {', '.join(f'{plain:g}' for plain, _ in alphas)}"
        yield Problem("--lora-alpha", alpha, why, fix, "stated", limit=[plain for plain, _ in alphas])
    if modules is not None:
        same = replace(spec.config, low_rank=(replace(found[0], targets=targets_named(spec, modules)),))
        if (stated := _parts(same)) != (stored := _parts(spec.config)):
            why = f"there are adapters of {counted(len(stored), 'projection')}, these are {len(stated)}"
            yield Problem("--lora-target-modules", " ".join(modules), why, fix, "stated", limit=stored)


def _check_loaded(spec: ModelSpec, options: LoRAOptions) -> Problems:
    yield from check_stated(spec, options.lora_r, options.lora_alpha, options.lora_target_modules)
    modules = options.lora_modules_to_save
    if modules is not None and set(modules_named(spec, modules)) != set(spec.config.tuned):
        why, fix = f"with the adapters was trained: {' '.join(spec.config.tuned) or 'nothing'}", "leave it out"
        yield Problem("--lora-modules-to-save", " ".join(modules), why, fix, "stated", limit=spec.config.tuned)


def _parts(config: ModelConfig) -> set[str]:
    """What has adapters, fused projections by slices."""
    found = ((path, SLICES.get(name, {name: None})) for path, name, _ in config.adapted())
    return {f"{path}/{part}" for path, parts in found for part in parts}


# ---- names -------------------------------------------------------------------------------------------------------------


def targets_named(spec: ModelSpec, names: Collection[str]) -> tuple[str, ...]:
    """The projections, canonical and shortened, whose names end with one of `names`; `ALL` are those of all layers."""
    known = [full for _, _, full in spec.config.projections()]
    foreign = [(each.foreign, each.full) for each in held(spec)]
    megatron = [(name, full) for path in _paths(spec) for name, full in _megatron(spec, path)]
    wanted = [name for name in names if name != ALL]
    chosen = _ending("--lora-target-modules", wanted, ([(full, full) for full in known], foreign, megatron))
    if ALL in names:
        chosen |= {full for _, full in foreign if full.startswith("layers.")}
    for path in _paths(spec):  # one of MindSpeed-LLM's names for both gate and up is that of AscendSpeed's for up alone
        slices = {f"{path.rpartition('.')[0]}.{part}" for part in SLICES.get(path.rpartition(".")[2], ())}
        if path in chosen and slices & chosen:
            chosen = chosen - {path} | slices
    return compressed(known, chosen)


def modules_named(spec: ModelSpec, names: Collection[str]) -> tuple[str, ...]:
    """The modules, canonical and shortened, whose names end with one of `names`."""
    rules = {name: rule for name, rule in spec.rules().items() if name.endswith(".weight")}
    known = modules_of(rules)
    whole = {path: rule.foreign for path, rule in zip(known, rules.values(), strict=True) if len(rule.foreign) == 1}
    foreign = [(name.removesuffix(".weight"), path) for path, (name,) in whole.items()]
    megatron = [(name, path) for path in known for name, full in _megatron(spec, path) if full == path]
    groups = ([(path, path) for path in known], foreign, megatron)
    return compressed(known, _ending("--lora-modules-to-save", names, groups))


def _ending(option: str, names: Iterable[str], groups: Iterable[Sequence[tuple[str, str]]]) -> set[str]:
    """What is called by a name that ends with one of `names`, in the first group that has such."""
    chosen: set[str] = set()
    problems = []
    for name in names:
        found = ({full for own, full in group if f".{own}".endswith(f".{name}")} for group in groups)
        if matches := next(filter(None, found), None):
            chosen |= matches
        else:
            known = {own.rpartition(".")[2] for group in groups for own, _ in group}
            problems.append(unknown(option, name, known, "the model has no such module"))
    raise_all(problems)
    return chosen


def _paths(spec: ModelSpec) -> list[str]:
    return list(dict.fromkeys(path for path, _, _ in spec.config.projections()))


def _megatron(spec: ModelSpec, path: str) -> Iterator[tuple[str, str]]:
    """The names of a module in the dialects of Megatron, and what they are of: it, or gate and up apart."""
    for dialect in _DIALECTS:
        if path.startswith("layers."):
            _, number, part = path.split(".", 2)
            names = dialect.names_in_layer(f"{part}.weight", spec.config.layers[int(number)], int(number))
        else:
            names = dialect.model_names(f"{path}.weight")
        parent = path.rpartition(".")[0]
        apart = [f"{parent}.gate", f"{parent}.up"] if names is not None and len(names) > 1 else [path]
        yield from ((name.removesuffix(".weight"), full) for name, full in zip(names or (), apart, strict=False))
