"""The places where a block meets the rest of the model.

Tensor and sequence parallelism put their collectives here; alone in one process nothing happens.
"""

from __future__ import annotations

from torch import Tensor


class Boundary:
    """What happens to activations `[batch, seq, embed]` as they enter and leave a block."""

    def enter(self, x: Tensor) -> Tensor:
        return x

    def exit(self, x: Tensor) -> Tensor:
        return x
