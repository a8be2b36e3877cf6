"""Dropout that no layout can change.

Whether an element is dropped is a function of (key of the sample, place in the sample, channel), so ranks that hold
parts of a sample, in whatever order, drop what one process would drop, and a layer computed again drops the same.
Counters are hashed by the finaliser of MurmurHash3 (Appleby 2011), twice with the key between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -1640531527  # 2^32 / golden ratio, as int32: neighbours in a row get counters far apart


@dataclass(frozen=True, eq=False)
class Dropout:
    """Dropout of `rate` in one place of a model; `keys` int32 `[batch]`: one for each sample.

    `first_head`: which of the model's heads is the first one here.
    """

    rate: float
    keys: Tensor
    first_head: int = 0

    def of_tokens(self, x: Tensor, places: Tensor, first: int = 0) -> Tensor:
        """x `[batch, seq, channels]`, from channel `first` on, of the tokens at `places`, int64 `[1 or batch, seq]`."""
        channels = torch.arange(first, first + x.shape[-1], dtype=torch.int32, device=x.device)
        counter = (_mixed(places.to(torch.int32))[..., None] + channels).expand(x.shape)
        return self._dropped(x, counter, self.keys[:, None, None])

    def of_weights(self, weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """weights `[batch, heads, queries, keys]`, of queries and keys at these places, int64 `[queries]`, `[keys]`."""
        heads = torch.arange(weights.shape[1], dtype=torch.int32, device=weights.device) + self.first_head
        rows = _mixed(_mixed(heads)[:, None] + queries.to(torch.int32))  # [heads, queries]
        counter = (rows[..., None] + keys.to(torch.int32) * _GOLDEN).expand(weights.shape)
        return self._dropped(weights, counter, self.keys[:, None, None, None])

    def _dropped(self, x: Tensor, counter: Tensor, keys: Tensor) -> Tensor:
        number = _mixed(_mixed(counter).bitwise_xor_(keys)) & 0x7FFFFFFF  # 31 bits
        kept = number >= int(self.rate * 2.0**31)
        return x * (kept / (1.0 - self.rate)).to(x.dtype)


def _mixed(x: Tensor) -> Tensor:
    """A hash of int32 counters; torch's products of int32 wrap as the original's do."""
    x = (x ^ _shift(x, 16)).mul_(-2048144789)  # 0x85EBCA6B
    x = x.bitwise_xor_(_shift(x, 13)).mul_(-1028477387)  # 0xC2B2AE35
    return x.bitwise_xor_(_shift(x, 16))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch shifts signed numbers arithmetically, so the copies of the sign are masked off."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)
