"""RoPE as configurations describe it.

Owns both spellings, transformers 4's (`rope_theta`, `rope_scaling`) and 5's (`rope_parameters`), and every scaling type
that transformers' `modeling_rope_utils` knows for text. Knows no family."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from cordee.families.reader import ConfigReader
from cordee.model import config as configs
from cordee.model.config import LinearScaling, RopeConfig, RopeScaling, YarnScaling


def read_rope(
    hf: ConfigReader,
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    scaling_key: str | None = "rope_scaling",
) -> RopeConfig:
    """The RoPE of heads of `head_dim`; problems are collected in `hf`.

    `theta` is the family's default. `partial` is the default of `partial_rotary_factor`, the fraction of head_dim that
    RoPE rotates; for None the family has no such key, and one is a problem. `layer_type` is the entry of
    `rope_parameters` where these are given per layer type. `theta_key` and `scaling_key` (None: not scaled) are the
    older spelling's."""
    hf.value("original_max_position_embeddings", None)  # often there without a scaling, and then without meaning
    section = rope_section(hf, layer_type, theta_key, scaling_key)
    theta = section.positive("rope_theta", theta)
    rotary_dim = head_dim if partial is None else _rotary_dim(hf, section, head_dim, partial)
    if (rotary_dim % 2 or not rotary_dim) and not hf.problems:  # a stand-in may be odd
        hf.problem("head_dim", f"{rotary_dim} rotated dims are not divisible by 2", "correct the size of the heads")
    scaling = _scaling(section, hf, rotary_dim)
    hf.problems += section.problems + section.unimplemented() + section.not_understood()
    return RopeConfig(theta=float(theta), rotary_dim=None if rotary_dim == head_dim else rotary_dim, scaling=scaling)


def rope_section(
    hf: ConfigReader,
    layer_type: str | None = None,
    theta_key: str = "rope_theta",
    scaling_key: str | None = "rope_scaling",
) -> ConfigReader:
    """Both spellings merged, as transformers 5 writes them, to be read on; contradictions are collected in `hf`."""
    theta = hf.positive(theta_key, None)
    old = hf.section(scaling_key) if scaling_key else {}
    new, name = hf.section("rope_parameters"), "rope_parameters"
    if layer_type is not None and isinstance(new.get(layer_type), Mapping):
        new, name = new[layer_type], f"rope_parameters: {layer_type}"
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            hf.problem("rope_parameters", f"{key} differs from that of {scaling_key}", "keep one of the two")
    values = {**old, **new}
    if theta is not None and values.setdefault("rope_theta", theta) != theta:
        hf.problem(theta_key, f"{name} has {values['rope_theta']}", "keep one of the two")
    return ConfigReader(values, f"{hf.where}: {name if new or not scaling_key else scaling_key}")


def _rotary_dim(hf: ConfigReader, section: ConfigReader, head_dim: int, default: float) -> int:
    """The number of dims of a head that RoPE rotates, from the section or a key beside it."""
    return int(head_dim * section.positive("partial_rotary_factor", hf.positive("partial_rotary_factor", default)))


SCALINGS = {LinearScaling: "linear", configs.Llama3Scaling: "llama3", YarnScaling: "yarn"}  # those that options can set


def write_scaling(scaling: RopeScaling | None) -> dict[str, Any] | None:
    """The value of `rope_scaling` in a `config.json`."""
    match scaling:
        case None:
            return None
        case configs.DynamicNTKScaling(factor=factor):  # on the length that the model was trained on
            return {"rope_type": "dynamic", "factor": factor}
        case configs.LongRopeScaling():
            lists = {name: list(getattr(scaling, name)) for name in ("short_factor", "long_factor")}
            return {"rope_type": "longrope", **vars(scaling), **lists}
    return {"rope_type": SCALINGS[type(scaling)], **vars(scaling)}


def mscale(factor: float, strength: float = 1.0) -> float:
    """YaRN's scale of queries and keys for a context stretched by `factor` (Peng et al. 2023)."""
    return 0.1 * strength * math.log(factor) + 1.0 if factor > 1 else 1.0


def _scaling(section: ConfigReader, hf: ConfigReader, rotary_dim: int) -> RopeScaling | None:
    """The scaling that a section describes; its type is `rope_type`, in older files `type`."""
    kind = section.value("rope_type", section.value("type", "default"))
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _SCALINGS:
        section.problem("rope_type", f"unknown type {kind!r}", f"known are default, {', '.join(_SCALINGS)}")
        section.accept_all()  # its keys mean nothing without its type
        return None
    return _SCALINGS[kind](section, hf, rotary_dim)


def _linear(section: ConfigReader, hf: ConfigReader, rotary_dim: int) -> LinearScaling:
    return LinearScaling(factor=section.positive("factor"))


def _dynamic(section: ConfigReader, hf: ConfigReader, rotary_dim: int) -> configs.DynamicNTKScaling:
    length = hf.integer("max_position_embeddings")
    return configs.DynamicNTKScaling(factor=section.positive("factor"), original_max_position_embeddings=length)


def _yarn(section: ConfigReader, hf: ConfigReader, rotary_dim: int) -> YarnScaling:
    original = _original_length(section, hf)
    factor = section.positive("factor", None) or hf.integer("max_position_embeddings") / original
    strength, strength_of_all = section.number("mscale", 0), section.number("mscale_all_dim", 0)
    if strength and strength_of_all:
        suggested = mscale(factor, strength) / mscale(factor, strength_of_all)
    else:
        suggested = mscale(factor)
    return YarnScaling(
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=section.positive("beta_fast", 32.0),
        beta_slow=section.positive("beta_slow", 1.0),
        attention_factor=section.number("attention_factor", suggested),
        truncate=section.flag("truncate", True),
    )


def _llama3(section: ConfigReader, hf: ConfigReader, rotary_dim: int) -> configs.Llama3Scaling:
    return configs.Llama3Scaling(
        factor=section.positive("factor"),
        low_freq_factor=section.positive("low_freq_factor"),
        high_freq_factor=section.positive("high_freq_factor"),
        original_max_position_embeddings=_original_length(section, hf),
    )


def _longrope(section: ConfigReader, hf: ConfigReader, rotary_dim: int) -> configs.LongRopeScaling:
    original = _original_length(section, hf)
    factor = section.positive("factor", None) or hf.integer("max_position_embeddings") / original
    suggested = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return configs.LongRopeScaling(
        short_factor=_factors(section, "short_factor", rotary_dim // 2),
        long_factor=_factors(section, "long_factor", rotary_dim // 2),
        original_max_position_embeddings=original,
        attention_factor=section.number("attention_factor", suggested),
    )


def _original_length(section: ConfigReader, hf: ConfigReader) -> int:
    """Context length in tokens before scaling; a key beside the section comes first (Phi-3)."""
    inside = section.integer("original_max_position_embeddings", None)
    return hf.integer("original_max_position_embeddings", None) or inside or hf.integer("max_position_embeddings")


def _factors(section: ConfigReader, key: str, count: int) -> tuple[float, ...]:
    """One stretch for every pair of dims."""
    values = section.value(key)
    numbers = isinstance(values, list) and all(isinstance(v, (int, float)) and v > 0 for v in values)
    if numbers and len(values) == count:
        return tuple(float(v) for v in values)
    if values is not None:
        section.problem(key, f"not {count} positive numbers", "give one for every pair of rotated dims")
    return (1.0,) * count


_SCALINGS: dict[str, Callable[[ConfigReader, ConfigReader, int], RopeScaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
    "su": _longrope,  # its name in the first files of Phi-3
}
