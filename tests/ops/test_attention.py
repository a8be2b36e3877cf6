from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss_attention

from cordee.ops.attention import Scores, alibi_slopes, blockwise_attention, reference_attention, sdpa_attention
from cordee.ops.dropout import Dropout
from cordee.ops.mask import AttentionMask

BATCH, HEADS, GROUPS, DIM = 2, 6, 2, 8
SCALE = 0.4


def qkv(queries: int, keys: int, value_dim: int = DIM, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = (BATCH, HEADS, queries, DIM), (BATCH, GROUPS, keys, DIM), (BATCH, GROUPS, keys, value_dim)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def left_padded(queries: int, keys: int) -> AttentionMask:
    """Two rows, the second with three places of padding; positions count real tokens."""
    segments = torch.zeros(BATCH, keys, dtype=torch.int64)
    segments[1, :3] = -1
    positions = ((segments == 0).cumsum(-1) - 1).clamp(min=0)
    last = slice(keys - queries, keys)
    return AttentionMask(
        queries,
        keys,
        query_segments=segments[:, last],
        key_segments=segments,
        query_positions=positions[:, last],
        key_positions=positions,
    )


SINKS = torch.linspace(-1.0, 2.0, HEADS)
SCORES = {
    "plain": Scores(scale=SCALE),
    "window": Scores(scale=SCALE, window=4),
    "wide window": Scores(scale=SCALE, window=1000),
    "chunk": Scores(scale=SCALE, chunk=5),
    "wide chunk": Scores(scale=SCALE, chunk=1000),
    "softcap": Scores(scale=SCALE, softcap=1.5),
    "softcap in a window": Scores(scale=SCALE, softcap=1.5, window=3),
    "alibi": Scores(scale=SCALE, slopes=alibi_slopes(HEADS)),
    "alibi with a softcap in a window": Scores(scale=SCALE, softcap=2.0, slopes=alibi_slopes(HEADS), window=6),
}
MASKS = {
    "whole": lambda: AttentionMask(12, 12),
    "last five": lambda: AttentionMask(5, 12),
    "last": lambda: AttentionMask(1, 12),
    "both ways": lambda: AttentionMask(12, 12, causal=False),
    "left-padded": lambda: left_padded(12, 12),
    "left-padded last": lambda: left_padded(1, 12),
}


def run(core, mask: AttentionMask, scores: Scores, sinks: torch.Tensor | None, **options) -> list[torch.Tensor]:
    """Output and gradients."""
    inputs = qkv(mask.num_queries, mask.num_keys)
    sinks = None if sinks is None else sinks.clone().requires_grad_()
    y = core(*inputs, mask, replace(scores, sinks=sinks), **options)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach()] + [t.grad for t in (*inputs, *([] if sinks is None else [sinks]))]


@pytest.mark.parametrize("sinks", [None, SINKS], ids=["", "sinks"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_cores_are_the_reference_forward_and_backward(scores, mask, sinks):
    expected = run(reference_attention, mask(), scores, sinks)
    torch.testing.assert_close(run(sdpa_attention, mask(), scores, sinks), expected, rtol=1e-4, atol=1e-5)
    for block_size in (None, 5):
        got = run(blockwise_attention, mask(), scores, sinks, block_size=block_size)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("core", [sdpa_attention, blockwise_attention, reference_attention])
@pytest.mark.parametrize("value_dim", [3, 11])
def test_values_may_have_another_dim_than_keys(core, value_dim):
    q, k, v = qkv(7, 7, value_dim)
    y = core(q, k, v, AttentionMask(7, 7), Scores(scale=SCALE, sinks=SINKS))
    assert y.shape == (BATCH, HEADS, 7, value_dim)
    scores = (q @ k.repeat_interleave(3, 1).mT * SCALE).masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
    weights = torch.cat((scores, SINKS[None, :, None, None].expand(BATCH, -1, 7, 1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(y, weights @ v.repeat_interleave(3, 1))


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
def test_bfloat16_stays_close_to_the_reference(scores):
    inputs = qkv(12, 12, dtype=torch.bfloat16)
    y = sdpa_attention(*inputs, AttentionMask(12, 12), replace(scores, sinks=SINKS.bfloat16()))
    assert y.dtype == torch.bfloat16
    expected = reference_attention(*[t.float() for t in inputs], AttentionMask(12, 12), replace(scores, sinks=SINKS))
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.03)


@pytest.mark.parametrize("scores", ["plain", "softcap"])
def test_dropout_keeps_the_mean(scores):
    inputs = [t.detach() for t in qkv(1, 64)]
    drops = [Dropout(0.3, torch.tensor([2 * n, 2 * n + 1], dtype=torch.int32)) for n in range(400)]
    ys = [sdpa_attention(*inputs, AttentionMask(1, 64), replace(SCORES[scores], dropout=drop)) for drop in drops]
    whole = sdpa_attention(*inputs, AttentionMask(1, 64), SCORES[scores])
    assert not torch.equal(ys[0], whole)
    torch.testing.assert_close(torch.stack(ys).mean(0), whole, rtol=0, atol=0.1)


def test_recomputed_blocks_drop_the_same_weights():
    """With the same dropped weights, the sum of all gradients by the values is the sum over all weights."""
    q, k, v = qkv(12, 12, value_dim=1)
    drop = Dropout(0.5, torch.tensor([1, 2], dtype=torch.int32))
    scores = Scores(scale=SCALE, softcap=2.0)
    y = blockwise_attention(q, k, v, AttentionMask(12, 12), replace(scores, dropout=drop), block_size=4)
    torch.testing.assert_close(y, reference_attention(q, k, v, AttentionMask(12, 12), replace(scores, dropout=drop)))
    y.sum().backward()
    torch.testing.assert_close((v * v.grad).sum(), y.sum())


# ---- against the originals -------------------------------------------------------------------------------------------


def causal_mask(length: int) -> torch.Tensor:
    return torch.zeros(1, 1, length, length).masked_fill(~torch.ones(length, length).tril().bool(), -torch.inf)


def test_softcap_is_that_of_gemma2():
    q, k, v = qkv(9, 9)
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, training=False)
    expected, _ = gemma2_attention(module, q, k, v, causal_mask(9), scaling=SCALE, softcap=1.5)
    y = reference_attention(q, k, v, AttentionMask(9, 9), Scores(scale=SCALE, softcap=1.5))
    torch.testing.assert_close(y.transpose(1, 2), expected)


def test_sinks_are_those_of_gpt_oss():
    q, k, v = qkv(9, 9)
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, training=False, sinks=SINKS)
    expected, _ = gpt_oss_attention(module, q, k, v, causal_mask(9), scaling=SCALE)
    y = reference_attention(q, k, v, AttentionMask(9, 9), Scores(scale=SCALE, sinks=SINKS))
    torch.testing.assert_close(y.transpose(1, 2), expected)


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 32, 40, 56, 112])
def test_alibi_is_that_of_bloom(heads):
    """Bloom adds slope * key position; every row of scores may be shifted, so differences along keys must agree."""
    expected = build_alibi_tensor(torch.ones(1, 10, dtype=torch.int64), heads, torch.float32)  # [heads, 1, 10]
    bias = AttentionMask(1, 10).bias(alibi_slopes(heads), torch.float32, torch.device("cpu"))
    torch.testing.assert_close(bias[0] - bias[0, :, :, :1], expected - expected[:, :, :1])
    assert (bias[..., -1] == 0).all()


def test_alibi_in_a_window_for_one_query():
    q, k, v = torch.randn(2, HEADS, 1, 8), torch.randn(2, HEADS, 10, 8), torch.randn(2, HEADS, 10, 8)
    scores = Scores(scale=SCALE, slopes=alibi_slopes(HEADS), window=6)
    mask = AttentionMask(1, 10)
    expected = reference_attention(q, k, v, mask, scores)
    torch.testing.assert_close(sdpa_attention(q, k, v, mask, scores), expected)


def test_alibi_slopes_by_hand():
    assert alibi_slopes(8) == tuple(2.0**-n for n in range(1, 9))
    assert alibi_slopes(3) == (2.0**-4, 2.0**-8, 2.0**-2)  # of 2 heads, then the first of 4


# ---- what the mask shows ---------------------------------------------------------------------------------------------


def visible(mask: AttentionMask, **reach) -> list[str]:
    return ["".join(".x"[int(seen)] for seen in row) for row in mask.dense(torch.device("cpu"), **reach)[-1, 0]]


def test_a_window_of_three_shows_three():
    assert visible(AttentionMask(5, 5), window=3) == ["x....", "xx...", "xxx..", ".xxx.", "..xxx"]
    assert visible(AttentionMask(2, 5), window=3) == [".xxx.", "..xxx"]


def test_a_chunk_shows_itself():
    assert visible(AttentionMask(5, 5), chunk=2) == ["x....", "xx...", "..x..", "..xx.", "....x"]


def test_chunks_go_by_position():
    """Behind three places of padding, chunks of two begin anew."""
    assert visible(left_padded(7, 7), chunk=2)[3:] == ["...x...", "...xx..", ".....x.", ".....xx"]


def test_masks_are_made_once():
    mask, device = AttentionMask(5, 5), torch.device("cpu")
    assert mask.dense(device, window=3) is mask.dense(device, window=3)
    assert mask.dense(device, window=5) is mask.dense(device), "a window over everything is none"
    slopes = alibi_slopes(2)
    assert mask.bias(slopes, torch.float32, device) is mask.bias(slopes, torch.float32, device)
