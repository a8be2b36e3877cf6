"""Micro-batches of different sizes in one step: `--optimized-pipeline --manual-mbs`.

Owns the list's notation, the two worked examples and what must hold of a list. Small micro-batches at both ends of a
step shorten the time in which a pipeline fills and drains; the schedule is that of 1F1B. A loss is to be weighted by
the samples of each micro-batch, so that the step is that of equal micro-batches. Knows neither data nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from cordee.config.check import RANKS
from cordee.config.values import whole_numbers
from cordee.errors import Problem, Problems, raise_all

_OPTION = "--manual-mbs"
_SAMPLES = ("global_batch_size", "micro_batch_size", *RANKS)


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
    raise_all(unreadable(text))
    return EXAMPLES[text].sizes if text in EXAMPLES else whole_numbers(text) or ()


def unreadable(text: str) -> Problems:
    """Why a text is no list."""
    if text not in EXAMPLES and not all(whole_numbers(text) or (0,)):
        why = "it is neither an example nor a list of sizes"
        fix = f"give {', '.join(EXAMPLES)}, or sizes such as 1,2,3,2"
        yield Problem(_OPTION, text, why, fix)


def problems(text: str, *, num_ranks: int, micro_batch_size: int, num_samples: int) -> Problems:
    """Why a list does not suit a run of `num_ranks` pipeline ranks.

    `num_samples`: of one step on one data-parallel rank, global batch / data-parallel ranks; `micro_batch_size`
    samples is what a micro-batch has in the mean.
    """
    if problems := list(unreadable(text)):
        yield from problems
        return
    listed = sizes(text)
    if text in EXAMPLES:
        yield from _unlike_example(text, num_ranks, micro_batch_size, num_samples)
        return
    if len(listed) * micro_batch_size != num_samples:
        why = f"it has {len(listed)} sizes, and {num_samples} samples in micro-batches of {micro_batch_size} make "
        wanted = num_samples / micro_batch_size
        fix = "give that many, or change the batch sizes"
        yield Problem(_OPTION, text, f"{why}{wanted:g}", fix, "length", _SAMPLES, wanted)
    if sum(listed) != num_samples:
        why = f"its sizes make {sum(listed)} samples, and a step has {num_samples} on each data-parallel rank"
        yield Problem(_OPTION, text, why, f"let the sizes make {num_samples}", "sum", _SAMPLES, num_samples)


def _unlike_example(name: str, num_ranks: int, micro_batch_size: int, num_samples: int) -> Problems:
    example = EXAMPLES[name]
    for what, made_for, given in (
        ("pipeline ranks", example.num_ranks, num_ranks),
        ("samples in a micro-batch", example.micro_batch_size, micro_batch_size),
        ("samples in a step on each data-parallel rank", example.num_samples, num_samples),
    ):
        if given != made_for:
            why = f"it is made for {made_for} {what}; there {'is' if given == 1 else 'are'} {given}"
            fix = f"let there be {made_for}, or give a list of your own"
            yield Problem(_OPTION, name, why, fix, "example", _SAMPLES, (what, made_for))
