"""Where a run is: what a checkpoint keeps besides tensors.

Owns the counters of a run. Everything else that changes over time (rates, batch sizes, random numbers, the place in
the data) is a function of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class TrainState:
    """Totals since the run began.

    `consumed_samples` is the position in the data. Steps skipped for an overflow consume samples as well, but do not
    move the schedule.
    """

    iteration: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_iterations: int = 0
    skipped_samples: int = 0

    @property
    def schedule_position(self) -> int:
        """Samples of the steps that changed the parameters."""
        return self.consumed_samples - self.skipped_samples

    def advance(self, samples: int, tokens: int, *, skipped: bool) -> None:
        """Take note of a step."""
        self.iteration += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens
        if skipped:
            self.skipped_iterations += 1
            self.skipped_samples += samples

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainState:
        """The state that `state_dict` gave."""
        return cls(**{name: int(values[name]) for name in cls.__dataclass_fields__})
