"""Micro-batches of different sizes in one step: `--optimized-pipeline --manual-mbs`.

Owns the list's notation, the two worked examples and what must hold of a list. Small micro-batches at both ends of a
step shorten the time in which a pipeline fills and drains; the schedule is that of 1F1B. A loss is to be weighted by
the samples of each micro-batch, so that the step is that of equal micro-batches. Knows neither data nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cordee.errors import Problem, ProblemError

_OPTION = "--manual-mbs"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A list with the numbers it was made for: pipeline ranks, and samples of a mean micro-batch."""

    num_ranks: int
    micro_batch_size: int
    sizes: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Samples of one step on one data-parallel rank."""
        return sum(self.sizes)


EXAMPLES = {
    "example-config-1": Example(num_ranks=4, micro_batch_size=4, sizes=(1, 2, 3, 4, *9 * (5,), 4, 3, 2)),
    "example-config-2": Example(num_ranks=8, micro_batch_size=4, sizes=(1, 2, 2, 3, 4, *13 * (5,), 4, 4, 3, 3, 3, 2)),
}


def sizes(text: str) -> tuple[int, ...]:
    """Samples of each micro-batch of a step, from an example's name or "1,2,3". ProblemError if it is neither."""
    if text in EXAMPLES:
        return EXAMPLES[text].sizes
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        why = "it is neither an example nor a list of sizes"
        raise ProblemError([Problem(_OPTION, text, why, f"give {', '.join(EXAMPLES)}, or sizes such as 1,2,3,2")])
    return tuple(map(int, parts))


def problems(text: str, *, num_ranks: int, micro_batch_size: int, num_samples: int) -> Iterator[Problem]:
    """Why a list does not suit a run of `num_ranks` pipeline ranks.

    `num_samples`: of one step on one data-parallel rank, global batch / data-parallel ranks; `micro_batch_size`
    samples is what a micro-batch has in the mean.
    """
    try:
        listed = sizes(text)
    except ProblemError as error:
        yield from error.problems
        return
    if text in EXAMPLES:
        yield from _unlike_example(text, num_ranks, micro_batch_size, num_samples)
        return
    if len(listed) * micro_batch_size != num_samples:
        why = f"it has {len(listed)} sizes, and {num_samples} samples in micro-batches of {micro_batch_size} make "
        wanted = num_samples / micro_batch_size
        yield Problem(_OPTION, text, f"{why}{wanted:g}", "give that many, or change the batch sizes")
    if sum(listed) != num_samples:
        why = f"its sizes make {sum(listed)} samples, and a step has {num_samples} on each data-parallel rank"
        yield Problem(_OPTION, text, why, f"let the sizes make {num_samples}")


def _unlike_example(name: str, num_ranks: int, micro_batch_size: int, num_samples: int) -> Iterator[Problem]:
    example = EXAMPLES[name]
    for what, made_for, given in (
        ("pipeline ranks", example.num_ranks, num_ranks),
        ("samples in a micro-batch", example.micro_batch_size, micro_batch_size),
        ("samples in a step on each data-parallel rank", example.num_samples, num_samples),
    ):
        if given != made_for:
            why = f"it is made for {made_for} {what}; there {'is' if given == 1 else 'are'} {given}"
            yield Problem(_OPTION, name, why, f"let there be {made_for}, or give a list of your own")
