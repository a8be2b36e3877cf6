"""Lists of micro-batch sizes: the examples, lists of one's own, and what does not fit."""

from __future__ import annotations

import pytest

from cordee.errors import ProblemError
from cordee.parallel.pipeline.micro_batches import EXAMPLES, problems, sizes


def test_the_examples_are_the_documented_ones():
    assert sizes("example-config-1") == (1, 2, 3, 4, 5, 5, 5, 5, 5, 5, 5, 5, 5, 4, 3, 2)
    assert sizes("example-config-2") == (1, 2, 2, 3, 4, *[5] * 13, 4, 4, 3, 3, 3, 2)


@pytest.mark.parametrize(
    ("name", "num_ranks", "num_samples"), [("example-config-1", 4, 64), ("example-config-2", 8, 96)]
)
def test_the_examples_suit_what_they_are_made_for(name, num_ranks, num_samples):
    assert not list(problems(name, num_ranks=num_ranks, micro_batch_size=4, num_samples=num_samples))
    as_list = ",".join(map(str, EXAMPLES[name].sizes))
    assert not list(problems(as_list, num_ranks=num_ranks, micro_batch_size=4, num_samples=num_samples))


def test_all_that_an_example_is_not_made_for_is_reported_at_once():
    found = list(problems("example-config-1", num_ranks=2, micro_batch_size=1, num_samples=32))
    assert {problem.kind for problem in found} == {"example"}
    assert [problem.limit for problem in found] == [
        ("pipeline ranks", 4),
        ("samples in a micro-batch", 4),
        ("samples in a step on each data-parallel rank", 64),
    ]


def test_a_list_of_ones_own():
    assert sizes("1, 2,3") == (1, 2, 3)
    assert not list(problems("1,2,3", num_ranks=2, micro_batch_size=2, num_samples=6))


def test_a_list_with_the_wrong_length_and_sum():
    length, total = problems("1,2,3,4", num_ranks=2, micro_batch_size=2, num_samples=6)
    assert (length.kind, length.limit, total.kind, total.limit) == ("length", 3, "sum", 6)


@pytest.mark.parametrize("text", ["", "1,,2", "1,0", "1,-2", "example-config-3", "1;2", "1.5,2"])
def test_what_is_no_list(text):
    with pytest.raises(ProblemError) as caught:
        sizes(text)
    found = list(problems(text, num_ranks=2, micro_batch_size=2, num_samples=6))
    assert caught.value.problems == found
    assert [(problem.option, problem.value, problem.kind) for problem in found] == [("--manual-mbs", text, "list")]
