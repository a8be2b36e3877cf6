"""What a training forward draws at random: dropout, keyed by what is computed.

Owns the keys: every place of a model has its own stream for every sample. Knows no process and no order of events.
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cordee.ops.dropout import Dropout


@dataclass(frozen=True, eq=False)
class Noise:
    """The random numbers of one forward: a function of `seed` and of `samples`, int64 `[batch]`, which tell samples of
    a run apart.
    """

    seed: int
    samples: Tensor

    @staticmethod
    def drawn(batch_size: int, device: torch.device) -> Noise:
        """For callers who keep no count of samples: from torch's own random numbers."""
        seed, *samples = torch.randint(1 << 62, (1 + batch_size,)).tolist()
        return Noise(seed, torch.tensor(samples, dtype=torch.int64, device=device))

    def dropout(self, rate: float, *site: str | int, first_head: int = 0) -> Dropout:
        """Dropout of `rate` at a place of the model that nothing else has the name of."""
        mixed = self.samples * 0x5851F42D4C957F2D + _stream(self.seed, *site)  # wraps; an odd factor keeps them apart
        return Dropout(rate, ((mixed >> 31) ^ mixed).to(torch.int32), first_head)


@torch.compiler.assume_constant_result
@functools.cache
def _stream(*names: str | int) -> int:
    """A 63-bit number that only the same names have."""
    text = "/".join(map(str, names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
