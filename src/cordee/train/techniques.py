"""What options of a run put on its model besides a layout: adapters, and wrappers of layers, blocks and cores.

Owns what such a technique is, and their order, which is meaning. What they do is in files of their own."""

import fnmatch
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, get_args

from cordee.config.option import to_flag
from cordee.config.spelling import unknown
from cordee.errors import Findings, ProblemError, raise_all, requires
from cordee.families.count import count_parameters
from cordee.families.registry import ModelSpec
from cordee.log import counted
from cordee.model.config import ModelConfig
from cordee.model.specs import Origin, model_specs
from cordee.train.options import TrainConfig
from cordee.tune.options import OF_ADAPTERS

if TYPE_CHECKING:
    from cordee.parallel.wrapper import Wrapper


class Technique:
    """What it does to the model that a run trains, by the options of the run. Further models are left as they are."""

    def adapt(self, spec: ModelSpec, options: TrainConfig) -> ModelConfig:
        """The model with what it adds, such as adapters. ProblemError if it does not fit."""
        return spec.config

    def trains(self, model: ModelConfig, options: TrainConfig) -> Collection[Origin]:
        """Origins of the parameters of such a model that are trained; all others are frozen."""
        return get_args(Origin)

    def wrappers(self, options: TrainConfig) -> "Sequence[Wrapper]":
        """What runs around parts of the model, the first inside."""
        return ()


class Adapters(Technique):
    """Low-rank adapters, modules that are trained as a whole beside them, and prefixes; over a quantised base."""

    def adapt(self, spec: ModelSpec, options: TrainConfig) -> ModelConfig:
        if not (options.lora_target_modules or spec.config.has_adapters):
            needed, why = "--lora-target-modules", "there are no adapters"
            names = OF_ADAPTERS if options.num_prefix_tokens else [*OF_ADAPTERS, "quantise_base"]
            raise_all(p for name in names for p in requires(to_flag(name), getattr(options, name), needed, why))
            return replace(spec.config, num_prefix_tokens=options.num_prefix_tokens or 0)
        from cordee.tune import lora  # which brings torch

        return lora.adapted(spec, options)

    def trains(self, model: ModelConfig, options: TrainConfig) -> Collection[Origin]:
        return ("tuned", "adapter", "head") if model.has_adapters else get_args(Origin)

    def wrappers(self, options: TrainConfig) -> "Sequence[Wrapper]":
        from cordee.parallel.quantised import QuantisedBase  # which brings torch

        return [QuantisedBase(kind=options.quantise_base)] if options.quantise_base else []


class Patterns(Technique):
    """Parameters that are frozen, or have a learning rate of their own, by their names."""

    def adapt(self, spec: ModelSpec, options: TrainConfig) -> ModelConfig:
        found = Findings()
        rates = found.attempt(lambda: _factors(options.lr_scale)) or ()
        patterns = {"--freeze": options.freeze, "--train-only": options.train_only, "--lr-scale": dict(rates)}
        names = {part for name in model_specs(spec.config) for part in accumulate(name.split("."), "{}.{}".format)}
        missing = [(flag, each) for flag in patterns for each in patterns[flag] if not fnmatch.filter(names, each)]
        shown = {re.sub(r"\d+", "*", name) for name in names}
        found.problems += (unknown(*pair, shown, "no parameter or module has such a name") for pair in missing)
        raise_all(found.problems)
        model = replace(spec.config, frozen=options.freeze, trained=options.train_only, rates=rates)
        if not count_parameters(model, trained(model, options), trained=True):
            flag, given = ("--freeze", options.freeze) if options.freeze else ("--train-only", options.train_only)
            raise ProblemError.of(flag, " ".join(given), "it leaves nothing to train", "name less", "empty")
        return model


def _factors(given: Collection[str]) -> tuple[tuple[str, float], ...]:
    """Patterns and factors. ProblemError for what is not both."""
    try:
        found = tuple((text.rpartition("=")[0], float(text.rpartition("=")[2])) for text in given)
    except ValueError:
        found = (("", 0.0),)
    if not all(0 < factor < math.inf for _, factor in found):
        why, fix = "a factor is no positive number", "give NAME=FACTOR, or freeze what is not to be trained: --freeze"
        raise ProblemError.of("--lr-scale", " ".join(given), why, fix, "form")
    return found


TECHNIQUES: tuple[Technique, ...] = (Adapters(), Patterns())  # in the order in which they are put on


def trained(model: ModelConfig, options: TrainConfig) -> frozenset[Origin]:
    """Origins of the parameters that are trained under all of them."""
    return frozenset(get_args(Origin)).intersection(*(technique.trains(model, options) for technique in TECHNIQUES))


def describe_parameters(model: ModelConfig, options: TrainConfig) -> str:
    """How many parameters a model has, and how many of them are trained."""
    total, own = count_parameters(model), count_parameters(model, trained(model, options), trained=True)
    share = f", of which {own:,} are trained ({own / total:.2%})" if own < total else ""
    return f"{counted(total, 'parameter')}{share}"


def thawed(options: TrainConfig, before: Mapping[str, Any]) -> Iterator[str]:
    """A note, if a run trains other parameters than by the options `before`, of the run that it resumes."""
    if any([*getattr(options, name)] != before.get(name, []) for name in ("freeze", "train_only")):
        yield "other parameters are trained than so far: the optimizer state of those that were frozen begins anew"


def wide(model: ModelConfig) -> Iterator[str]:
    """A note of adapters of a higher rank than the product of their factors can have."""
    shapes = {name: spec.shape for name, spec in model_specs(model).items() if ".adapters." in name}
    own = ((name, a, shapes[f"{name[:-1]}b"]) for name, a in shapes.items() if name.endswith(".a"))
    if full := [name for name, a, b in own if a[-2] > min(a[-1], math.prod(b[len(a) - 2 : -1]))]:
        matrices = counted(len(full), "matrix", "matrices")
        yield f"--lora-r is above the sizes of {matrices}, as of {full[0]}: a lower one learns as much"
