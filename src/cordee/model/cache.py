"""What attention needs of tokens already seen, in buffers of fixed size.

Owns the buffers and how full they are. Knows nothing of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cordee.model.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from cordee.model.span import Span


class LayerCache:
    """Keys and values of one layer, `[batch, kv_heads, max_length, head_dim]`.

    Latent attention keeps one compressed vector a token, as the key of a single head, and no values.
    """

    def __init__(
        self,
        attention: AttentionConfig | LatentAttentionConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device | None,
        tensor_ranks: int,
    ):
        if isinstance(attention, LatentAttentionConfig):
            heads, key_dim, value_dim = 1, attention.kv_lora_rank + attention.rope_head_dim, 0
        else:
            heads = max(1, attention.num_kv_heads // tensor_ranks)
            key_dim = value_dim = attention.head_dim
        self.keys = torch.zeros(batch_size, heads, max_length, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(batch_size, heads, max_length, value_dim, dtype=dtype, device=device)

    def append(self, k: Tensor, v: Tensor, start: int) -> tuple[Tensor, Tensor]:
        """Store k, v `[batch, kv_heads, seq, head_dim]` from place `start` on; all keys and values so far, as views."""
        stop = start + k.shape[2]
        self.keys[:, :, start:stop] = k
        self.values[:, :, start:stop] = v
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 `[any]`; a row may be taken several times."""
        self.keys, self.values = self.keys[rows], self.values[rows]


class KVCache:
    """One `LayerCache` a layer; `length` places are filled, `segments` are those of the filled places.

    The model appends to it in every forward and moves `length` on. `positions` and `tokens` of the filled places are
    kept for models that need them. Of the layers only those of `spans` have any room (None: all), for the heads that
    one of `tensor_ranks` has.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        *,
        spans: Sequence[Span] | None = None,
        tensor_ranks: int = 1,
    ):
        self.max_length = max_length
        self.length = 0
        self.segments: Tensor | None = None  # int64 [batch, length]; None: one segment
        self.positions: Tensor | None = None  # int64 [1 or batch, length]; None: the places
        self.tokens: Tensor | None = None  # int64 [batch, length]
        here = range(config.num_layers) if spans is None else {index for span in spans for index in span.layers}
        self.layers = [
            LayerCache(layer.attention, batch_size, max_length if index in here else 0, dtype, device, tensor_ranks)
            for index, layer in enumerate(config.layers)
        ]

    def advance(self, count: int) -> None:
        """Mark `count` further places as filled."""
        self.length += count

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows of the batch, int64 `[any]`, in the order given; a row may be taken several times."""
        for layer in self.layers:
            layer.keep(rows)
        if self.segments is not None:
            self.segments = self.segments[rows]
        if self.positions is not None and len(self.positions) > 1:
            self.positions = self.positions[rows]
        if self.tokens is not None:
            self.tokens = self.tokens[rows]

    def check_room(self, count: int) -> None:
        """Raise if `count` further tokens do not fit."""
        if self.length + count > self.max_length:
            raise ValueError(
                f"KV cache of {self.max_length} places holds {self.length} tokens and cannot take {count} more; "
                "make it with a larger max_length"
            )

    def join_segments(
        self, segments: Tensor | None, batch_size: int, count: int, device: torch.device
    ) -> Tensor | None:
        """Segments of all places once `count` tokens with `segments` `[batch, count]` are added."""
        if segments is None and self.segments is None:
            return None
        old = self.segments
        if old is None:
            old = torch.zeros(batch_size, self.length, dtype=torch.int64, device=device)
        new = segments if segments is not None else torch.zeros(batch_size, count, dtype=torch.int64, device=device)
        self.segments = torch.cat((old, new), 1)
        return self.segments

    def join_positions(self, positions: Tensor | None, count: int, device: torch.device) -> Tensor | None:
        """Positions of all places once `count` tokens at `positions` `[1 or batch, count]` are added.

        None: the places.
        """
        if positions is None and self.positions is None:
            return None
        old, new = self.positions, positions
        if old is None:
            old = torch.arange(self.length, device=device)[None]
        if new is None:
            new = torch.arange(self.length, self.length + count, device=device)[None]
        rows = max(len(old), len(new))
        self.positions = torch.cat((old.expand(rows, -1), new.expand(rows, -1)), 1)
        return self.positions

    def join_tokens(self, tokens: Tensor) -> Tensor:
        """Tokens of all places once `tokens` `[batch, count]` are added."""
        self.tokens = tokens if self.tokens is None else torch.cat((self.tokens, tokens), 1)
        return self.tokens

    def clear(self) -> None:
        """Forget everything."""
        self.length, self.segments, self.positions, self.tokens = 0, None, None, None
