"""Which key a query may see, and how far apart they are: one description for every attention core.

Owns order, segments, causality and reach; each core renders what it can use (nothing, a flag, a dense mask). Knows
nothing of heads or layers: a window or chunk belongs to the layer, which passes it to the core."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionMask:
    """Query i sees key j iff both lie in one segment, j is not later (`causal`), within the window and the chunk.

    Queries are the last `num_queries` of `num_keys` tokens unless `query_index` and, where keys are not in order,
    `key_index` give their indices in the sequence: int64 `[tokens]`, or `[batch, tokens]` where rows differ. Segments
    are int64 `[batch, tokens]`; None is one segment. Positions are int64 `[1 or batch, tokens]`; None: the indices.

    `window` w hides keys w or more indices back; `chunk` c hides keys whose position lies in other c positions.

    `num_prefix` virtual keys come before the `num_keys`; every query sees them, at no distance."""

    num_queries: int
    num_keys: int
    causal: bool = True
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    query_index: Tensor | None = None
    key_index: Tensor | None = None
    query_positions: Tensor | None = None
    key_positions: Tensor | None = None
    num_prefix: int = 0
    _rendered: dict[tuple, Tensor] = field(default_factory=dict, init=False, repr=False)
    _behind: "dict[int, AttentionMask]" = field(default_factory=dict, init=False, repr=False)

    @property
    def in_order(self) -> bool:
        """Whether indices follow one another."""
        return self.query_index is None and not self.num_prefix

    def behind(self, num_prefix: int) -> "AttentionMask":
        """As this one, with so many virtual keys before the others; made once."""
        if num_prefix not in self._behind:
            self._behind[num_prefix] = replace(self, num_prefix=num_prefix)
        return self._behind[num_prefix]

    def is_plain(self, window: int | None = None, chunk: int | None = None) -> bool:
        """Whether order alone decides: tokens in sequence, no segments, window and chunk reach every key."""
        return self.in_order and self.query_segments is None and self._reach(window, chunk) == (None, None)

    @cached_property
    def segment_spans(self) -> list[list[tuple[int, int]]] | None:
        """Begin and end of the segments of every row, where each is a run of tokens that see themselves alone and all
        of them together have at most half of all pairs; else None."""
        segments = self.query_segments
        whole = self.in_order and self.causal and self.num_queries == self.num_keys and self.key_positions is None
        if segments is None or segments is not self.key_segments or not whole:
            return None
        rows = []
        for row in segments.tolist():
            rows.append(list(pairwise([0, *(i for i in range(1, len(row)) if row[i] != row[i - 1]), len(row)])))
            if len({row[begin] for begin, _ in rows[-1]}) < len(rows[-1]):
                return None  # a segment of several runs
        pairs = sum((end - begin) ** 2 for row in rows for begin, end in row)
        return rows if 2 * pairs <= len(rows) * self.num_keys**2 else None

    def dense(self, device: torch.device, window: int | None = None, chunk: int | None = None) -> Tensor:
        """Bool mask, True where visible: `[1 or batch, 1, num_queries, num_prefix + num_keys]`; made once a reach."""
        key = reach = self._reach(window, chunk)
        if key not in self._rendered:
            visible = self._visible(device, *reach)
            self._rendered[key] = F.pad(visible, (self.num_prefix, 0), value=True) if self.num_prefix else visible
        return self._rendered[key]

    def bias(
        self,
        slopes: tuple[float, ...] | None,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """A term of the scores, of the shape of `dense` for every head: -slope * distance, or -inf if hidden.

        One slope a head; None: 0 for all heads. Made once for each reach."""
        key = (slopes, dtype, *self._reach(window, chunk))
        if key not in self._rendered:
            term: Tensor | float = 0.0
            if slopes is not None:
                distance = F.pad(self._distance(device).float(), (self.num_prefix, 0))
                term = (distance * -torch.tensor(slopes, device=device)[:, None, None]).to(dtype)
            self._rendered[key] = torch.where(self.dense(device, window, chunk), term, float("-inf")).to(dtype)
        return self._rendered[key]

    def _reach(self, window: int | None, chunk: int | None) -> tuple[int | None, int | None]:
        """`window` and `chunk`, or None where they hide nothing; positions that were given may begin anywhere."""
        if window is not None and window >= self.num_keys and self.in_order:
            window = None
        if chunk is not None and chunk >= self.num_keys and self.in_order and self.key_positions is None:
            chunk = None
        return window, chunk

    def indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Indices of queries `[num_queries]` and of keys `[num_prefix + num_keys]`, or those of every row.

        Those of the prefix are negative."""
        query, key = self._indices(device)
        if self.num_prefix:
            key = torch.cat((torch.arange(-self.num_prefix, 0, device=device).expand(*key.shape[:-1], -1), key), -1)
        return query, key

    def _indices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Without the prefix."""
        key = torch.arange(self.num_keys, device=device) if self.key_index is None else self.key_index
        query = key[self.num_keys - self.num_queries :] if self.query_index is None else self.query_index
        return query, key

    def block(self, queries: range, keys: range, device: torch.device) -> "AttentionMask":
        """Of a mask of tokens in order: the part for some of the queries and some of the keys."""
        of_queries, of_keys = slice(queries.start, queries.stop), slice(keys.start, keys.stop)
        segments, positions = self.key_segments, self.key_positions
        return AttentionMask(
            len(queries),
            len(keys),
            self.causal,
            query_index=torch.arange(queries.start, queries.stop, device=device),
            key_index=torch.arange(keys.start, keys.stop, device=device),
            query_segments=None if segments is None else segments[:, of_queries],
            key_segments=None if segments is None else segments[:, of_keys],
            query_positions=None if positions is None else positions[:, of_queries],
            key_positions=None if positions is None else positions[:, of_keys],
        )

    def _distance(self, device: torch.device) -> Tensor:
        """How far back from each query each key is, `[1 or batch, 1, num_queries, num_keys]`."""
        query, key = self._indices(device)
        return (query.unsqueeze(-1) - key.unsqueeze(-2)).view(-1, 1, self.num_queries, self.num_keys)

    def _visible(self, device: torch.device, window: int | None, chunk: int | None) -> Tensor:
        distance = self._distance(device)
        visible = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if window is not None:
            visible = visible & (distance < window)
        if chunk is not None:
            query, key = self._indices(device)
            if self.key_positions is not None:
                assert self.query_positions is not None
                query, key = self.query_positions, self.key_positions
            same = query.unsqueeze(-1) // chunk == key.unsqueeze(-2) // chunk
            visible = visible & same.view(-1, 1, self.num_queries, self.num_keys)
        if self.query_segments is not None:
            assert self.key_segments is not None
            visible = visible & (self.query_segments[:, None, :, None] == self.key_segments[:, None, None, :])
        return visible
