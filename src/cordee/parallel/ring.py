"""Ring attention: ranks keep their queries and hand keys and values round (Liu et al. 2023).

Owns the ring and its double form, in which keys and values go round a small inner ring while those of the next window
are on their way (LoongTrain, Gu et al. 2024), and which parts of the scores have to be computed at all. The attention
of one part is `cordee.ops.partial_attention`'s; who holds which places is said by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from cordee.ops import partial_attention
from cordee.ops.attention import BLOCK_BYTES, Scores
from cordee.ops.mask import AttentionMask
from cordee.parallel.differentiable import Transfer, hand_on

INNER, OUTER, INNER_GRADIENT, OUTER_GRADIENT = range(4)  # what a message is, for its tag
Pieces = Sequence[range]  # the places that a rank holds, in order


@dataclass(frozen=True)
class Ring:
    """The ring, seen from this rank. `window` consecutive ranks are an inner ring; 1: there is only the outer one.

    `overlap`: the next keys and values travel while those at hand are computed with.
    """

    group: ProcessGroup
    rank: int
    size: int
    window: int = 1
    overlap: bool = False

    def sources(self) -> Iterator[int]:
        """Whose keys and values are here at each step."""
        for outer in range(self.windows):
            for inner in range(self.window):
                yield self._at(self._window - outer, self._place - inner)

    @property
    def windows(self) -> int:
        return self.size // self.window

    def travel(self, kv: Tensor) -> Iterator[Tensor]:
        """The keys and values of each step, from this rank's own."""
        for outer in range(self.windows):
            first, last = kv, outer == self.windows - 1
            coming = self.start(first, OUTER) if self.overlap and not last else None
            for inner in range(self.window):
                more = inner < self.window - 1
                following = self.start(kv, INNER) if self.overlap and more else None
                yield kv
                if more:
                    kv = (following or self.start(kv, INNER)).wait()
            if not last:
                kv = (coming or self.start(first, OUTER)).wait()

    def start(self, x: Tensor, what: int) -> Transfer:
        """Hand x on by one place of the inner or the outer ring."""
        if what in (INNER, INNER_GRADIENT):
            to, source = (self._at(self._window, self._place + step) for step in (1, -1))
        else:
            to, source = (self._at(self._window + step, self._place) for step in (1, -1))
        if to == self.rank:
            return Transfer([], x, x)
        return hand_on(x, self.group, to, source, what)

    def bring_home(self, gradients: Iterator[Tensor]) -> Tensor:
        """The sum of what all ranks have for the keys and values of this one; `gradients` are those of each step here.

        A sum follows its keys and values, one step behind, and the last step brings it back to their rank.
        """
        coming: Transfer | None = None
        for _ in range(self.windows):
            for _ in range(self.window):
                total = next(gradients)
                if coming is not None:
                    total += coming.wait()
                coming = self._pass_on(total, INNER_GRADIENT)
            assert coming is not None
            coming = self._pass_on(coming.wait(), OUTER_GRADIENT)
        assert coming is not None
        return coming.wait()

    def _pass_on(self, total: Tensor, what: int) -> Transfer:
        transfer = self.start(total, what)
        if not self.overlap:
            transfer.wait()
        return transfer

    @property
    def _window(self) -> int:
        return self.rank // self.window

    @property
    def _place(self) -> int:
        return self.rank % self.window

    def _at(self, window: int, place: int) -> int:
        return window % self.windows * self.window + place % self.window


# ---- what is computed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Some of this rank's queries and some of the keys at hand, as slices of both, and what the ones see of the others.

    A mask that is plain says that order alone decides, or nothing.
    """

    queries: slice
    keys: slice
    mask: AttentionMask


class Sight:
    """What queries see of keys, by the places of both in the whole sequence: `whole` is the mask over all of it.

    Made once for a forward; its few numbers about segments and positions are kept on the host.
    """

    def __init__(self, whole: AttentionMask, device: torch.device):
        self.whole = whole
        self._device = device
        self._labels: dict[int | None, Tensor | None] = {}
        self._extents: dict[tuple[int | None, range], tuple[Tensor, Tensor]] = {}

    def tiles(self, queries: Pieces, keys: Pieces, scores: Scores, score_bytes: int, *, fused: bool) -> Iterator[Tile]:
        """The parts to compute; what is hidden entirely is left out.

        `score_bytes` is what the scores of a pair of places need, of all heads and sequences. `fused`: plain parts are
        computed without any scores in memory, and may be of any size. With dropout masks tell places, which plain ones
        do not.
        """
        query_start = 0
        for q in queries:
            key_start = 0
            for k in keys:
                for rows, columns, mask in self._parts(q, k, scores, score_bytes, fused):
                    yield Tile(_within(rows, q, query_start), _within(columns, k, key_start), mask)
                key_start += len(k)
            query_start += len(q)

    def _parts(
        self, q: range, k: range, scores: Scores, score_bytes: int, fused: bool
    ) -> Iterator[tuple[range, range, AttentionMask]]:
        mask = self._seen(q, k, scores)
        if mask is None:
            return
        rows = max(1, BLOCK_BYTES // (score_bytes * len(k)))
        if rows >= len(q) or (fused and mask.is_plain()):
            yield q, k, mask
            return
        for start in range(q.start, q.stop, rows):
            own = range(start, min(start + rows, q.stop))
            near = self._near(own, k, scores.window)
            if near and (mask := self._seen(own, near, scores)) is not None:
                yield own, near, mask

    def _near(self, q: range, k: range, window: int | None) -> range:
        """The keys that order and window leave."""
        first = k.start if window is None else max(k.start, q.start - window + 1)
        return range(first, min(k.stop, q.stop) if self.whole.causal else k.stop)

    def _seen(self, q: range, k: range, scores: Scores) -> AttentionMask | None:
        """The mask of a part; None if it hides everything."""
        nearest, farthest = q.start - (k.stop - 1), q.stop - 1 - k.start
        same = [self._same(label, q, k) for label in (None, scores.chunk) if self._label(label) is not None]
        out_of_reach = scores.window is not None and nearest >= scores.window
        if False in same or out_of_reach or (self.whole.causal and farthest < 0):
            return None
        within = scores.window is None or farthest < scores.window
        if all(same) and within and scores.slopes is None and scores.dropout is None:
            if nearest >= 0 or not self.whole.causal:
                return AttentionMask(len(q), len(k), causal=False)
            if q == k:
                return AttentionMask(len(q), len(k))
        return self.whole.block(q, k, self._device)

    def _label(self, chunk: int | None) -> Tensor | None:
        """Numbers on the host, `[1 or batch, places]`, of segments or chunks: the same where a key may be seen."""
        if chunk not in self._labels:
            if chunk is None:
                label = self.whole.key_segments
            else:
                label = self.whole.key_positions
                label = (torch.arange(self.whole.num_keys)[None] if label is None else label) // chunk
            self._labels[chunk] = None if label is None else label.cpu()
        return self._labels[chunk]

    def _same(self, chunk: int | None, q: range, k: range) -> bool | None:
        """Whether the numbers are the same for all pairs, or for none of them; None: for some."""
        (q_low, q_high), (k_low, k_high) = self._extent(chunk, q), self._extent(chunk, k)
        if bool(((q_high < k_low) | (k_high < q_low)).all()):
            return False
        return True if bool(((q_low == k_high) & (k_low == q_high)).all()) else None

    def _extent(self, chunk: int | None, places: range) -> tuple[Tensor, Tensor]:
        if (chunk, places) not in self._extents:
            label = self._label(chunk)
            assert label is not None
            low, high = label[:, places.start : places.stop].aminmax(dim=1)
            self._extents[chunk, places] = (low, high)
        return self._extents[chunk, places]


def _within(places: range, piece: range, start: int) -> slice:
    """Where `places` of a piece lie in a tensor that has the piece from `start` on."""
    return slice(start + places.start - piece.start, start + places.stop - piece.start)


# ---- attention -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """All that does not change within one attention: `pieces` are the places of each rank of the ring."""

    ring: Ring
    sight: Sight
    pieces: Sequence[Pieces]
    scores: Scores

    def tiles(self, q: Tensor, source: int) -> Iterator[Tile]:
        """The parts to compute of queries `q` with the keys of rank `source`."""
        pieces = self.pieces[self.ring.rank], self.pieces[source]
        fused = partial_attention.has_flash(q.device, self.scores)
        return self.sight.tiles(*pieces, self.scores, 4 * q.shape[0] * q.shape[1], fused=fused)


def ring_attention(q: Tensor, k: Tensor, v: Tensor, work: Work) -> Tensor:
    """As any core, of this rank's q, k and v."""
    return _RingAttention.apply(q, k, v, work.scores.sinks, work)


class _RingAttention(Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, work: Work) -> Tensor:
        kv = torch.cat((k, v), -1)
        merged = partial_attention.Merged(q, v.shape[-1])
        for source, (keys, values) in _steps(work.ring, kv, k.shape[-1]):
            for tile in work.tiles(q, source):
                rows, columns = tile.queries, tile.keys
                inputs = q[:, :, rows], keys[:, :, columns], values[:, :, columns]
                merged.add(rows, *partial_attention.part(*inputs, tile.mask, work.scores))
        if sinks is not None:
            merged.add_sinks(sinks)
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, kv, sinks, out, merged.lse)
        ctx.work, ctx.key_dim = work, k.shape[-1]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, kv, sinks, out, lse = ctx.saved_tensors
        grad_q = torch.zeros_like(q, dtype=torch.float32)

        def of_each_step() -> Iterator[Tensor]:
            for source, (keys, values) in _steps(ctx.work.ring, kv, ctx.key_dim):
                grad_kv = torch.zeros_like(kv, dtype=torch.float32)
                for tile in ctx.work.tiles(q, source):
                    rows, columns = tile.queries, tile.keys
                    of_q, *of_kv = partial_attention.gradients(
                        grad[:, :, rows],
                        q[:, :, rows],
                        keys[:, :, columns],
                        values[:, :, columns],
                        out[:, :, rows],
                        lse[:, :, rows],
                        tile.mask,
                        ctx.work.scores,
                    )
                    grad_q[:, :, rows] += of_q
                    for part, found in zip(grad_kv[:, :, columns].split(_dims(ctx, kv), -1), of_kv, strict=True):
                        part += found
                yield grad_kv

        grad_k, grad_v = ctx.work.ring.bring_home(of_each_step()).to(kv.dtype).split(_dims(ctx, kv), -1)
        grad_sinks = None if sinks is None else partial_attention.sinks_gradient(grad, out, lse, sinks)
        return grad_q.to(q.dtype), grad_k, grad_v, grad_sinks, None


def _steps(ring: Ring, kv: Tensor, key_dim: int) -> Iterator[tuple[int, list[Tensor]]]:
    for source, here in zip(ring.sources(), ring.travel(kv), strict=True):
        yield source, list(here.split((key_dim, here.shape[-1] - key_dim), -1))


def _dims(ctx, kv: Tensor) -> tuple[int, int]:
    return ctx.key_dim, kv.shape[-1] - ctx.key_dim
