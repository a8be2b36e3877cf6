"""What attention needs of tokens already seen.

Owns how many tokens each row of a batch holds, what a mask must know of them, and where their keys and values lie. A
forward extends a cache by its tokens and every layer lets the cache do its attention, so that pages, sliding windows
and shared prefixes are further caches and not further forwards. Knows nothing of sampling."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from cordee.model.config import AttentionConfig, LatentAttentionConfig, ModelConfig
from cordee.model.span import Span
from cordee.ops.mask import AttentionMask

Core = Callable[[Tensor, Tensor, Tensor, AttentionMask], Tensor]  # an attention core that has its scores


class CacheStep:
    """The tokens of one forward, `[batch, num_tokens]`, and where they go in the rows of a cache.

    Row i holds `lengths[i]` tokens before and `counts[i]` more after; padding, where `real` is False, is not kept."""

    def __init__(self, cache: "Cache", num_tokens: int, real: Tensor | None, device: torch.device):
        self.cache = cache
        self.lengths = cache.lengths
        self.num_tokens = num_tokens
        self.counts: list[int] = [num_tokens] * len(self.lengths) if real is None else real.sum(1).tolist()
        self.real = None if min(self.counts) == num_tokens else real
        self.filled = max(map(int.__add__, self.lengths, self.counts))  # tokens of the longest row
        self.is_first = not any(self.lengths)  # no row holds anything yet
        self.alike = self.real is None and min(self.lengths) == max(self.lengths)  # all rows take the same indices
        self.device = device
        self._expanded: dict[torch.Size, Tensor] = {}

    @cached_property
    def indices(self) -> Tensor:
        """The index in its row of each token, int64 `[1 or batch, num_tokens]`; padding has any."""
        if self.alike:
            return torch.arange(self.lengths[0], self.filled, device=self.device)[None]
        lengths = torch.tensor([[length] for length in self.lengths], device=self.device)
        if self.real is None:
            return lengths if self.num_tokens == 1 else lengths + torch.arange(self.num_tokens, device=self.device)
        indices = lengths + (self.real.cumsum(1) - 1).clamp(min=0)
        return indices.clamp(max=self.cache.max_length - 1)  # padding behind a full row

    def expanded_indices(self, shape: torch.Size) -> Tensor:
        """`indices` in the shape of keys and values, as `Cache.append` takes them; layers of one shape share them."""
        if shape not in self._expanded:
            self._expanded[shape] = self.indices.view(-1, 1, 1, self.num_tokens, 1).expand(shape)
        return self._expanded[shape]

    @cached_property
    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Row, column and index in its row of every token that is kept: int64 `[tokens]`, or broadcastable."""
        if self.real is not None:
            rows, columns = self.real.nonzero(as_tuple=True)
            return rows, columns, self.indices[rows, columns]
        rows = torch.arange(len(self.lengths), device=self.device)[:, None]
        return rows, torch.arange(self.num_tokens, device=self.device)[None], self.indices

    @cached_property
    def mask(self) -> AttentionMask:
        """What the tokens see of all tokens in the cache."""
        return self.mask_over(None)

    def mask_over(self, keys: Tensor | None) -> AttentionMask:
        """What the tokens see of keys with these indices, int64 `[1 or batch, any]`; one beyond the row is hidden.

        None: all that are filled, in order."""
        noted, notes = {}, self.cache.notes
        for name in notes.keys() & {"segments", "positions"}:
            note = notes[name]
            noted[f"query_{name}"] = _at(note, self.indices)
            noted[f"key_{name}"] = note[:, : self.filled] if keys is None else _at(note, keys)
        count = self.filled if keys is None else keys.shape[1]
        index = None if keys is None and self.alike else self.indices
        return AttentionMask(self.num_tokens, count, query_index=index, key_index=keys, **noted)


def _at(note: Tensor, indices: Tensor) -> Tensor:
    """The entries of a note `[batch, max_length]` with `indices` `[1 or batch, any]`; of indices beyond, any entry."""
    return note.gather(1, indices.clamp(max=note.shape[1] - 1).expand(len(note), -1))


class Cache(ABC):
    """Tokens already seen: `lengths[i]` of them in row i, at most `max_length`.

    `notes` are what models need to know of them besides keys and values: "segments", "positions" and "tokens", int64
    `[batch, max_length]`; segments that are not noted are all one, positions are the indices."""

    def __init__(self, batch_size: int, max_length: int):
        self.max_length = max_length
        self.lengths = [0] * batch_size  # on the host, so that no step waits for a device
        self.notes: dict[str, Tensor] = {}

    @abstractmethod
    def append(self, layer: int, kv: Tensor, step: CacheStep) -> None:
        """Keep keys and then values, `[batch, kv_heads, 2, num_tokens, head_dim]`, of the tokens of `step`.

        `[batch, kv_heads, 1, ...]` where one vector a token is both, as of latent attention."""

    @abstractmethod
    def attend(self, layer: int, q: Tensor, kv: Tensor, step: CacheStep, core: Core) -> Tensor:
        """`append`, then `core` of q `[batch, heads, num_tokens, head_dim]` over all that the rows hold."""

    def extend(self, num_tokens: int, real: Tensor | None, device: torch.device) -> CacheStep:
        """Begin a forward of so many tokens a row; `real` `[batch, num_tokens]` is 0 at padding (None: there is none).

        ValueError if they do not fit."""
        step = CacheStep(self, num_tokens, real, device)
        if step.filled > self.max_length:
            raise ValueError(
                f"KV cache for {self.max_length} tokens holds {max(self.lengths)} tokens and cannot take "
                f"{max(step.counts)} more; make it with a larger max_length"
            )
        self.lengths = list(map(int.__add__, step.lengths, step.counts))
        return step

    def note(self, name: str, values: Tensor | None, step: CacheStep) -> None:
        """Remember `values` `[1 or batch, num_tokens]` of the tokens of `step`; None: nothing new."""
        if values is not None:
            rows, columns, indices = step.kept
            self.notes[name] = self.noted(name, values.device)
            self.notes[name][rows, indices] = values.expand(len(self.lengths), -1)[rows, columns]

    def noted(self, name: str, device: torch.device) -> Tensor:
        """A note, int64 `[batch, max_length]`, also where nothing was noted."""
        if (note := self.notes.get(name)) is not None:
            return note
        note = torch.zeros(len(self.lengths), self.max_length, dtype=torch.int64, device=device)
        return note + torch.arange(self.max_length, device=device) if name == "positions" else note

    def keep(self, rows: Tensor) -> None:
        """Select rows of the batch, int64 `[any]`, in the order given; a row may be selected several times."""
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.notes = {name: note[rows] for name, note in self.notes.items()}

    def join(self, other: Self) -> None:
        """Take the rows of another cache of this kind and size as further rows."""
        assert other.max_length == self.max_length, f"{other.max_length} tokens join {self.max_length}"
        for name in self.notes.keys() | other.notes.keys():
            device = next(note.device for cache in (self, other) for note in cache.notes.values())
            own, more = (cache.noted(name, device) for cache in (self, other))
            self.notes[name] = torch.cat((own, more))
        self.lengths = self.lengths + other.lengths

    def clear(self) -> None:
        """Forget all tokens of all rows."""
        self.lengths, self.notes = [0] * len(self.lengths), {}


class KVCache(Cache):
    """The plain cache, and reference of others: a buffer `[batch, kv_heads, 1 or 2, max_length, dim]` for every layer.

    Of the layers only those of `spans` have any room (None: all), for the heads that one of `tensor_ranks` has."""

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
        super().__init__(batch_size, max_length)
        here = range(config.num_layers) if spans is None else {index for span in spans for index in span.layers}
        self.buffers: list[Tensor] = []
        for index, layer in enumerate(config.layers):
            heads, slots, dim = kept_shape(layer.attention, tensor_ranks)
            shape = batch_size, heads, slots, max_length if index in here else 0, dim
            self.buffers.append(torch.zeros(shape, dtype=dtype, device=device))

    def append(self, layer: int, kv: Tensor, step: CacheStep) -> None:
        buffer = self.buffers[layer]
        if step.alike:
            buffer.narrow(3, step.lengths[0], step.num_tokens).copy_(kv)
        elif step.real is None:
            buffer.scatter_(3, step.expanded_indices(kv.shape), kv)
        else:
            rows, columns, indices = step.kept
            buffer[rows, :, :, indices] = kv[rows, :, :, columns]

    def attend(self, layer: int, q: Tensor, kv: Tensor, step: CacheStep, core: Core) -> Tensor:
        self.append(layer, kv, step)
        held = self.buffers[layer].narrow(3, 0, step.filled).unbind(2)
        return core(q, held[0], held[-1], step.mask)

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        self.buffers = [buffer[rows] for buffer in self.buffers]

    def join(self, other: Self) -> None:
        super().join(other)
        self.buffers = list(map(torch.cat, zip(self.buffers, other.buffers, strict=True)))


def kept_shape(attention: AttentionConfig | LatentAttentionConfig, tensor_ranks: int = 1) -> tuple[int, int, int]:
    """Heads, vectors a head and their dim of what a layer keeps of a token on one of so many tensor-parallel ranks.

    Latent attention keeps one compressed vector as that of a single head, any other a key and a value for every head.
    """
    if isinstance(attention, LatentAttentionConfig):
        return 1, 1, attention.kv_lora_rank + attention.rope_head_dim
    return max(1, attention.num_kv_heads // tensor_ranks), 2, attention.head_dim
