from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cordee.model.config import (
    DynamicNTKScaling,
    LinearScaling,
    Llama3Scaling,
    LogNScaling,
    LongRopeScaling,
    QwenNTKScaling,
    RopeConfig,
    RopeScaling,
    TemperatureScaling,
    YarnScaling,
)
from cordee.model.rotary import Positions, depends_on_length, inverse_frequencies

DIM = 16
SHORT, LONG = tuple(1 + 0.1 * n for n in range(DIM // 2)), tuple(2.0 + n for n in range(DIM // 2))


def theirs(kind: str, length: int, *, theta: float = 10000.0, dim: int = DIM, original: int = 64, **options):
    """Frequencies and factor of cos and sin, by transformers."""
    parameters = {"rope_type": kind, "rope_theta": theta, "original_max_position_embeddings": original, **options}
    config = LlamaConfig(hidden_size=2 * dim, num_attention_heads=2, max_position_embeddings=original)
    config.rope_parameters = parameters
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


def ours(scaling: RopeScaling | None, length: int, **options) -> torch.Tensor:
    return Positions(torch.arange(length)[None]).frequencies(RopeConfig(scaling=scaling, **options), DIM).reshape(-1)


LONGROPE = {"short_factor": SHORT, "long_factor": LONG}
CASES = {
    "linear": (LinearScaling(factor=3.0), "linear", {"factor": 3.0}),
    "dynamic": (DynamicNTKScaling(factor=2.0, original_max_position_embeddings=64), "dynamic", {"factor": 2.0}),
    "llama3": (
        Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=64),
        "llama3",
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
    "yarn": (YarnScaling(factor=4.0, original_max_position_embeddings=64), "yarn", {"factor": 4.0}),
    "yarn, exact borders": (
        YarnScaling(factor=32.0, original_max_position_embeddings=64, beta_fast=16, beta_slow=2, truncate=False),
        "yarn",
        {"factor": 32.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    ),
    "longrope": (
        LongRopeScaling(original_max_position_embeddings=64, **LONGROPE),
        "longrope",
        {"factor": 4.0, **LONGROPE},
    ),
}


@pytest.mark.parametrize("length", [20, 64, 65, 200])
@pytest.mark.parametrize(("scaling", "kind", "options"), CASES.values(), ids=CASES)
def test_frequencies_are_those_of_transformers(scaling, kind, options, length):
    expected, _ = theirs(kind, length, **options)
    torch.testing.assert_close(ours(scaling, length), expected, rtol=2e-6, atol=0)


@settings(max_examples=50, deadline=None)
@given(
    factor=st.floats(1.5, 64),
    theta=st.floats(1e3, 1e7),
    original=st.integers(16, 8192),
    slow=st.floats(0.5, 2),
    fast=st.floats(4, 64),
    truncate=st.booleans(),
)
def test_yarn_whatever_its_borders(factor, theta, original, slow, fast, truncate):
    options = {"factor": factor, "beta_slow": slow, "beta_fast": fast, "truncate": truncate}
    expected, _ = theirs("yarn", 10, theta=theta, original=original, **options)
    scaling = YarnScaling(original_max_position_embeddings=original, **options)
    torch.testing.assert_close(ours(scaling, 10, theta=theta), expected, rtol=1e-5, atol=1e-9)


def test_attention_factor_multiplies_cos_and_sin():
    scaling = YarnScaling(factor=4.0, original_max_position_embeddings=64, attention_factor=1.5)
    rope = RopeConfig(scaling=scaling)
    positions = Positions(torch.arange(6)[None])
    cos, sin = positions.angles(rope, DIM)
    assert cos.shape == (1, 6, 1, 1, DIM // 2)
    torch.testing.assert_close(cos**2 + sin**2, torch.full_like(cos, 1.5**2))
    assert positions.angles(rope, DIM)[0] is cos, "layers with the same rope share one table"


def test_partial_rotary_has_the_frequencies_of_its_own_dim():
    frequency = inverse_frequencies(RopeConfig(rotary_dim=6, theta=100.0), DIM)
    torch.testing.assert_close(frequency, torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)]))


@pytest.mark.parametrize(("length", "alpha"), [(1, 1), (16, 1), (17, 3), (32, 3), (33, 7), (64, 7), (65, 15)])
def test_qwen_ntk_grows_in_steps_and_in_evaluation_only(length, alpha):
    """alpha = 2 ^ ceil(log2(length / 16) + 1) - 1, at least 1; the base grows by alpha ^ (dim / (dim - 2))."""
    rope = RopeConfig(scaling=QwenNTKScaling(original_max_position_embeddings=16))
    ids = torch.arange(length)[None]
    base = 10000.0 * alpha ** (DIM / (DIM - 2))
    expected = torch.tensor([base ** (-2 * n / DIM) for n in range(DIM // 2)])
    torch.testing.assert_close(Positions(ids).frequencies(rope, DIM)[0], expected)
    torch.testing.assert_close(
        Positions(ids, training=True).frequencies(rope, DIM), inverse_frequencies(RopeConfig(), DIM)
    )


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_sequence_turns_as_if_it_were_alone(kind):
    """The second row is left-padded: its length is its number of tokens, whatever stands beside it."""
    scaling = CASES[kind][0]
    assert depends_on_length(RopeConfig(scaling=scaling))
    ids = torch.stack((torch.arange(100), (torch.arange(100) - 60).clamp(min=0)))
    cos, sin = Positions(ids).angles(RopeConfig(scaling=scaling), DIM)
    for row, length in enumerate((100, 40)):
        alone = Positions(torch.arange(length)[None]).angles(RopeConfig(scaling=scaling), DIM)
        torch.testing.assert_close((cos[row, -length:], sin[row, -length:]), (alone[0][0], alone[1][0]))


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_other_frequencies_do_not_depend_on_the_length(kind):
    assert not depends_on_length(RopeConfig(scaling=CASES[kind][0]))


def test_logn_scaling_of_queries():
    scaling, ids = LogNScaling(length=4), torch.tensor([[0, 3, 4, 15]])
    expected = torch.tensor([1.0, 1.0, math.log(5, 4), math.log(16, 4)])
    torch.testing.assert_close(Positions(ids).query_scale(scaling).flatten(), expected)
    assert Positions(ids, training=True).query_scale(scaling) is None


def test_temperature_scaling_of_queries():
    """1 + 0.2 ln(1 + floor((position + 1) / 3))."""
    scale = Positions(torch.tensor([[0, 1, 2, 5, 8]])).query_scale(TemperatureScaling(scale=0.2, floor_scale=3))
    expected = torch.tensor([1.0, 1.0, 1 + 0.2 * math.log(2), 1 + 0.2 * math.log(3), 1 + 0.2 * math.log(4)])
    torch.testing.assert_close(scale.flatten(), expected)
