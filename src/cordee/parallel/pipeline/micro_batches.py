"""Micro-batches of different sizes in one step: `--optimized-pipeline --manual-mbs`.

Owns the list's notation, the two worked examples and the laws of a list. Small micro-batches at both ends of a step
shorten the bubble; the schedule is 1F1B. A loss is weighted by the samples of each micro-batch, so that the step equals
that of equal micro-batches. Knows neither data nor torch."""

from dataclasses import dataclass

from cordee.config.values import whole_numbers
from cordee.errors import Problem, Problems, raise_all
from cordee.parallel.degrees import RANKS

_OPTION = "--manual-mbs"
_SAMPLES = ("global_batch_size", "micro_batch_size", *RANKS)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A list with the numbers it was made for: pipeline ranks, and samples of a mean micro-batch."""

    num_ranks: int
    micro_batch_size: int
    sizes: tuple[int, ...]


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
        fix = f"give {', '.join(EXAMPLES)}, or sizes such as 1,2,3,2"
        yield Problem(_OPTION, text, "the text is neither an example nor a list of sizes", fix, "list")


def problems(text: str, *, num_ranks: int, micro_batch_size: int, num_samples: int) -> Problems:
    """Why a list does not fit a run of `num_ranks` pipeline ranks.

    `num_samples`: of one step on one data-parallel rank, global batch / data-parallel ranks; `micro_batch_size` is the
    mean number of samples of a micro-batch."""
    if unread := list(unreadable(text)):
        yield from unread
        return
    listed = sizes(text)
    if text in EXAMPLES:
        example = EXAMPLES[text]
        for what, made_for, given in (
            ("pipeline ranks", example.num_ranks, num_ranks),
            ("samples in a micro-batch", example.micro_batch_size, micro_batch_size),
            ("samples in a step on each data-parallel rank", sum(listed), num_samples),
        ):
            if given != made_for:
                why = f"the example is made for {made_for} {what}, the run has {given}"
                fix = f"let there be {made_for}, or give a list of your own"
                yield Problem(_OPTION, text, why, fix, "example", _SAMPLES, (what, made_for))
        return
    if len(listed) * micro_batch_size != num_samples:
        wanted = num_samples / micro_batch_size
        why = f"the list has {len(listed)} sizes, {num_samples} samples are {wanted:g} x {micro_batch_size}"
        yield Problem(_OPTION, text, why, "give that many, or change the batch sizes", "length", _SAMPLES, wanted)
    if sum(listed) != num_samples:
        why = f"the list sums to {sum(listed)}, a step has {num_samples} samples on each data-parallel rank"
        yield Problem(_OPTION, text, why, f"let the sizes sum to {num_samples}", "sum", _SAMPLES, num_samples)
