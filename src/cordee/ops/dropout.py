"""Dropout that no layout can change.

Whether an element is dropped is a function of (seed, sample, site, position in the sample, channel), so ranks that hold
parts of a sample, in whatever order, drop what one process would drop, and a layer computed again drops the same.
Counters are hashed by the finaliser of MurmurHash3 (Appleby 2011), twice with the key between."""

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = -1640531527  # 2^32 / golden ratio, as int32: neighbours in a row get counters far apart


@dataclass(frozen=True, eq=False)
class Dropout:
    """Dropout of `rate` at one site of a model; `keys` int32 `[batch]`: one for each sample.

    `first_head`: which of the model's heads is the first one here."""

    rate: float
    keys: Tensor
    first_head: int = 0

    def of_tokens(self, x: Tensor, positions: Tensor, first: int = 0) -> Tensor:
        """x `[batch, seq, channels]`, from channel `first` on; `positions` int64 `[1 or batch, seq]`."""
        channels = torch.arange(first, first + x.shape[-1], dtype=torch.int32, device=x.device)
        counter = (_mixed(positions.to(torch.int32))[..., None] + channels).expand(x.shape)
        return self._dropped(x, counter, self.keys[:, None, None])

    def of_weights(self, weights: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """weights `[batch, heads, queries, keys]`, positions of `queries` and `keys` int64 `[queries]`, `[keys]`."""
        heads = torch.arange(weights.shape[1], dtype=torch.int32, device=weights.device) + self.first_head
        rows = _mixed(_mixed(heads)[:, None] + queries.to(torch.int32))  # [heads, queries]
        counter = (rows[..., None] + keys.to(torch.int32) * _GOLDEN).expand(weights.shape)
        return self._dropped(weights, counter, self.keys[:, None, None, None])

    def _dropped(self, x: Tensor, counter: Tensor, keys: Tensor) -> Tensor:
        number = _mixed(_mixed(counter).bitwise_xor_(keys)) & 0x7FFFFFFF  # 31 bits
        return x * ((number >= int(self.rate * 2.0**31)) / (1.0 - self.rate)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class DropoutRNG:
    """The random numbers of one forward: a function of `seed` and of `samples`, int64 `[batch]`, the numbers of the
    samples in the run."""

    seed: int
    samples: Tensor

    @staticmethod
    def drawn(batch_size: int, device: torch.device) -> "DropoutRNG":
        """For callers who keep no count of samples: from torch's own random numbers."""
        seed, *samples = torch.randint(1 << 62, (1 + batch_size,)).tolist()
        return DropoutRNG(seed, torch.tensor(samples, dtype=torch.int64, device=device))

    def dropout(self, rate: float, *site: str | int, first_head: int = 0) -> Dropout:
        """Dropout of `rate` at a site of the model, which no other site shares the name of."""
        # The product wraps; an odd factor keeps samples apart.
        mixed = self.samples * 0x5851F42D4C957F2D + stream_key(self.seed, *site)
        return Dropout(rate, ((mixed >> 31) ^ mixed).to(torch.int32), first_head)


@torch.compiler.assume_constant_result
@functools.cache
def stream_key(*names: str | int) -> int:
    """The 63-bit key of a stream of random numbers, which only the same names have."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:8], "little") >> 1


def _mixed(x: Tensor) -> Tensor:
    """A hash of int32 counters; torch's products of int32 wrap as the original's do."""
    x = (x ^ _shift(x, 16)).mul_(-2048144789)  # 0x85EBCA6B
    x = x.bitwise_xor_(_shift(x, 13)).mul_(-1028477387)  # 0xC2B2AE35
    return x.bitwise_xor_(_shift(x, 16))


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch shifts signed numbers arithmetically, so the copies of the sign are masked off."""
    return (x >> bits).bitwise_and_((1 << (32 - bits)) - 1)
