"""Context parallelism: the tokens of every sequence sharded over the ranks of an axis.

Two ways that combine: an all-to-all over heads and sequence around any attention core (DeepSpeed-Ulysses, Jacobs et
al. 2023), and ring attention (`ring.py`). With `ulysses` neighbours and `ring` groups of them, a causal sequence is cut
into 2 * ring chunks, of which group r holds r and, for balance, 2 * ring - 1 - r; its ranks hold equal parts of that
pair, in order. With one group, or if every token sees all others, each group holds one stretch.

Options: `--context-parallel-*`, `--cp-*`, `--ulysses-degree-in-cp` (options.py). Law: `laws.context`. Cost: none
of its own; context-parallel ranks shard parameters as data-parallel ranks do (`cost.py`). Owns which rank holds which
token positions, the shard of a micro-batch, and `apply`, by which attention and MoE layers see all tokens."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from cordee import device
from cordee.data.batch import Batch
from cordee.log import logger
from cordee.model.config import CapacityConfig
from cordee.model.gpt import GPTModel
from cordee.model.moe import MoE
from cordee.model.placement import after
from cordee.model.router import Routing, limit_to_capacity
from cordee.ops.attention import AttentionCore, Scores
from cordee.ops.mask import AttentionMask
from cordee.parallel import collectives, differentiable
from cordee.parallel.degrees import Degrees
from cordee.parallel.layout import Layout
from cordee.parallel.options import ParallelOptions
from cordee.parallel.ring import Ring, TiledMask, TokenRanges, ring_attention

NAME = "context parallelism"
AnyBatch = TypeVar("AnyBatch", bound=Batch)


def token_ranges(length: int, ring: int, rank: int, causal: bool) -> list[range]:
    """The token positions of a sequence of `length` that group `rank` of a ring holds."""
    if ring == 1 or not causal:
        size = length // ring
        return [range(rank * size, (rank + 1) * size)]
    size = length // (2 * ring)
    return [range(chunk * size, (chunk + 1) * size) for chunk in (rank, 2 * ring - 1 - rank)]


def positions(length: int, degrees: Degrees, rank: int, causal: bool) -> Tensor:
    """The token positions that context-parallel rank `rank` holds, int64, in order."""
    group, neighbour = divmod(rank, degrees.ulysses)
    held = [torch.arange(piece.start, piece.stop) for piece in token_ranges(length, degrees.ring, group, causal)]
    return torch.cat(held).chunk(degrees.ulysses)[neighbour]


def shard(batch: AnyBatch, layout: Layout, options: ParallelOptions) -> AnyBatch:
    """This rank's tokens of `batch`, with their positions; `batch` itself if there is one rank."""
    degrees = layout.degrees
    if degrees.cp == 1:
        return batch
    batch_size, length = batch.input_ids.shape
    own = positions(length, degrees, layout.axis_rank("cp"), _is_causal(options)).to(batch.input_ids.device)
    part = batch.at("token", own)
    return part if part.position_ids is not None else replace(part, position_ids=own.expand(batch_size, -1))


def part(whole: Tensor, layout: Layout, options: ParallelOptions) -> Tensor:
    """This rank's tokens of `[..., tokens]` of whole sequences."""
    if (degrees := layout.degrees).cp == 1:
        return whole
    own = positions(whole.shape[-1], degrees, layout.axis_rank("cp"), _is_causal(options))
    return whole[..., own.to(whole.device)]


def whole(part: Tensor, layout: Layout, options: ParallelOptions) -> Tensor:
    """`[..., tokens]` of whole sequences, of which this rank has those that `shard` gives it."""
    if (degrees := layout.degrees).cp == 1:
        return part
    length = part.shape[-1] * degrees.cp
    joined = part.new_zeros(*part.shape[:-1], length)
    joined[..., positions(length, degrees, layout.axis_rank("cp"), _is_causal(options)).to(part.device)] = part
    return collectives.sum_over(joined, layout, ("cp",))


def _is_causal(options: ParallelOptions) -> bool:
    return options.cp_attention_mask_type == "causal"


def apply(model: GPTModel, layout: Layout, options: ParallelOptions) -> None:
    """Let `model` compute with the tokens that `shard` gives each rank. Nothing happens where there is one."""
    group, degrees = layout.group("cp"), layout.degrees
    if group is None:
        return
    tokens = ShardedTokens(degrees, group, layout.axis_rank("cp"), _is_causal(options))
    repeat = options.kv_head_repeat_before_uly_alltoall
    ulysses = Ulysses(layout.group("ulysses"), layout.axis_rank("ulysses"), degrees.ulysses, repeat)
    ring = None
    if (ring_group := layout.group("ring")) is not None:
        window, overlap = options.cp_window_size, options.use_cp_send_recv_overlap
        ring = Ring(ring_group, layout.axis_rank("ring"), degrees.ring, window, overlap)
        if not device.kind().flash_parts:
            logger.info("ring attention has no fused kernel on this device: a slower one does it, block by block")
    model.placement.replace("token_positions", NAME, tokens.positions, compiles=True)
    model.placement.wrap("longest", NAME, after(partial(differentiable.all_reduce_max, group=group)), compiles=True)
    attention = partial(ContextAttention, tokens=tokens, ulysses=ulysses, ring=ring)
    for layer in model.own_layers():
        placement = layer.attention.placement
        if ring is None:
            placement.wrap("core", NAME, attention, compiles=True)
        else:  # which is an attention of its own
            placement.replace("core", NAME, attention(placement.core), compiles=True)
        if isinstance(layer.mlp, MoE):
            reduce = partial(differentiable.all_reduce_fwd_identity_bwd, group=group)
            layer.mlp.placement.wrap("reduce", NAME, after(reduce), compiles=True)
            layer.mlp.placement.replace("limit", NAME, tokens.limit, compiles=True)
    if not tokens.causal:
        logger.info("--cp-attention-mask-type full: every token sees those that it is to predict")


class ShardedTokens:
    """The tokens of all context-parallel ranks, seen from this one."""

    def __init__(self, degrees: Degrees, group: ProcessGroup, rank: int, causal: bool):
        self.causal = causal
        self._degrees = degrees
        self._group = group
        self._rank = rank
        self._masks: WeakKeyDictionary[AttentionMask, TiledMask] = WeakKeyDictionary()

    def whole_mask(self, mask: AttentionMask, on: torch.device) -> TiledMask:
        """The mask over all tokens; `mask` is this rank's of one forward, the same for all layers."""
        if mask not in self._masks:
            assert mask.in_order and mask.num_queries == mask.num_keys
            length = mask.num_keys * self._degrees.cp
            segments, positions = (None if x is None else self.join(x) for x in (mask.key_segments, mask.key_positions))
            both: dict[str, Any] = {"query_segments": segments, "query_positions": positions}
            both |= {"key_segments": segments, "key_positions": positions}
            self._masks[mask] = TiledMask(AttentionMask(length, length, self.causal, **both), on)
        return self._masks[mask]

    def join(self, x: Tensor) -> Tensor:
        """`[batch, part, ...]` of every rank to `[batch, seq, ...]`; without gradient."""
        length = x.shape[1] * self._degrees.cp
        held = [positions(length, self._degrees, rank, self.causal) for rank in range(self._degrees.cp)]
        return differentiable.all_gather(x, self._group, 1)[:, torch.cat(held).argsort().to(x.device)]

    def positions(self, count: int, device: torch.device) -> Tensor:
        """The positions of the `count` tokens of a sequence that this rank holds, int64."""
        return positions(count * self._degrees.cp, self._degrees, self._rank, self.causal).to(device)

    def token_ranges(self, length: int) -> list[TokenRanges]:
        """The token positions of each rank of the ring."""
        return [token_ranges(length, self._degrees.ring, rank, self.causal) for rank in range(self._degrees.ring)]

    @torch.no_grad()
    def limit(self, routing: Routing, capacity: CapacityConfig, batch_size: int) -> Routing:
        """As `limit_to_capacity` of the tokens of all ranks together."""
        own = (x.unflatten(0, (batch_size, -1)) for x in (routing.experts, routing.weights))
        experts, weights = (self.join(x).flatten(0, 1) for x in own)
        # Of the logits only their number counts.
        limited = limit_to_capacity(Routing(routing.logits[:1].expand(len(experts), -1), experts, weights), capacity)
        assert limited.kept is not None
        kept = limited.kept.unflatten(0, (batch_size, -1))
        here = self.positions(kept.shape[1] // self._degrees.cp, kept.device)
        kept, rows = kept[:, here].flatten(0, 1), limited.rows_per_expert
        # This rank needs no more rows than it has tokens.
        return replace(routing, kept=kept, rows_per_expert=None if rows is None else min(rows, len(kept)))


@dataclass(frozen=True)
class Ulysses:
    """All-to-all over heads and sequence, among the neighbours of a `group`; None is one rank.

    `repeat`: key and value heads that the ranks do not divide are repeated before it, else gathered."""

    group: ProcessGroup | None
    rank: int
    size: int
    repeat: bool

    def heads(self, x: Tensor) -> Tensor:
        """`[batch, heads, part, dim]` to some of the heads and all tokens of the group."""
        return x if self.group is None else differentiable.all_to_all_fwd_bwd(x, self.group, 1, 2)

    def tokens(self, x: Tensor) -> Tensor:
        """The inverse of `heads`."""
        return x if self.group is None else differentiable.all_to_all_fwd_bwd(x, self.group, 2, 1)

    def key_heads(self, x: Tensor) -> Tensor:
        """As `heads`, for keys or values, of which there may be too few: those that this rank's queries need."""
        copies = self.size // math.gcd(x.shape[1], self.size)
        if copies == 1 or self.repeat:
            return self.heads(x.repeat_interleave(copies, 1) if copies > 1 else x)
        needed = torch.arange(x.shape[1], device=x.device).repeat_interleave(copies).chunk(self.size)[self.rank]
        assert self.group is not None
        return differentiable.all_gather_fwd_reduce_scatter_bwd(x, self.group, 2).index_select(1, needed)

    def scores(self, scores: Scores, heads: int) -> Scores:
        """Those of this rank's `heads` heads."""
        first, dropout = self.rank * heads, scores.dropout
        slopes, sinks = (None if x is None else x[first : first + heads] for x in (scores.slopes, scores.sinks))
        dropout = dropout and replace(dropout, first_head=dropout.first_head + first)
        return replace(scores, slopes=slopes, sinks=sinks, dropout=dropout)


@dataclass(frozen=True, eq=False)
class ContextAttention:
    """Any core, or the ring's own attention, where each rank has a part of the tokens."""

    core: AttentionCore
    tokens: ShardedTokens
    ulysses: Ulysses
    ring: Ring | None

    @torch._disable_dynamo  # collectives, and masks that are kept from layer to layer
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scores: Scores) -> Tensor:
        tiled = self.tokens.whole_mask(mask, q.device)
        q, k, v = self.ulysses.heads(q), self.ulysses.key_heads(k), self.ulysses.key_heads(v)
        scores = self.ulysses.scores(scores, q.shape[1])
        if self.ring is None:
            y = self.core(q, k, v, tiled.whole, scores)
        else:
            y = ring_attention(q, k, v, scores, self.ring, tiled, self.tokens.token_ranges(tiled.whole.num_keys))
        return self.ulysses.tokens(y)
