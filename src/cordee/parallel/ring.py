"""Ring attention: ranks keep their queries and rotate keys and values (Liu et al. 2023).

Owns the ring and its double form, in which keys and values rotate in a small inner ring while those of the next window
are in flight (LoongTrain, Gu et al. 2024), and which tiles of the scores have to be computed at all. The attention of
one tile is `cordee.ops.partial_attention`'s; the caller says which rank holds which token positions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from cordee.ops import partial_attention
from cordee.ops.attention import BLOCK_BYTES, Scores
from cordee.ops.mask import AttentionMask
from cordee.parallel.differentiable import Transfer, send_receive

INNER, OUTER, INNER_GRADIENT, OUTER_GRADIENT = range(4)  # what a message is, for its tag
TokenRanges = Sequence[range]  # the token positions that a rank holds, in order


@dataclass(frozen=True)
class Ring:
    """The ring, seen from this rank. `window` consecutive ranks are an inner ring; 1: there is only the outer one.

    `overlap`: the next keys and values are in flight while those at hand are used."""

    group: ProcessGroup
    rank: int
    size: int
    window: int = 1
    overlap: bool = False

    @property
    def num_windows(self) -> int:
        return self.size // self.window

    def sources(self) -> Iterator[int]:
        """The rank whose keys and values are here at each step."""
        for outer in range(self.num_windows):
            for inner in range(self.window):
                yield self._shifted(-outer, -inner)

    def rotate(self, kv: Tensor) -> Iterator[Tensor]:
        """The keys and values of each step, from this rank's own."""
        for outer in range(self.num_windows):
            first, last = kv, outer == self.num_windows - 1
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
        """Send x to the next rank of the inner or the outer ring, and receive from the one before."""
        step = (0, 1) if what in (INNER, INNER_GRADIENT) else (1, 0)
        to, source = self._shifted(*step), self._shifted(-step[0], -step[1])
        if to == self.rank:
            return Transfer([], x, x)
        return send_receive(x, self.group, to, source, what)

    def reduce(self, gradients: Iterator[Tensor]) -> Tensor:
        """The sum of all ranks' gradients of this rank's keys and values; `gradients` are those of each step here.

        A sum follows its keys and values, one step behind, and the last step brings it back to their rank."""
        coming: Transfer | None = None
        for _ in range(self.num_windows):
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

    def _shifted(self, windows: int, ranks: int) -> int:
        """The rank so many windows on, and so many ranks on within the window."""
        window, rank = divmod(self.rank, self.window)
        return (window + windows) % self.num_windows * self.window + (rank + ranks) % self.window


class Tile(NamedTuple):
    """Some of this rank's queries and some of the keys at hand, as slices of both, and the mask between them.

    A mask that is plain says that order alone decides, or nothing."""

    queries: slice
    keys: slice
    mask: AttentionMask


class TiledMask:
    """`whole`, the mask over all token positions of a sequence, cut into tiles.

    Made once for a forward; its few numbers about segments and positions are kept on the host."""

    def __init__(self, whole: AttentionMask, device: torch.device):
        self.whole = whole
        self._device = device
        self._labels: dict[int | None, Tensor | None] = {}
        self._extents: dict[tuple[int | None, range], tuple[Tensor, Tensor]] = {}

    def tiles(
        self, queries: TokenRanges, keys: TokenRanges, scores: Scores, score_bytes: int, *, fused: bool
    ) -> Iterator[Tile]:
        """The tiles to compute; what is hidden entirely is left out.

        `score_bytes`: of the scores of one query and one key, of all heads and sequences. `fused`: plain tiles keep no
        scores in memory, and may be of any size. Dropout needs positions, which plain masks do not have."""
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
        mask = self._visible(q, k, scores)
        if mask is None:
            return
        rows = max(1, BLOCK_BYTES // (score_bytes * len(k)))
        if rows >= len(q) or (fused and mask.is_plain()):
            yield q, k, mask
            return
        for start in range(q.start, q.stop, rows):
            own = range(start, min(start + rows, q.stop))
            # the keys that order and window leave
            first = k.start if scores.window is None else max(k.start, own.start - scores.window + 1)
            near = range(first, min(k.stop, own.stop) if self.whole.causal else k.stop)
            if near and (mask := self._visible(own, near, scores)) is not None:
                yield own, near, mask

    def _visible(self, q: range, k: range, scores: Scores) -> AttentionMask | None:
        """The mask of a tile; None if it hides everything."""
        nearest, farthest = q.start - (k.stop - 1), q.stop - 1 - k.start
        same = [self._same(chunk, q, k) for chunk in (None, scores.chunk) if self._label(chunk) is not None]
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
        """On the host, `[1 or batch, positions]`: the segment, or the chunk, of each token; None: all are in one."""
        if chunk not in self._labels:
            if chunk is None:
                label = self.whole.key_segments
            else:
                label = self.whole.key_positions
                label = (torch.arange(self.whole.num_keys)[None] if label is None else label) // chunk
            self._labels[chunk] = None if label is None else label.cpu()
        return self._labels[chunk]

    def _same(self, chunk: int | None, q: range, k: range) -> bool | None:
        """Whether all queries and keys have one label, or no query that of a key; None: some have."""
        (q_low, q_high), (k_low, k_high) = self._extent(chunk, q), self._extent(chunk, k)
        if bool(((q_high < k_low) | (k_high < q_low)).all()):
            return False
        return True if bool(((q_low == k_high) & (k_low == q_high)).all()) else None

    def _extent(self, chunk: int | None, tokens: range) -> tuple[Tensor, Tensor]:
        """The lowest and the highest label of some tokens, `[1 or batch]` each."""
        if (chunk, tokens) not in self._extents:
            label = self._label(chunk)
            assert label is not None
            low, high = label[:, tokens.start : tokens.stop].aminmax(dim=1)
            self._extents[chunk, tokens] = (low, high)
        return self._extents[chunk, tokens]


def _within(tokens: range, piece: range, start: int) -> slice:
    """Where `tokens` of a piece are in a tensor that has the piece from `start` on."""
    return slice(start + tokens.start - piece.start, start + tokens.stop - piece.start)


Tiles = Callable[[int], Iterator[Tile]]  # of this rank's queries with the keys of a rank


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Scores, ring: Ring, mask: TiledMask, token_ranges: Sequence[TokenRanges]
) -> Tensor:
    """As any core, of this rank's q, k and v; `token_ranges` are the token positions of each rank of the ring."""
    score_bytes, fused = 4 * q.shape[0] * q.shape[1], partial_attention.has_flash(q.device, scores)

    def tiles(source: int) -> Iterator[Tile]:
        return mask.tiles(token_ranges[ring.rank], token_ranges[source], scores, score_bytes, fused=fused)

    return _RingAttention.apply(q, k, v, scores.sinks, scores, ring, tiles)


class _RingAttention(Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, scores: Scores, ring: Ring, tiles: Tiles
    ) -> Tensor:
        kv, dims = torch.cat((k, v), -1), (k.shape[-1], v.shape[-1])
        merged = partial_attention.Merged(q, v.shape[-1])
        for source, (keys, values) in _steps(ring, kv, dims):
            for rows, columns, mask in tiles(source):
                inputs = q[:, :, rows], keys[:, :, columns], values[:, :, columns]
                merged.add(rows, *partial_attention.part(*inputs, mask, scores))
        if sinks is not None:
            merged.add_sinks(sinks)
        out = merged.out.to(q.dtype)
        ctx.save_for_backward(q, kv, sinks, out, merged.lse)
        ctx.scores, ctx.ring, ctx.tiles, ctx.dims = scores, ring, tiles, dims
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, kv, sinks, out, lse = ctx.saved_tensors
        grad_q = torch.zeros_like(q, dtype=torch.float32)

        def of_each_step() -> Iterator[Tensor]:
            for source, (keys, values) in _steps(ctx.ring, kv, ctx.dims):
                grad_kv = torch.zeros_like(kv, dtype=torch.float32)
                for rows, columns, mask in ctx.tiles(source):
                    of_q, *of_kv = partial_attention.gradients(
                        grad[:, :, rows],
                        q[:, :, rows],
                        keys[:, :, columns],
                        values[:, :, columns],
                        out[:, :, rows],
                        lse[:, :, rows],
                        mask,
                        ctx.scores,
                    )
                    grad_q[:, :, rows] += of_q
                    for part, found in zip(grad_kv[:, :, columns].split(ctx.dims, -1), of_kv, strict=True):
                        part += found
                yield grad_kv

        grad_k, grad_v = ctx.ring.reduce(of_each_step()).to(kv.dtype).split(ctx.dims, -1)
        grad_sinks = None if sinks is None else partial_attention.sinks_gradient(grad, out, lse, sinks)
        return grad_q.to(q.dtype), grad_k, grad_v, grad_sinks, None, None, None


def _steps(ring: Ring, kv: Tensor, dims: tuple[int, int]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """The rank whose keys and values are here, with these."""
    for source, here in zip(ring.sources(), ring.rotate(kv), strict=True):
        yield source, here.split(dims, -1)
