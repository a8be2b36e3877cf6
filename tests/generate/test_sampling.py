"""Filters against transformers' and by hand; draws against the probabilities they stand for."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch

from cordee.generate.options import DecodingOptions
from cordee.generate.sampling import choose, filtered, uniform

INF = float("inf")


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95, 1.0])
def test_filters_equal_transformers(temperature, top_k, top_p):
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    expected = logits = torch.randn(4, 60, generator=torch.Generator().manual_seed(1)) * 3
    if temperature != 1.0:
        expected = TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = filtered(logits, temperature, top_k, top_p)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "top_p, kept",
    [(0.0, 1), (0.3, 1), (0.49, 1), (0.5, 1), (0.51, 2), (0.79, 2), (0.8, 2), (0.81, 3), (0.95, 3), (0.99, 4), (1, 4)],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    found = filtered(log(0.05, 0.5, 0.15, 0.3), top_p=top_p)
    assert (found > -INF).sum() == kept
    assert found[0, 1] > -INF  # the most likely token always stays


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (4, 2, 1, 1), (1,) * 10, (7, 5, 3, 3, 3, 1, 1), tuple(range(1, 60))])
@pytest.mark.parametrize("shift", [0.0, -3.0])
def test_top_p_counts_as_fractions_do(weights, shift):
    total, ordered = sum(weights), sorted(weights, reverse=True)
    logits = log(*(weight / total for weight in weights)) + shift
    sums = [Fraction(sum(ordered[:count]), total) for count in range(1, len(weights) + 1)]
    for reached in {*sums, *(middle + Fraction(1, 3 * total) for middle in sums[:-1])}:
        right = next(count for count, together in enumerate(sums, 1) if together >= reached)
        assert (filtered(logits, top_p=float(reached)) > -INF).sum() == right


def test_top_p_takes_lower_ids_of_equally_likely_tokens():
    assert (filtered(torch.zeros(1, 4), top_p=0.5) > -INF).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.99])
def test_top_p_neither_drops_nor_adds_tokens_of_a_large_vocabulary(top_p):
    assert (filtered(torch.full((1, 150_000), -7.0), top_p=top_p) > -INF).sum() == round(150_000 * top_p)


def test_top_p_leaves_removed_tokens_removed():
    found = filtered(torch.tensor([[-INF, 1.0, -INF, 1.0]]), top_p=0.9999)
    assert found.tolist() == [[-INF, 1.0, -INF, 1.0]]
    assert filtered(torch.tensor([[-INF, 1.0, -INF]]), top_p=0.0).tolist() == [[-INF, 1.0, -INF]]


def test_top_k_keeps_ties_together():
    found = filtered(torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]]), top_k=2)
    assert found.tolist() == [[-INF, 3.0, 2.0, 2.0, -INF]]


def test_filters_compute_in_float32():
    logits = torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    assert filtered(logits, temperature=3.0).dtype == torch.float32


def test_top_p_follows_top_k():
    # Of 0.4, 0.3, 0.2, 0.1 the first two are left with 4/7 and 3/7; 4/7 exceeds 0.5 alone.
    found = filtered(log(0.4, 0.3, 0.2, 0.1), top_k=2, top_p=0.5)
    assert (found > -INF).tolist() == [[True, False, False, False]]


def test_greedy_takes_the_most_likely():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, 2.0, 1.0]])
    assert choose(logits, DecodingOptions(), [(0, 0), (1, 0)]).tolist() == [1, 0]


def test_draws_follow_the_probabilities():
    options = DecodingOptions(do_sample=True, temperature=2.0, seed=7)
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3])
    count = 20_000
    logits = (probabilities.log() * 2.0).expand(count, -1)
    tokens = choose(logits, options, [(sample, 3) for sample in range(count)])
    shares = torch.bincount(tokens, minlength=4) / count
    assert shares[1] == 0
    assert (shares - probabilities).abs().max() < 4 * (0.25 / count) ** 0.5  # four standard deviations


def test_draws_of_successive_steps_are_independent():
    options = DecodingOptions(do_sample=True)
    logits = torch.zeros(5000, 2)
    first = choose(logits, options, [(sample, 0) for sample in range(5000)])
    second = choose(logits, options, [(sample, 1) for sample in range(5000)])
    assert abs((first == second).float().mean() - 0.5) < 4 * (0.25 / 5000) ** 0.5


def test_a_draw_depends_on_seed_sample_and_step_only():
    options = DecodingOptions(do_sample=True, seed=5)
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    together = choose(logits, options, [(4, 2), (9, 2), (1, 7)])
    alone = [choose(logits[i : i + 1], options, [draw]).item() for i, draw in enumerate([(4, 2), (9, 2), (1, 7)])]
    assert together.tolist() == alone
    assert together.tolist() == choose(logits, options, [(4, 2), (9, 2), (1, 7)]).tolist()


def test_uniform_numbers_differ_and_fill_the_interval():
    numbers = [uniform(seed, sample, step) for seed in range(5) for sample in range(20) for step in range(20)]
    assert len(set(numbers)) == len(numbers)
    assert 0.0 <= min(numbers) < 0.01 and 0.99 < max(numbers) < 1.0
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
