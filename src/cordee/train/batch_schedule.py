"""How many samples a step takes, as a function of how many were consumed before it.

Owns the global batch, its ramp-up and its split into micro-batches. Knows neither torch nor data."""

import bisect
import math
from dataclasses import dataclass, replace

from cordee.data.options import BatchOptions
from cordee.errors import Problem, Problems, divisible
from cordee.parallel.degrees import RANKS


@dataclass(frozen=True, kw_only=True)
class BatchSchedule:
    """Global batches of a run over `data_size` ranks.

    `rampup` (start, increment, samples): the batch begins at `start` and reaches `global_batch_size` by equal steps of
    `increment`, each held for the same part of the first `samples` samples (Megatron's rule). `sizes`, if they are
    given, are those of the micro-batches of a rank in every step."""

    micro_batch_size: int
    data_size: int
    global_batch_size: int
    rampup: tuple[int, int, int] | None = None
    sizes: tuple[int, ...] | None = None

    @property
    def slice_size(self) -> int:
        """Samples of one micro-batch over all ranks."""
        return self.micro_batch_size * self.data_size

    def batch_size(self, consumed: int) -> int:
        """Samples of the step that begins once `consumed` were seen."""
        if self.rampup is None:
            return self.global_batch_size
        start, increment, samples = self.rampup
        stages = (self.global_batch_size - start) // increment
        if consumed > samples or not stages:
            return self.global_batch_size
        return start + int(consumed * stages / samples) * increment

    def micro_batches(self, consumed: int) -> tuple[int, ...]:
        """Samples of each micro-batch of a rank in the step that begins once `consumed` were seen."""
        return self.sizes or (self.micro_batch_size,) * (self.batch_size(consumed) // self.slice_size)

    def batch_sizes(self) -> list[int]:
        """Every size that a step may have, in their order."""
        if self.rampup is None:
            return [self.global_batch_size]
        start, increment, _ = self.rampup
        return [*range(start, self.global_batch_size, increment), self.global_batch_size]

    def steps_of(self, samples: float) -> int:
        """The fewest steps of the whole batch that take so many samples, one at least."""
        return max(1, math.ceil(round(samples / self.global_batch_size, 6)))  # an epoch is a quotient, too

    def whole_steps(self, samples: int) -> tuple[int, int]:
        """How many whole steps fit in the first `samples` samples, and how many samples those are."""
        steps, consumed = 0, 0
        while consumed + (size := self.batch_size(consumed)) <= samples:
            fit = (samples - consumed) // size
            if size < self.global_batch_size:  # as many as there are before the first that is larger
                positions = range(consumed, consumed + min(fit, 2**62) * size, size)  # no longer range has a length
                fit = bisect.bisect_right(positions, size, key=self.batch_size)
            steps += fit
            consumed += fit * size
        return steps, consumed


def build_batch_schedule(options: BatchOptions, data_size: int, sizes: tuple[int, ...] | None = None) -> BatchSchedule:
    """The batches of a run; the global batch is one micro-batch a rank unless it is given."""
    return BatchSchedule(
        micro_batch_size=options.micro_batch_size,
        data_size=data_size,
        global_batch_size=options.global_batch_size or options.micro_batch_size * data_size,
        rampup=options.rampup_batch_size,
        sizes=sizes,
    )


def problems(options: BatchOptions, data_ranks: int) -> Problems:
    """What keeps batches from being whole micro-batches of all data-parallel ranks."""
    size = options.micro_batch_size * data_ranks
    made_of = f"{options.micro_batch_size} per micro-batch x {data_ranks} data-parallel ranks"
    end, option, involved = options.global_batch_size, "--rampup-batch-size", ("micro_batch_size", *RANKS)
    if end is not None:
        yield from divisible("--global-batch-size", end, size, made_of, *involved)
    if (ramp := options.rampup_batch_size) is None:
        return
    start, increment, _ = ramp
    for meaning, number in (("start", start), ("increment", increment)):
        for problem in divisible(option, number, size, made_of, *involved):
            yield replace(problem, value=ramp, why=f"{meaning} {problem.why}", limit=(meaning, size))
    if end is not None and (start > end or (end - start) % increment):
        why = f"{start} does not reach {end} in steps of {increment}"
        fix = f"let {end} - START be a multiple of INCREMENT"
        yield Problem(option, ramp, why, fix, "reaches", ("global_batch_size",), end)
