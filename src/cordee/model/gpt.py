"""The decoder: embedding, layers, final norm, head.

Owns what is computed. Knows nothing of files, families, processes or optimizers; placement and memory techniques
enter through the seams: parameter axes, the layer span and the `placement` of every module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from cordee.log import logger
from cordee.model.attention import Context
from cordee.model.balance import Balance
from cordee.model.cache import KVCache
from cordee.model.config import AttentionConfig, LatentAttentionConfig, ModelConfig, RopeConfig
from cordee.model.head import Head
from cordee.model.layer import Layer
from cordee.model.linear import Embedding, factory_kwargs
from cordee.model.low_rank import add_low_rank
from cordee.model.mask import AttentionMask
from cordee.model.noise import Noise
from cordee.model.norm import Norm
from cordee.model.parameter import ParameterSpec, parameter_specs
from cordee.model.placement import Placement, unchanged
from cordee.model.rotary import Longest, Positions, depends_on_length
from cordee.model.span import Span

Output = Callable[[Head, Tensor], Any]


def _in_order(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


@dataclass(eq=False, kw_only=True)
class ModelPlacement(Placement):
    """Where a layout gives this process other tokens than a sequence has.

    `token_positions` of as many tokens as are here, `outside_blocks` those of `[..., seq]` that are kept outside of
    blocks, `longest` the last position of a sequence from that of the part that is here.
    """

    token_positions: Callable[[int, torch.device], Tensor] = _in_order
    outside_blocks: Callable[[Tensor], Tensor] = unchanged
    longest: Longest = unchanged


class GPTModel(nn.Module):
    """A decoder-only transformer. Parameters are left unset: fill them with `initialise` or from a checkpoint.

    It builds what `spans` name, without them everything; a forward runs one of these. Parameters have the same names
    whatever is built. A head that is tied to an embedding of another process has a copy of it, under its name.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        spans: Sequence[Span] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.placement = ModelPlacement()
        self.config = config
        self.spans = tuple(spans) or (Span(0, config.num_layers),)
        factory = factory_kwargs(device, dtype)
        if self.has_embedding or self.copies_embedding:
            self.embedding = Embedding(config.vocab_size, config.hidden_size, "vocab", config.init_std, **factory)
        if self.has_embedding:
            self._build_rest_of_embedding(factory)
        self.layers = nn.ModuleDict(
            {str(i): Layer(config.layers[i], config, i, **factory) for span in self.spans for i in span.layers}
        )
        if self.has_head:
            self.final_norm = Norm(config.final_norm, config.hidden_size, **factory)
            self.head = Head(config, **factory)
            if config.tie_word_embeddings:
                self.head.weight = self.embedding.weight
        add_low_rank(self, config, {"embedding"} if self.copies_embedding else set(), **factory)
        self._changing_ropes = _changing_ropes(config)
        rates = (config.embedding_dropout, config.attention_dropout, config.hidden_dropout)
        self._has_dropout = any(rates) or any(low_rank.dropout for low_rank in config.low_rank)
        self._needs_positions = bool(self._changing_ropes) or any(
            isinstance(layer.attention, AttentionConfig) and layer.attention.chunk for layer in config.layers
        )
        _report_slow_attention(config)

    @property
    def has_embedding(self) -> bool:
        return any(span.embedding for span in self.spans)

    @property
    def has_head(self) -> bool:
        return any(span.head for span in self.spans)

    @property
    def copies_embedding(self) -> bool:
        """Whether the rows of the head are a copy of an embedding that another process has."""
        return self.config.tie_word_embeddings and self.has_head and not self.has_embedding

    def _build_rest_of_embedding(self, factory: dict) -> None:
        config = self.config
        if config.learned_positions:
            self.position_embedding = Embedding(
                config.max_position_embeddings, config.hidden_size, "position", config.init_std, **factory
            )
        if config.embedding_norm is not None:
            self.embedding_norm = Norm(config.embedding_norm, config.hidden_size, **factory)

    def forward(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        cache: KVCache | None = None,
        balance: Balance | None = None,
        noise: Noise | None = None,
        output: Output | None = None,
        span: Span | None = None,
    ) -> Any:
        """Logits `[batch, seq, vocab]`, or whatever `output(head, hidden)` makes of the last hidden states.

        `inputs` are token ids int64 `[batch, seq]`; for a span without embedding, hidden states `[batch, seq, embed]`.
        `attention_mask` `[batch, seq]` is 1 at real tokens and 0 at padding; positions then count real tokens.
        `segments` int64 `[batch, seq]` number documents that must not see each other. With a `cache` the inputs
        continue what it holds. `balance` asks mixtures of experts for their auxiliary losses. In training
        `noise` says what dropout draws (without it, torch's random numbers do). A span without head returns hidden
        states. `span` is the one to run of those that were built, needed where there are several. Hidden states that
        are only a part of a sequence, as between tensor-parallel ranks, need its `position_ids`.
        """
        span = span or self._only_span
        count = inputs.shape[1]
        given = position_ids is not None or attention_mask is not None
        if position_ids is None:
            position_ids = default_positions(inputs, attention_mask, cache)
        if attention_mask is not None:
            segments = _padding_as_segment(attention_mask, segments)
        if cache is not None:
            cache.check_room(count)
            if self._changing_ropes:
                given = True
                inputs, position_ids, segments = self._renewed(cache, inputs, position_ids, segments)
        context = self._context(inputs, position_ids, given, segments, cache, balance)
        if self.training and self._has_dropout:
            noise = noise or Noise.drawn(len(inputs), inputs.device)
            inside = self.placement.token_positions(position_ids.shape[1], inputs.device)[None]
            outside = self.placement.outside_blocks(inside)
            context = replace(context, noise=noise, places=outside, inner_places=inside)
        hidden = self._embed(inputs, context) if span.embedding else inputs
        for index in map(str, span.layers):
            hidden = self.layers[index](hidden, context)
        if cache is not None:
            cache.advance(inputs.shape[1])
            hidden = hidden[:, -count:]
        if not span.head:
            return hidden
        hidden = self.final_norm(hidden)
        return self.head.logits(hidden) if output is None else output(self.head, hidden)

    def own_layers(self) -> list[Layer]:
        """The layers that were built, in order."""
        return [layer for layer in self.layers.values() if isinstance(layer, Layer)]

    @property
    def _only_span(self) -> Span:
        assert len(self.spans) == 1, "which of the spans is to run?"
        return self.spans[0]

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Spec of every parameter by canonical name."""
        return parameter_specs(self)

    def _embed(self, input_ids: Tensor, context: Context) -> Tensor:
        hidden = self.embedding(input_ids)
        if self.config.embedding_scale != 1.0:
            # Rounded to the type of the model, as Gemma was trained.
            hidden = hidden * torch.tensor(self.config.embedding_scale, dtype=hidden.dtype).item()
        if self.config.learned_positions:
            hidden = hidden + self.position_embedding(context.positions.ids)
        if self.config.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        dropout = self.config.embedding_dropout
        if context.noise is None or not dropout:
            return hidden
        assert context.places is not None
        return context.noise.dropout(dropout, "embedding").of_tokens(hidden, context.places)

    def _context(
        self,
        inputs: Tensor,
        position_ids: Tensor,
        given: bool,
        segments: Tensor | None,
        cache: KVCache | None,
        balance: Balance | None,
    ) -> Context:
        """`given`: the positions may be others than the places."""
        batch_size, length = inputs.shape[0], position_ids.shape[-1]  # which hidden states may be a part of
        start = 0
        key_positions = position_ids if given and self._needs_positions else None
        if cache is not None:
            start = cache.length
            segments = cache.join_segments(segments, batch_size, length, inputs.device)
            key_positions = cache.join_positions(key_positions, length, inputs.device)
        mask = AttentionMask(
            length,
            start + length,
            query_segments=None if segments is None else segments[:, start:],
            key_segments=segments,
            query_positions=None if key_positions is None else key_positions[:, start:],
            key_positions=key_positions,
            num_prefix=self.config.num_prefix_tokens,
        )
        return Context(Positions(position_ids, self.training, self.placement.longest), mask, cache, balance)

    def _renewed(
        self, cache: KVCache, ids: Tensor, position_ids: Tensor, segments: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Ids, positions and segments to compute: as given, or all from the start if what `cache` holds is worthless.

        That is so where they make a sequence so long that rotary frequencies change, and with them all hidden states.
        """
        if not self.has_embedding:
            raise ValueError(
                "rotary frequencies that depend on the length need all tokens of a cached sequence, "
                "which a pipeline stage without embedding does not have: generate without a cache"
            )
        if cache.positions is not None and self._frequencies_differ(cache.positions, position_ids):
            batch_size, count = ids.shape
            segments = cache.join_segments(segments, batch_size, count, ids.device)
            joined = cache.join_positions(position_ids, count, ids.device)
            assert joined is not None
            position_ids, ids = joined, cache.join_tokens(ids)
            cache.clear()
        cache.join_tokens(ids)
        return ids, position_ids, segments

    def _frequencies_differ(self, before: Tensor, after: Tensor) -> bool:
        old, new = Positions(before, self.training), Positions(after, self.training)
        return any(bool((old.frequencies(*rope) != new.frequencies(*rope)).any()) for rope in self._changing_ropes)


def default_positions(inputs: Tensor, attention_mask: Tensor | None, cache: KVCache | None) -> Tensor:
    """Positions of `inputs` `[batch, seq, ...]` that none are given for, int64 `[1 or batch, seq]`."""
    start = 0 if cache is None else cache.length
    if start and (attention_mask is not None or (cache is not None and cache.segments is not None)):
        raise ValueError(
            "a batch with padding or several documents that continues a cache needs its position_ids: "
            "they cannot be told from the number of places"
        )
    if attention_mask is None:
        return torch.arange(start, start + inputs.shape[1], device=inputs.device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def _padding_as_segment(attention_mask: Tensor, segments: Tensor | None) -> Tensor:
    """Padding becomes a segment of its own (-1): real tokens never see it, and no row of the mask is empty."""
    real = torch.zeros_like(attention_mask, dtype=torch.int64) if segments is None else segments
    return real.masked_fill(attention_mask == 0, -1)


def _changing_ropes(config: ModelConfig) -> set[tuple[RopeConfig, int]]:
    """The rotary positions whose frequencies depend on the length, each with its head_dim."""
    found = set()
    for layer in config.layers:
        attention = layer.attention
        rope = attention.rope
        if rope is not None and depends_on_length(rope):
            latent = isinstance(attention, LatentAttentionConfig)
            found.add((rope, attention.rope_head_dim if latent else attention.head_dim))
    return found


def _report_slow_attention(config: ModelConfig) -> None:
    if any(isinstance(a := layer.attention, AttentionConfig) and a.softcap is not None for layer in config.layers):
        logger.info("attention scores have a softcap, which torch's fused attention lacks: a slower one does it")
