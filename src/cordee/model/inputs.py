"""What a forward needs before its first layer: positions, padding, what the cache holds, dropout randomness.

Owns how the arguments of `GPTModel.forward` become one `Context` for all layers. Knows nothing of what layers compute.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cordee.model.balance import Balance
from cordee.model.cache import Cache, CacheStep
from cordee.model.config import AttentionConfig, ModelConfig, RopeConfig
from cordee.model.placement import Placement, unchanged
from cordee.model.rotary import Longest, Positions, depends_on_length
from cordee.ops.attention import AttentionCore, Scores
from cordee.ops.dropout import Dropout, DropoutRNG
from cordee.ops.mask import AttentionMask


@dataclass(frozen=True, eq=False)
class Context:
    """What all layers of one forward share: positions, mask, in generation the cache, in training router losses.

    `mask` is over the tokens of this forward; the cache masks those that it holds."""

    positions: Positions
    mask: AttentionMask
    step: CacheStep | None = None  # with a cache: these tokens in it
    balance: Balance | None = None
    dropout_rng: DropoutRNG | None = None
    residual_indices: Tensor | None = None  # with dropout, int64 [1, seq]: which tokens of a sequence are here between
    block_indices: Tensor | None = None  # blocks, and which within them

    @property
    def continues(self) -> bool:
        """Whether the tokens follow others, which only a cache has."""
        return self.step is not None and not self.step.is_first

    def attend(self, layer: int, core: AttentionCore, q: Tensor, k: Tensor, v: Tensor | None, scores: Scores) -> Tensor:
        """Attention of `core`, over the tokens of this forward and those in the cache; v None: k is the values too."""
        if (step := self.step) is not None:
            kv = k[:, :, None] if v is None else torch.stack((k, v), 2)
            if not step.is_first:
                return step.cache.attend(layer, q, kv, step, lambda q, k, v, mask: core(q, k, v, mask, scores))
            step.cache.append(layer, kv, step)
        return core(q, k, k if v is None else v, self.mask, scores)

    def dropout(self, rate: float, *site: str | int, first_head: int = 0) -> Dropout | None:
        """Dropout at one `site` of the model; None in evaluation."""
        rng = self.dropout_rng
        return rng.dropout(rate, *site, first_head=first_head) if rng is not None and rate else None

    def drop(self, x: Tensor, rate: float, *site: str | int, first: int = 0, residual: bool = False) -> Tensor:
        """x `[batch, seq, channels]` with `dropout`: of the `residual` stream, or within a block, maybe after a prefix.

        `first` is the number of the first channel that is here."""
        dropout = self.dropout(rate, *site)
        if dropout is None:
            return x
        indices = self.residual_indices if residual else self.block_indices
        assert indices is not None
        prefix = torch.arange(indices.shape[1] - x.shape[1], 0, device=x.device)[None]
        return dropout.of_tokens(x, torch.cat((prefix, indices), 1), first)


@dataclass(eq=False, kw_only=True)
class ModelPlacement(Placement):
    """Where a layout gives this process other tokens than a sequence has.

    `token_positions` are those of as many tokens as are here, `outside_blocks` selects those of `[..., seq]` that are
    here between blocks, `longest` is the last position of a sequence from that of the part that is here."""

    token_positions: Callable[[int, torch.device], Tensor] = lambda count, device: torch.arange(count, device=device)
    outside_blocks: Callable[[Tensor], Tensor] = unchanged
    longest: Longest = unchanged


class Inputs:
    """How the arguments of a model's forward become the `Context` of its layers; see `GPTModel.forward` for what they
    are."""

    def __init__(self, config: ModelConfig):
        rates = (config.embedding_dropout, config.attention_dropout, config.hidden_dropout)
        self._behind = config.num_prefix_tokens  # a prefix, as PEFT counts positions
        self._has_dropout = any(rates) or any(low_rank.dropout for low_rank in config.low_rank)
        self._changing_ropes = _changing_ropes(config)
        self._needs_positions = bool(self._changing_ropes) or any(
            isinstance(layer.attention, AttentionConfig) and layer.attention.chunk for layer in config.layers
        )

    def prepare(
        self,
        inputs: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        segments: Tensor | None,
        cache: Cache | None,
        balance: Balance | None,
        dropout_rng: DropoutRNG | None,
        training: bool,
        placement: ModelPlacement,
    ) -> tuple[Tensor, Context]:
        """The inputs of the layers and their context.

        All tokens of the cache come before the inputs if its keys are no longer valid."""
        real = None if attention_mask is None else attention_mask != 0
        step = None
        if cache is not None:
            inputs, real, position_ids, segments = self._with_cached(cache, inputs, real, position_ids, segments)
            step = cache.extend(inputs.shape[1], real, inputs.device)
            cache.note("segments", segments, step)
            cache.note("positions", position_ids if self._needs_positions else None, step)
            cache.note("tokens", inputs if self._changing_ropes else None, step)
        given = position_ids is not None or real is not None
        if position_ids is None:
            position_ids = _next_positions(inputs, real) if step is None else step.indices
        if real is not None:
            # Padding becomes a segment of its own: real tokens never see it, and no row of the mask is empty.
            segments = torch.zeros_like(real, dtype=torch.int64) if segments is None else segments
            segments = segments.masked_fill(~real, -1)
        count = position_ids.shape[-1]  # of which hidden states may be a part
        key_positions = position_ids if given and self._needs_positions else None
        index = None if step is None or step.alike else step.indices
        mask = AttentionMask(count, count, True, segments, segments, index, index, key_positions, key_positions)
        residual_indices = block_indices = None
        if training and self._has_dropout:
            dropout_rng = dropout_rng or DropoutRNG.drawn(len(inputs), inputs.device)
            block_indices = placement.token_positions(count, inputs.device)[None]
            residual_indices = placement.outside_blocks(block_indices)
        else:
            dropout_rng = None
        positions = Positions(position_ids + self._behind, training, placement.longest)
        return inputs, Context(positions, mask, step, balance, dropout_rng, residual_indices, block_indices)

    def _with_cached(
        self, cache: Cache, inputs: Tensor, real: Tensor | None, position_ids: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The arguments, with all the cache's tokens if a row got so long that RoPE changes: it is then empty."""
        given = inputs, real, position_ids, segments
        if self._changing_ropes and inputs.is_floating_point():
            raise ValueError(
                "rotary frequencies that depend on the length need all tokens of a cached sequence, "
                "which a pipeline stage without embedding does not have: generate without a cache"
            )
        if not (held := max(cache.lengths)):
            return given
        if position_ids is None and "segments" in cache.notes:
            raise ValueError(
                "a batch of several documents that continues a cache needs its position_ids: "
                "they do not follow from the number of tokens"
            )
        if not self._changing_ropes:
            return given
        lengths = torch.tensor(cache.lengths, device=inputs.device)[:, None]
        old_real = torch.arange(held, device=inputs.device) < lengths  # [batch, held]
        old_positions = cache.noted("positions", inputs.device)[:, :held] * old_real
        positions = lengths + _next_positions(inputs, real) if position_ids is None else position_ids
        if not self._frequencies_differ(old_positions, positions):
            return given
        old_tokens, old_segments = (cache.noted(name, inputs.device)[:, :held] for name in ("tokens", "segments"))
        if segments is not None or "segments" in cache.notes:
            segments = torch.cat((old_segments, torch.zeros_like(inputs) if segments is None else segments), 1)
        if real is not None or min(cache.lengths) < held:
            real = torch.cat((old_real, torch.ones_like(inputs, dtype=torch.bool) if real is None else real), 1)
        cache.clear()
        positions = torch.cat((old_positions, positions.expand_as(inputs)), 1)
        return torch.cat((old_tokens, inputs), 1), real, positions, segments

    def _frequencies_differ(self, before: Tensor, after: Tensor) -> bool:
        old, new = Positions(before + self._behind), Positions(after + self._behind)
        return any(bool((old.frequencies(*rope) != new.frequencies(*rope)).any()) for rope in self._changing_ropes)


def _next_positions(inputs: Tensor, real: Tensor | None) -> Tensor:
    """Positions of `inputs` `[batch, seq, ...]` from 0 on, int64 `[1 or batch, seq]`; padding is not counted."""
    if real is None:
        return torch.arange(inputs.shape[1], device=inputs.device)[None]
    return (real.cumsum(-1) - 1).clamp(min=0)


def _changing_ropes(config: ModelConfig) -> set[tuple[RopeConfig, int]]:
    """The rotary positions whose frequencies depend on the length, each with its head_dim."""
    dims = {each.attention: getattr(each.attention, "rope_head_dim", each.attention.key_dim) for each in config.layers}
    return {(a.rope, dim) for a, dim in dims.items() if a.rope is not None and depends_on_length(a.rope)}
