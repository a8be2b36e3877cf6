"""Optimizer options that pretrain well, as defaults where --model names what is trained.

Flags that describe a model one by one are Megatron's, and come with Megatron's defaults. The values are those of
Llama 2 (Touvron et al. 2023, section 2.2), with warm-up as a share of the run."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from cordee.config.option import to_flag
from cordee.config.values import Entry, to_raw
from cordee.errors import Problem

_RECIPE = {"lr_decay_style": "cosine", "lr_warmup_fraction": 0.01, "weight_decay": 0.1, "adam_beta2": 0.95}
_MIN_LR = 0.1  # x lr


def entries(model: str, values: Mapping[str, Any], given: Collection[str]) -> tuple[list[Entry], Sequence[Problem]]:
    """The options that --model sets beside its shape, less those that mean nothing with what is `given`."""
    chosen: dict[str, object] = dict(_RECIPE)
    if values["optimizer"] == "sgd":
        del chosen["adam_beta2"]
    if "lr" in values and "lr_decay_style" not in given:
        chosen["min_lr"] = values["lr"] * _MIN_LR
    return [Entry("recipe", option, to_raw(value)) for option, value in chosen.items()], ()


def notes(config: Any) -> Iterator[str]:
    """Which options of a run are as the recipe has them."""
    recipe = {**_RECIPE, "min_lr": config.lr * _MIN_LR}
    kept = [f"{to_flag(name)} {value}" for name, value in recipe.items() if getattr(config, name) == value]
    if config.model is not None and kept:
        yield f"defaults of --model: {', '.join(kept)}"
