"""Attention of packed samples, segment by segment."""

from __future__ import annotations

import pytest
import torch

from cordee.ops.attention import Scores, alibi_slopes, reference_attention, sdpa_attention
from cordee.ops.mask import AttentionMask

SEGMENTS = {
    "packed": ([[0] * 5 + [1] * 3 + [2] * 7 + [-1], [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4], True),
    "one long": ([[0] * 14 + [1] * 2, [0] * 16], False),
    "apart": ([[0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 2, 2, 2, 2]] * 2, False),
}


@pytest.mark.parametrize("name", SEGMENTS)
@pytest.mark.parametrize("scores", [{}, {"window": 3}, {"slopes": alibi_slopes(4)}, {"sinks": True}], ids=str)
def test_equals_the_definition(name: str, scores: dict):
    torch.manual_seed(0)
    labels, split = SEGMENTS[name]
    segments = torch.tensor(labels)
    q, k, v = (torch.randn(2, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))
    if "sinks" in scores:
        scores = {"sinks": torch.randn(4)}
    mask = AttentionMask(16, 16, True, segments, segments)
    assert (mask.segment_spans is not None) == split
    given = Scores(scale=0.3, **scores)
    found, expected = (core(q, k, v, mask, given) for core in (sdpa_attention, reference_attention))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
