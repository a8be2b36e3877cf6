"""What options of a run put on its model besides a layout: adapters, and wrappers of layers, blocks and cores.

Owns what such a technique is, and their order, which is meaning. Knows none of them, and needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, get_args

from cordee.model.config import ModelConfig
from cordee.model.specs import Origin
from cordee.train.options import TrainConfig

if TYPE_CHECKING:
    from cordee.parallel.wrapper import Wrapper


class Technique:
    """What it does to the model that a run trains, by the options of the run. Further models are left as they are."""

    def adapt(self, model: ModelConfig, options: TrainConfig) -> ModelConfig:
        """The model with what it adds, such as adapters. ProblemError if it does not fit."""
        return model

    def trains(self, options: TrainConfig) -> Collection[Origin]:
        """Origins of the parameters that are trained; all others are frozen."""
        return get_args(Origin)

    def wrappers(self, options: TrainConfig) -> Sequence[Wrapper]:
        """What runs around parts of the model, the first inside."""
        return ()


TECHNIQUES: tuple[Technique, ...] = ()  # in the order in which they are put on


def trained(options: TrainConfig) -> frozenset[Origin]:
    """Origins of the parameters that are trained under all of them."""
    return frozenset(get_args(Origin)).intersection(*(technique.trains(options) for technique in TECHNIQUES))
