"""What options of a run put on its model besides a layout: adapters, and wrappers of layers, blocks and cores.

Owns what such a technique is, and their order, which is meaning. What they do is in files of their own."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, get_args

from cordee.config.option import to_flag
from cordee.errors import raise_all, requires
from cordee.families.count import count_parameters
from cordee.families.registry import ModelSpec
from cordee.log import counted
from cordee.model.config import ModelConfig
from cordee.model.specs import Origin
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
    """Low-rank adapters, modules that are trained as a whole beside them, and prefixes."""

    def adapt(self, spec: ModelSpec, options: TrainConfig) -> ModelConfig:
        if not (options.lora_target_modules or spec.config.has_adapters):
            why = "there are no adapters"
            given = [(to_flag(name), getattr(options, name)) for name in OF_ADAPTERS]
            raise_all(each for flag, value in given for each in requires(flag, value, "--lora-target-modules", why))
            return replace(spec.config, num_prefix_tokens=options.num_prefix_tokens or 0)
        from cordee.tune import lora  # which brings torch

        return lora.adapted(spec, options)

    def trains(self, model: ModelConfig, options: TrainConfig) -> Collection[Origin]:
        return ("tuned", "adapter") if model.has_adapters else get_args(Origin)


TECHNIQUES: tuple[Technique, ...] = (Adapters(),)  # in the order in which they are put on


def trained(model: ModelConfig, options: TrainConfig) -> frozenset[Origin]:
    """Origins of the parameters that are trained under all of them."""
    return frozenset(get_args(Origin)).intersection(*(technique.trains(model, options) for technique in TECHNIQUES))


def describe_parameters(model: ModelConfig, options: TrainConfig) -> str:
    """How many parameters a model has, and how many of them are trained."""
    total, own = count_parameters(model), count_parameters(model, trained(model, options))
    share = f", of which {own:,} are trained ({own / total:.2%})" if own < total else ""
    return f"{counted(total, 'parameter')}{share}"
