"""The cache protocol: rows of their own lengths, which leave, are doubled and join, in every kind of cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cordee.model.cache import KVCache
from cordee.model.gpt import GPTModel
from tests.model import tiny
from tests.model.caches import PAGE, PagedCache, WindowCache
from tests.model.test_attention import BLOCKS

LENGTH = 24
CACHES: dict[str, Any] = {"plain": KVCache, "paged": PagedCache, "sliding window": WindowCache}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
every_cache = pytest.mark.parametrize("kind", CACHES)
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def built(block: Any, **changes: Any) -> GPTModel:
    """Of the block and an ordinary one, so that a cache has layers of two kinds; weights of a usual size."""
    return tiny.model(tiny.config(tiny.layer(block), tiny.layer(), init_std=0.1, **changes))


def texts(*lengths: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randint(0, tiny.VOCAB, (length,), generator=random) for length in lengths]


def padded(rows: list[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """Ids and mask of rows filled up to the longest, on the left or right."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for n, row in enumerate(rows):
        place = slice(longest - len(row), None) if left else slice(0, len(row))
        ids[n, place], mask[n, place] = row, 1
    return ids, mask


def alone(model: GPTModel, text: Tensor) -> Tensor:
    """Logits `[vocab]` of what follows a text, without any cache."""
    return model(text[None])[0, -1]


@every_cache
@pytest.mark.parametrize("left", [True, False], ids=["left-padded", "right-padded"])
@every_block
@torch.inference_mode()
def test_rows_of_different_lengths_decode_as_each_alone(block, left, kind, num_prefix_tokens=0):
    """Prompts of unequal lengths, then steps of one token and one of two: no padding is kept."""
    model, rows = built(block, num_prefix_tokens=num_prefix_tokens), texts(9, 5, 14, 8)
    lengths = [4, 1, 7, 3]
    cache = CACHES[kind](model.config, len(rows), LENGTH)
    model(*padded([row[:length] for row, length in zip(rows, lengths, strict=True)], left), cache=cache)
    for count in (1, 2, 1):
        assert cache.lengths == lengths
        new = torch.stack([row[length : length + count] for row, length in zip(rows, lengths, strict=True)])
        lengths = [length + count for length in lengths]
        logits = model(new, cache=cache)
        for row, length, found in zip(rows, lengths, logits[:, -1], strict=True):
            torch.testing.assert_close(found, alone(model, row[:length]), **CLOSE)


@torch.inference_mode()
def test_a_full_row_waits_while_others_go_on():
    model = tiny.model(tiny.config(tiny.layer(), learned_positions=True, max_position_embeddings=8))
    rows = texts(8, 5)
    cache = KVCache(model.config, 2, 8)
    model(*padded([rows[0], rows[1][:4]], left=True), cache=cache)
    mask = torch.tensor([[0], [1]])
    logits = model(rows[1][None, 4:].expand(2, 1), mask, cache=cache)
    assert cache.lengths == [8, 5]
    torch.testing.assert_close(logits[1, -1], alone(model, rows[1]), **CLOSE)


@every_cache
@every_block
@torch.inference_mode()
def test_a_row_leaves_and_another_joins_midway(block, kind):
    model, rows = built(block), texts(15, 12, 20)
    cache = CACHES[kind](model.config, 2, LENGTH)
    model(*padded([rows[0][:3], rows[1][:6]], True), cache=cache)
    for n in range(3):
        model(torch.stack((rows[0][3 + n], rows[1][6 + n]))[:, None], cache=cache)
    cache.keep(torch.tensor([1]))
    joining = cache.fresh_rows(1) if isinstance(cache, PagedCache) else CACHES[kind](model.config, 1, LENGTH)
    model(rows[2][None, :13], cache=joining)
    cache.join(joining)
    assert cache.lengths == [9, 13]
    for n in range(3):
        logits = model(torch.stack((rows[1][9 + n], rows[2][13 + n]))[:, None], cache=cache)[:, -1]
        torch.testing.assert_close(logits[0], alone(model, rows[1][: 10 + n]), **CLOSE)
        torch.testing.assert_close(logits[1], alone(model, rows[2][: 14 + n]), **CLOSE)


@every_cache
@every_block
@torch.inference_mode()
def test_tokens_come_in_pieces_of_unequal_size(block, kind):
    """A step in which one row takes five tokens, one takes two and one takes none, across every window and page."""
    model, rows = built(block), texts(12, 9, 6)
    cache = CACHES[kind](model.config, 3, LENGTH)
    model(*padded([rows[0][:7], rows[1][:5], rows[2][:6]], True), cache=cache)
    ids, mask = padded([rows[0][7:], rows[1][5:7], rows[2][6:]], False)
    logits = model(ids, mask, cache=cache)
    torch.testing.assert_close(logits[0, -1], alone(model, rows[0]), **CLOSE)
    torch.testing.assert_close(logits[1, 1], alone(model, rows[1][:7]), **CLOSE)
    assert cache.lengths == [12, 7, 6]
    new = torch.stack((rows[0][0], rows[1][7], rows[2][0]))
    logits = model(new[:, None], cache=cache)[:, 0]
    texts_so_far = torch.cat((rows[0], new[:1])), rows[1][:8], torch.cat((rows[2], new[2:]))
    for found, text in zip(logits, texts_so_far, strict=True):
        torch.testing.assert_close(found, alone(model, text), **CLOSE)


@every_cache
@every_block
def test_a_learned_prefix_comes_before_what_any_cache_holds(block, kind):
    test_rows_of_different_lengths_decode_as_each_alone(block, True, kind, num_prefix_tokens=3)


@every_cache
@every_block
@torch.inference_mode()
def test_doubled_rows_go_their_own_ways(block, kind):
    """Two continuations of one prompt, as beams or samples of one prompt are."""
    model, (prompt, first, second) = built(block), texts(6, 5, 5)
    cache = CACHES[kind](model.config, 1, LENGTH)
    model(prompt[None], cache=cache)
    cache.keep(torch.tensor([0, 0]))
    for n in range(5):
        logits = model(torch.stack((first[n], second[n]))[:, None], cache=cache)[:, 0]
    torch.testing.assert_close(logits[0], alone(model, torch.cat((prompt, first))), **CLOSE)
    torch.testing.assert_close(logits[1], alone(model, torch.cat((prompt, second))), **CLOSE)


@torch.inference_mode()
def test_pages_of_a_prefix_are_shared_until_they_are_written():
    model, (prompt,) = built(tiny.attention()), texts(2 * PAGE + 1)
    cache = PagedCache(model.config, 1, LENGTH, num_pages=8)
    model(prompt[None], cache=cache)
    cache.keep(torch.tensor([0, 0, 0]))
    assert len(cache.free) == 5
    model(torch.tensor([[1], [2], [3]]), cache=cache)
    assert [table[:2] for table in cache.tables] == [cache.tables[0][:2]] * 3
    assert len({table[2] for table in cache.tables}) == 3
    cache.keep(torch.tensor([1]))
    assert len(cache.free) == 5


@torch.inference_mode()
def test_layers_with_a_window_keep_no_more_than_it_shows():
    model = built(tiny.attention(window=5))
    cache = WindowCache(model.config, 2, LENGTH)
    assert [buffer.shape[3] for buffer in cache.buffers] == [5, LENGTH]
