"""Two models compared: whether they compute the same, and in which places they differ.

Owns the places of a `ModelConfig`, such as "layers.attention.num_heads": paths of fields, those of layers without the
layer's number. Knows neither flags nor families: `families/lenses.py` names places as users do."""

from collections.abc import Callable, Collection
from dataclasses import fields, is_dataclass, replace
from typing import Any

from cordee.model.config import BalanceConfig, LayerConfig, ModelConfig, MoEConfig

DIGITS = 12  # of scales: they are products and roots, which families take in another order
OF_TRAINING = frozenset({"attention_dropout", "embedding_dropout", "hidden_dropout", "init_std", "balance", "capacity"})


def canonical(config: ModelConfig) -> ModelConfig:
    """`config` in the one form of all that compute the same; losses without a coefficient are left out."""
    layers = {layer: _canonical_layer(layer) for layer in config.layers}
    return replace(
        config,
        layers=tuple(layers[layer] for layer in config.layers),
        embedding_scale=rounded(config.embedding_scale),
        logit_scale=rounded(config.logit_scale),
    )


def _canonical_layer(layer: LayerConfig) -> LayerConfig:
    attention, mlp = layer.attention, layer.mlp
    attention = replace(attention, scale=rounded(attention.scale or attention.key_dim**-0.5))
    if isinstance(mlp, MoEConfig):
        router = mlp.router
        if router.score == "softmax" and router.score_when == "after":  # is that over all experts, normalised
            router = replace(router, score_when="before", normalise=True)
        trained = any((mlp.balance.expert, mlp.balance.device, mlp.balance.communication, mlp.balance.z))
        mlp = replace(mlp, router=router, balance=mlp.balance if trained else BalanceConfig())
    return replace(layer, attention=attention, mlp=mlp, residual_scale=rounded(layer.residual_scale))


def rounded(number: float) -> float:
    """`number` without the digits in which equal scales may differ."""
    return float(f"{number:.{DIGITS}g}")


def differences(
    ours: ModelConfig,
    theirs: ModelConfig,
    without: Collection[str] = (),
    stored: Callable[[float], float] = lambda number: number,
) -> dict[str, tuple[Any, Any]]:
    """Places in which two models differ, and what is there in each; of layers the first that differ.

    Fields called as one of `without` are left out. Numbers are compared as they are `stored`."""
    found: dict[str, tuple[Any, Any]] = {}

    def walk(place: str, one: Any, other: Any) -> None:
        if isinstance(one, tuple) and place == "layers":
            if len(one) != len(other):
                found["num_layers"] = (len(one), len(other))
            for pair in dict.fromkeys(zip(one, other, strict=False)):
                walk(place, *pair)
        elif is_dataclass(one) and type(one) is type(other):
            for name in (field.name for field in fields(one) if field.name not in without):
                walk(f"{place}.{name}" if place else name, getattr(one, name), getattr(other, name))
        elif held(one) != held(other):
            found.setdefault(place, (held(one), held(other)))

    def held(value: Any) -> Any:
        return stored(value) if isinstance(value, float) else value

    walk("", ours, theirs)
    return found
