"""Context parallelism: the tokens of every sequence shared out over the ranks of an axis.

Owns which rank holds which places, how tokens of a micro-batch are handed out, and how attention and mixtures of
experts come to see all tokens nevertheless. Two ways that combine: neighbours exchange heads for tokens around any
attention core (DeepSpeed-Ulysses, Jacobs et al. 2023), and what is left goes round in a ring (`ring.py`).

With `ulysses` neighbours and `ring` groups of them, a causal sequence is cut into 2 * ring chunks, of which group r
holds r and, so that all have as much to do, 2 * ring - 1 - r; its ranks hold equal parts of that pair, in order. With
one group, or if every token sees all others, groups hold one stretch each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cordee import device
from cordee.config.schema import ParallelOptions
from cordee.data.batch import Batch
from cordee.log import logger
from cordee.model.config import CapacityConfig
from cordee.model.gpt import GPTModel
from cordee.model.moe import MoE
from cordee.model.placement import after
from cordee.model.router import Routing, limit_to_capacity
from cordee.ops.attention import AttentionCore, Scores
from cordee.ops.mask import AttentionMask
from cordee.parallel import differentiable
from cordee.parallel.degrees import Degrees
from cordee.parallel.layout import Layout
from cordee.parallel.ring import Pieces, Ring, Sight, Work, ring_attention

NAME = "context parallelism"
AnyBatch = TypeVar("AnyBatch", bound=Batch)

# ---- who holds what --------------------------------------------------------------------------------------------------


def pieces(length: int, ring: int, rank: int, causal: bool) -> list[range]:
    """The places of a sequence of `length` that the group `rank` of a ring holds."""
    if ring == 1 or not causal:
        size = length // ring
        return [range(rank * size, (rank + 1) * size)]
    size = length // (2 * ring)
    return [range(chunk * size, (chunk + 1) * size) for chunk in (rank, 2 * ring - 1 - rank)]


def places(length: int, degrees: Degrees, rank: int, causal: bool) -> Tensor:
    """The places that context-parallel rank `rank` holds, int64, in order."""
    group, place = divmod(rank, degrees.ulysses)
    held = [torch.arange(piece.start, piece.stop) for piece in pieces(length, degrees.ring, group, causal)]
    return torch.cat(held).chunk(degrees.ulysses)[place]


def share(batch: AnyBatch, layout: Layout, options: ParallelOptions) -> AnyBatch:
    """This rank's tokens of `batch`, with their positions; `batch` itself if there is one rank."""
    degrees = layout.degrees
    if degrees.cp == 1:
        return batch
    batch_size, length = batch.input_ids.shape
    own = places(length, degrees, layout.axis_rank("cp"), _is_causal(options)).to(batch.input_ids.device)
    part = batch.at_tokens(own)
    return part if part.position_ids is not None else replace(part, position_ids=own.expand(batch_size, -1))


def _is_causal(options: ParallelOptions) -> bool:
    return options.cp_attention_mask_type == "causal"


# ---- putting it on ---------------------------------------------------------------------------------------------------


def apply(model: GPTModel, layout: Layout, options: ParallelOptions) -> None:
    """Let `model` compute with the tokens that `share` gives each rank. Nothing happens where there is one."""
    group = layout.group("cp")
    if group is None:
        return
    tokens = Tokens(layout, _is_causal(options))
    exchange = Exchange(layout, repeat=options.kv_head_repeat_before_uly_alltoall)
    ring = None
    if (ring_group := layout.group("ring")) is not None:
        ring = Ring(
            ring_group,
            layout.axis_rank("ring"),
            layout.degrees.ring,
            options.cp_window_size,
            options.use_cp_send_recv_overlap,
        )
        if not device.kind().flash_parts:
            logger.info("ring attention has no fused kernel on this device: a slower one does it, block by block")
    model.placement.replace("token_positions", NAME, tokens.places, compiles=True)
    model.placement.wrap("longest", NAME, after(partial(differentiable.all_reduce_max, group=group)), compiles=True)
    attention = partial(ContextAttention, tokens=tokens, exchange=exchange, ring=ring)
    for layer in model.own_layers():
        placement = layer.attention.placement
        if ring is None:
            placement.wrap("core", NAME, attention, compiles=True)
        else:  # it has an attention of its own
            placement.replace("core", NAME, attention(placement.core), compiles=True)
        if isinstance(layer.mlp, MoE):
            layer.mlp.placement.wrap(
                "reduce", NAME, after(partial(differentiable.all_reduce_fwd_identity_bwd, group=group)), compiles=True
            )
            layer.mlp.placement.replace("limit", NAME, tokens.limit, compiles=True)
    if not tokens.causal:
        logger.info("--cp-attention-mask-type full: every token sees those that it is to predict")


class Tokens:
    """The tokens of all ranks in their order in the sequence."""

    def __init__(self, layout: Layout, causal: bool):
        self.degrees = layout.degrees
        self.causal = causal
        group = layout.group("cp")
        assert group is not None
        self._group = group
        self._rank = layout.axis_rank("cp")
        self._sights: WeakKeyDictionary[AttentionMask, Sight] = WeakKeyDictionary()

    def sight(self, mask: AttentionMask, on: torch.device) -> Sight:
        """What all tokens see of each other; `mask` is this rank's of one forward, the same for all layers."""
        if mask not in self._sights:
            assert mask.in_order and mask.num_queries == mask.num_keys
            length = mask.num_keys * self.degrees.cp
            segments, positions = (None if x is None else self.join(x) for x in (mask.key_segments, mask.key_positions))
            whole = AttentionMask(
                length,
                length,
                self.causal,
                query_segments=segments,
                key_segments=segments,
                query_positions=positions,
                key_positions=positions,
            )
            self._sights[mask] = Sight(whole, on)
        return self._sights[mask]

    def join(self, x: Tensor) -> Tensor:
        """`[batch, part, ...]` of every rank to `[batch, seq, ...]`; without gradient."""
        return differentiable.all_gather(x, self._group, 1)[:, self._order(x.shape[1]).to(x.device)]

    def own(self, x: Tensor) -> Tensor:
        """This rank's part of `[batch, seq, ...]`."""
        return x[:, places(x.shape[1], self.degrees, self._rank, self.causal).to(x.device)]

    def places(self, count: int, device: torch.device) -> Tensor:
        """The places of the `count` tokens of a sequence that this rank holds, int64."""
        return places(count * self.degrees.cp, self.degrees, self._rank, self.causal).to(device)

    def pieces(self, length: int) -> list[Pieces]:
        """The places of each rank of the ring."""
        return [pieces(length, self.degrees.ring, rank, self.causal) for rank in range(self.degrees.ring)]

    def _order(self, part: int) -> Tensor:
        """Where each place is among the joined parts."""
        held = (places(part * self.degrees.cp, self.degrees, rank, self.causal) for rank in range(self.degrees.cp))
        return torch.cat(list(held)).argsort()

    @torch.no_grad()
    def limit(self, routing: Routing, capacity: CapacityConfig, batch_size: int) -> Routing:
        """As `limit_to_capacity` does with the tokens of all ranks together."""
        experts, weights = (
            self.join(x.unflatten(0, (batch_size, -1))).flatten(0, 1) for x in (routing.experts, routing.weights)
        )
        # Of the logits only their number counts.
        together = Routing(routing.logits[:1].expand(len(experts), -1), experts, weights)
        limited = limit_to_capacity(together, capacity)
        assert limited.kept is not None
        kept = self.own(limited.kept.unflatten(0, (batch_size, -1))).flatten(0, 1)
        rows = limited.rows_per_expert
        # No more of them than there are tokens here can be needed here.
        return replace(routing, kept=kept, rows_per_expert=None if rows is None else min(rows, len(kept)))


@dataclass(frozen=True)
class Exchange:
    """Heads for tokens, among the neighbours of a group."""

    layout: Layout
    repeat: bool

    @property
    def size(self) -> int:
        return self.layout.degrees.ulysses

    @property
    def rank(self) -> int:
        return self.layout.axis_rank("ulysses")

    def heads(self, x: Tensor) -> Tensor:
        """`[batch, heads, part, dim]` to some of the heads and all tokens of the group."""
        return self._exchanged(x, 1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """The way back."""
        return self._exchanged(x, 2, 1)

    def key_heads(self, x: Tensor) -> Tensor:
        """As `heads`, for keys or values, of which there may be too few: those that this rank's queries need."""
        copies = self.size // math.gcd(x.shape[1], self.size)
        if copies == 1 or self.repeat:
            return self.heads(x.repeat_interleave(copies, 1) if copies > 1 else x)
        needed = torch.arange(x.shape[1], device=x.device).repeat_interleave(copies).chunk(self.size)[self.rank]
        group = self.layout.group("ulysses")
        assert group is not None
        return differentiable.all_gather_fwd_reduce_scatter_bwd(x, group, 2).index_select(1, needed)

    def scores(self, scores: Scores, heads: int) -> Scores:
        """Those of the heads that are here, so many."""
        slopes, sinks = (None if x is None else self._own(x) for x in (scores.slopes, scores.sinks))
        dropout = scores.dropout
        dropout = dropout and replace(dropout, first_head=dropout.first_head + self.rank * heads)
        return replace(scores, slopes=slopes, sinks=sinks, dropout=dropout)

    def _own(self, of_heads):
        size = len(of_heads) // self.size
        return of_heads[self.rank * size : (self.rank + 1) * size]

    def _exchanged(self, x: Tensor, split: int, joined: int) -> Tensor:
        group = self.layout.group("ulysses")
        return x if group is None else differentiable.all_to_all_fwd_bwd(x, group, split, joined)


class ContextAttention:
    """Any core, where each rank has a part of the tokens. A ring has an attention of its own."""

    def __init__(self, core: AttentionCore, tokens: Tokens, exchange: Exchange, ring: Ring | None):
        self.core = core
        self.tokens = tokens
        self.exchange = exchange
        self.ring = ring

    @torch._disable_dynamo  # collectives, and masks that are kept from layer to layer
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
        sight = self.tokens.sight(mask, q.device)
        q, k, v = self.exchange.heads(q), self.exchange.key_heads(k), self.exchange.key_heads(v)
        scores = self.exchange.scores(scores, q.shape[1])
        if self.ring is None:
            y = self.core(q, k, v, sight.whole, scores)
        else:
            work = Work(self.ring, sight, self.tokens.pieces(sight.whole.num_keys), scores)
            y = ring_attention(q, k, v, work)
        return self.exchange.tokens(y)
