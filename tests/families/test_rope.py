"""Rotary positions as configurations describe them."""

from __future__ import annotations

import math

import pytest

from cordee.families.reader import ConfigReader
from cordee.families.rope import mscale, read_rope
from cordee.model.config import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)

BESIDE = {"max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}
LISTS = {"short_factor": [1.0, 1.5], "long_factor": [2, 4]}

SCALINGS = {
    "linear": ({"factor": 2.0}, LinearScaling(factor=2.0)),
    "dynamic": ({"factor": 6.0}, DynamicNTKScaling(factor=6.0, original_max_position_embeddings=64)),
    "llama3": (
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "yarn": (
        {**YARN, "beta_fast": 16, "truncate": False},
        YarnScaling(**YARN, beta_fast=16, attention_factor=0.1 * math.log(4) + 1, truncate=False),
    ),
    "longrope": (
        {**LISTS, "original_max_position_embeddings": 16},
        LongRopeScaling(
            short_factor=(1.0, 1.5),
            long_factor=(2.0, 4.0),
            original_max_position_embeddings=16,
            attention_factor=math.sqrt(1 + math.log(4) / math.log(16)),
        ),
    ),
}


def rope_of(hf, head_dim=4, **how):
    reader = ConfigReader({**BESIDE, **hf}, "c")
    rope = read_rope(reader, head_dim, **how)
    reader.finish()
    return rope


def problems_of(hf, head_dim=4, **how):
    reader = ConfigReader({**BESIDE, **hf}, "c")
    read_rope(reader, head_dim, **how)
    return [problem.option for problem in reader.problems + reader.unimplemented()]


@pytest.mark.parametrize("kind", SCALINGS)
def test_every_scaling_in_every_spelling(kind):
    keys, scaling = SCALINGS[kind]
    expected = RopeConfig(theta=5e5, scaling=scaling)
    assert rope_of({"rope_theta": 5e5, "rope_scaling": {"rope_type": kind, **keys}}) == expected
    assert rope_of({"rope_theta": 5e5, "rope_scaling": {"type": kind, **keys}}) == expected
    assert rope_of({"rope_theta": 5e5, "rope_scaling": {"type": kind, "rope_type": kind, **keys}}) == expected
    assert rope_of({"rope_parameters": {"rope_type": kind, "rope_theta": 5e5, **keys}}) == expected


def test_defaults():
    assert rope_of({}) == RopeConfig(theta=10000.0)
    assert rope_of({}, theta=1e6) == RopeConfig(theta=1e6)
    assert rope_of({"rope_theta": 500, "rope_scaling": None, "rope_parameters": None}) == RopeConfig(theta=500.0)
    assert rope_of({"original_max_position_embeddings": 16}) == RopeConfig()


def test_the_original_length_may_stand_beside_the_section():
    """As in Phi-3, whose first files also call the type "su"."""
    hf = {"original_max_position_embeddings": 16, "rope_scaling": {"type": "su", **LISTS}}
    assert rope_of(hf).scaling == SCALINGS["longrope"][1]
    assert rope_of({"rope_scaling": {"type": "yarn", "factor": 4.0}}).scaling.original_max_position_embeddings == 64


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 0.8, "mscale_all_dim": 0.5}, (0.08 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_how_yarn_sharpens(keys, factor):
    scaling = rope_of({"rope_scaling": {"type": "yarn", **YARN, **keys}}).scaling
    assert scaling.attention_factor == pytest.approx(factor)


def test_yarn_without_a_factor_takes_it_from_the_lengths():
    scaling = rope_of({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 16}}).scaling
    assert scaling.factor == 4.0 and scaling.attention_factor == mscale(4.0)


@pytest.mark.parametrize(("partial", "rotary_dim"), [(0.5, 6), (0.75, 8), (1.0, None), (1, None)])
def test_part_of_a_head(partial, rotary_dim):
    expected = RopeConfig(rotary_dim=rotary_dim)
    assert rope_of({"partial_rotary_factor": partial}, head_dim=12 if partial != 0.75 else 11, partial=1.0) == expected
    section = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": partial}}
    assert rope_of(section, head_dim=12 if partial != 0.75 else 11, partial=1.0) == expected


def test_a_family_without_partial_heads_refuses_them():
    assert problems_of({"partial_rotary_factor": 0.5}) == ["c: partial_rotary_factor"]
    section = {"rope_scaling": {"rope_type": "default", "partial_rotary_factor": 0.5}}
    assert problems_of(section) == ["c: rope_scaling: partial_rotary_factor"]


def test_sections_by_type_of_layer():
    sections = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    new, old = (
        {"rope_parameters": sections},
        {"rope_theta": 1e6, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 1e4},
    )
    near = {"layer_type": "sliding_attention", "theta_key": "rope_local_base_freq", "scaling_key": None}
    for hf in (new, old):
        assert rope_of(hf, layer_type="full_attention") == RopeConfig(theta=1e6, scaling=LinearScaling(factor=8.0))
        assert rope_of(hf, **near) == RopeConfig(theta=1e4)
    assert set(problems_of(new)) == {f"c: rope_parameters: {kind}" for kind in sections}


@pytest.mark.parametrize(
    ("hf", "option"),
    [
        ({"rope_scaling": {"rope_type": "spiral", "turns": 3}}, "c: rope_scaling: rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "c: rope_scaling: factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "c: rope_scaling: factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2, "mscale": 1}}, "c: rope_scaling: mscale"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1]}}, "c: rope_scaling: mrope_section"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": "no"}}, "c: rope_scaling: truncate"),
        ({"rope_scaling": {"rope_type": "longrope", **LISTS, "long_factor": [1.0]}}, "c: rope_scaling: long_factor"),
        ({"rope_scaling": {"rope_type": "longrope", **LISTS, "short_factor": 2}}, "c: rope_scaling: short_factor"),
        ({"rope_scaling": "yarn"}, "c: rope_scaling"),
        ({"rope_theta": 0}, "c: rope_theta"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "c: rope_theta"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 4}},
            "c: rope_parameters",
        ),
    ],
)
def test_what_is_wrong_is_said(hf, option):
    assert problems_of(hf) == [option]


def test_heads_that_cannot_turn():
    assert problems_of({}, head_dim=5) == ["c: head_dim"]
    assert problems_of({"partial_rotary_factor": 0.3}, head_dim=10, partial=1.0) == ["c: head_dim"]
