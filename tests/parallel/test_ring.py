"""Attention over sharded tokens, by every algorithm, and its parts: which rank holds what, and what is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cordee.model.gpt import GPTModel
from cordee.ops import partial_attention
from cordee.ops.attention import Scores, alibi_slopes, reference_attention
from cordee.ops.mask import AttentionMask
from cordee.parallel import context, ring
from cordee.parallel.degrees import degrees
from cordee.parallel.layout import Layout
from tests.parallel.context_cases import (
    BATCH,
    CPU,
    HYBRID,
    LAYOUTS,
    LENGTH,
    RING,
    ULYSSES,
    documents,
    options,
    positions,
    shape,
)

PLAIN = Scores(scale=0.3)
CASES: dict[str, dict] = {
    "causal": {},
    "window": {"scores": replace(PLAIN, window=5)},
    "window over chunks": {"scores": replace(PLAIN, window=19)},
    "chunk": {"scores": replace(PLAIN, chunk=8)},
    "chunk of given positions": {"scores": replace(PLAIN, chunk=6), "positions": True},
    "segments": {"segments": True},
    "segments and window": {"segments": True, "scores": replace(PLAIN, window=4)},
    "alibi": {"scores": replace(PLAIN, slopes=alibi_slopes(8))},
    "softcap": {"scores": replace(PLAIN, softcap=1.5)},
    "everything": {
        "segments": True,
        "sinks": True,
        "scores": replace(PLAIN, softcap=1.5, window=9, slopes=alibi_slopes(8)),
    },
    "sinks": {"sinks": True},
    "two heads for keys": {"kv_heads": 2},
    "one head for keys": {"kv_heads": 1},
    "values of another dim": {"value_dim": 6},
    "narrow keys": {"value_dim": 12, "kv_heads": 2},
    "full": {"causal": False},
    "full with segments": {"causal": False, "segments": True},
}


def inputs(kv_heads: int = 8, value_dim: int = 8, sinks: bool = False) -> list[torch.Tensor]:
    """q, k, v, the gradient of the result and sinks."""
    random = torch.Generator().manual_seed(5)
    shapes = [(8, LENGTH, 8), (kv_heads, LENGTH, 8), (kv_heads, LENGTH, value_dim), (8, LENGTH, value_dim)]
    made = [torch.randn(BATCH, *shape, generator=random) for shape in shapes]
    return made + ([torch.randn(8, generator=random)] if sinks else [])


def mask_of(case: dict, index: torch.Tensor) -> AttentionMask:
    segments = documents()[:, index] if case.get("segments") else None
    given = positions()[:, index] if case.get("positions") else None
    return AttentionMask(
        len(index),
        len(index),
        case.get("causal", True),
        query_segments=segments,
        key_segments=segments,
        query_positions=given,
        key_positions=given,
    )


def attend(core, case: dict, index: torch.Tensor) -> list[torch.Tensor]:
    """The result of `core` and the gradients of its inputs, for the tokens at `index`."""
    made = inputs(**{name: case[name] for name in ("kv_heads", "value_dim", "sinks") if name in case})
    q, k, v, upstream = (x[:, :, index] for x in made[:4])
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *made[4:])]
    sinks = leaves[3] if len(leaves) > 3 else None
    y = core(*leaves[:3], mask_of(case, index), replace(case.get("scores", PLAIN), sinks=sinks))
    y.backward(upstream)
    return [y.detach(), *(x.grad for x in leaves)]


def attention_on_ranks(rank: int, ranks: int, given: dict, names: list[str]) -> dict[str, list[torch.Tensor]]:
    found = {}
    layout = Layout(degrees(options(ranks, **given), ranks))
    for name in names:
        case = CASES[name]
        causal = case.get("causal", True)
        config = options(ranks, cp_attention_mask_type="causal" if causal else "full", **given)
        model = GPTModel(shape(), device="meta")
        context.apply(model, layout, config)
        core = model.layers["0"].attention.placement.core
        found[name] = attend(core, case, context.positions(LENGTH, layout.degrees, rank, causal))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_equals_the_dense_reference(pool, layout: str):
    ranks, given = LAYOUTS[layout]
    results = pool.run(attention_on_ranks, ranks, given, list(CASES))
    for name, case in CASES.items():
        expected = attend(reference_attention, case, torch.arange(LENGTH))
        sizes = degrees(options(ranks, **given), ranks)
        order = torch.cat([context.positions(LENGTH, sizes, r, case.get("causal", True)) for r in range(ranks)])
        assert order.sort().values.equal(torch.arange(LENGTH))
        for number, whole in enumerate(expected):
            parts = [found[name][number] for found in results]
            # y and the gradients of q, k, v are of the tokens of each rank; sinks get a part of a sum on each.
            joined = sum(parts) if number == 4 else torch.cat(parts, 2)[:, :, order.argsort()]
            assert torch.allclose(joined, whole, rtol=1e-5, atol=2e-6), (name, number, joined - whole)


def test_places_of_a_balanced_ring():
    sizes = degrees(options(4, **RING), 4)
    held = [context.positions(16, sizes, rank, causal=True).tolist() for rank in range(4)]
    assert held == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]


def test_places_of_a_hybrid():
    sizes = degrees(options(4, **HYBRID), 4)
    held = [context.positions(16, sizes, rank, causal=True).tolist() for rank in range(4)]
    assert held == [[0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("causal", [False, True])
def test_one_stretch_each_without_a_ring_or_without_order(causal: bool):
    sizes = degrees(options(2, **(ULYSSES if causal else RING)), 2)
    assert [context.positions(8, sizes, rank, causal).tolist() for rank in (0, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]


def sources(ranks: int, window: int) -> list[list[int]]:
    return [list(ring.Ring(None, rank, ranks, window).sources()) for rank in range(ranks)]


def test_order_of_the_rings():
    assert sources(4, 1) == [[0, 3, 2, 1], [1, 0, 3, 2], [2, 1, 0, 3], [3, 2, 1, 0]]
    assert sources(4, 2) == [[0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]]


# ---- tiles and parts -------------------------------------------------------------------------------------------------


def covered(case: dict, score_bytes: int) -> tuple[torch.Tensor, int]:
    """What the tiles of a ring of two show, put together, and how many there are."""
    scores = case.get("scores", PLAIN)
    whole = mask_of(case, torch.arange(LENGTH))
    tiled = ring.TiledMask(whole, CPU)
    shown = torch.zeros(BATCH, LENGTH, LENGTH, dtype=torch.bool)
    count = 0
    held = [context.token_ranges(LENGTH, 2, r, True) for r in (0, 1)]
    for queries in held:
        rows = torch.cat([torch.arange(p.start, p.stop) for p in queries])
        for keys in held:
            columns = torch.cat([torch.arange(p.start, p.stop) for p in keys])
            for tile in tiled.tiles(queries, keys, scores, score_bytes, fused=True):
                plain = tile.mask.is_plain()
                visible = tile.mask.dense(CPU, *(() if plain else scores.reach))[:, 0].expand(BATCH, -1, -1)
                at = rows[tile.queries][:, None], columns[tile.keys][None]
                assert not shown[:, *at].any()
                shown[:, *at] = visible
                count += 1
    return shown, count


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].get("causal", True)])
@pytest.mark.parametrize("rows", [2, 100])
def test_tiles_show_what_the_mask_shows(monkeypatch, name: str, rows: int):
    monkeypatch.setattr(ring, "BLOCK_BYTES", 4 * 8 * rows)
    case = CASES[name]
    shown, _ = covered(case, score_bytes=4)
    reach = case.get("scores", PLAIN).reach
    whole = mask_of(case, torch.arange(LENGTH)).dense(CPU, *reach)[:, 0]
    assert shown.equal(whole.expand(BATCH, -1, -1))


def test_hidden_tiles_are_left_out():
    assert covered({}, 4)[1] == 10  # of 16 pairs of chunks, those on the diagonal and below
    assert covered({"scores": replace(PLAIN, window=9)}, 4)[1] == 7  # the diagonal and what is just below
    assert covered({"scores": replace(PLAIN, chunk=8)}, 4)[1] == 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_parts_equal_plain_ones(causal: bool, dtype: torch.dtype):
    q, k, v, grad = (x.to(dtype) for x in inputs(kv_heads=2, value_dim=6))
    mask = AttentionMask(LENGTH, LENGTH, causal)
    assert partial_attention.has_flash(CPU, PLAIN)
    out, lse = partial_attention.plain_part(q, k, v, mask, PLAIN)
    found, found_lse = partial_attention.flash_part(q, k, v, mask, PLAIN)
    close = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(found.float(), out, **close)
    torch.testing.assert_close(found_lse.float(), lse, **close)
    expected = partial_attention.plain_gradients(grad, q, k, v, out, lse, mask, PLAIN)
    for x, y in zip(partial_attention.flash_gradients(grad, q, k, v, out, lse, mask, PLAIN), expected, strict=True):
        torch.testing.assert_close(x, y, **close)


def test_a_part_that_hides_everything_counts_nothing():
    q, k, v, _ = inputs()
    hidden = AttentionMask(LENGTH, LENGTH, query_index=torch.arange(LENGTH), key_index=torch.arange(LENGTH) + LENGTH)
    merged = partial_attention.Merged(q, v.shape[-1])
    merged.add(slice(None), *partial_attention.plain_part(q, k, v, hidden, PLAIN))
    assert not merged.out.any()
    merged.add(slice(None), *partial_attention.plain_part(q, k, v, AttentionMask(LENGTH, LENGTH), PLAIN))
    expected = reference_attention(q, k, v, AttentionMask(LENGTH, LENGTH), PLAIN)
    torch.testing.assert_close(merged.out, expected, rtol=1e-5, atol=2e-6)
