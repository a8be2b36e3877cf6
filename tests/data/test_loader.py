from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import torch

from cordee.data.batch import Batch
from cordee.data.gpt_collate import GPTCollate
from cordee.data.loader import Loader
from cordee.errors import ProblemError


class Counting:
    """Sample i is [i, i, i + 1]."""

    def __init__(self, length: int):
        self.length = length
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        self.read.append(index)
        return {"tokens": np.array([index, index, index + 1])}


def firsts(batches: list[Batch]) -> list[list[int]]:
    return [batch.input_ids[:, 0].tolist() for batch in batches]


def global_step(consumed: int, batch: int, micro: int, ranks: int, **options) -> list[int]:
    """The samples of one step on all ranks, in the order of the formula."""
    steps = []
    for rank in range(ranks):
        with Loader(
            Counting(options.get("length", 100)), GPTCollate(), rank=rank, size=ranks, order=options["order"]
        ) as x:
            steps.append(firsts(x.next_step(consumed, batch, micro)))
    return [sample for round_ in zip(*steps, strict=True) for micro_batch in round_ for sample in micro_batch]


def test_a_micro_batch_holds_the_samples_of_its_rank():
    loader = Loader(Counting(100), GPTCollate(), rank=1, size=2)
    assert firsts(loader.next_step(20, 12, 3)) == [[23, 24, 25], [29, 30, 31]]
    assert firsts(Loader(Counting(100), GPTCollate(), rank=0, size=2).next_step(20, 12, 3)) == [
        [20, 21, 22],
        [26, 27, 28],
    ]


@pytest.mark.parametrize("order", ["single", "cyclic"])
def test_the_samples_of_a_step_hang_on_nothing_but_the_position(order):
    steps = {
        (micro, ranks): global_step(36, 12, micro, ranks, order=order, length=40)
        if order == "cyclic"
        else global_step(36, 12, micro, ranks, order=order)
        for micro, ranks in [(1, 1), (12, 1), (3, 2), (1, 4), (2, 6)]
    }
    assert len({tuple(step) for step in steps.values()}) == 1
    if order == "single":
        assert steps[1, 1] == list(range(36, 48))


def test_cyclic_is_megatrons_random_sampler_without_sharding():
    """`MegatronPretrainingRandomSampler` with data_sharding off, on one rank, micro-batches of 1: every pass is
    `torch.randperm` with the number of the pass as seed."""
    loader = Loader(Counting(10), GPTCollate(), order="cyclic")
    drawn = [firsts(loader.next_step(consumed, 1, 1))[0][0] for consumed in range(30)]
    for number in range(3):
        expected = torch.randperm(10, generator=torch.Generator().manual_seed(number)).tolist()
        assert drawn[10 * number : 10 * number + 10] == expected


def test_cyclic_step_over_several_passes():
    loader = Loader(Counting(4), GPTCollate(), order="cyclic")
    [batch] = loader.next_step(2, 12, 12)
    samples = batch.input_ids[:, 0].tolist()
    assert sorted(samples[2:6]) == sorted(samples[6:10]) == [0, 1, 2, 3]


@pytest.mark.parametrize("order", ["single", "cyclic"])
@pytest.mark.parametrize("num_workers", [1, 3])
def test_reading_ahead_changes_nothing(order, num_workers):
    """Also where sizes change from step to step, or the run jumps back."""
    plan = [(0, 8, 2), (8, 8, 2), (16, 16, 2), (32, 16, 4), (48, 4, 1), (8, 8, 2), (16, 8, 2), (40, 20, 5)]
    with (
        Loader(Counting(60), GPTCollate(), order=order) as plain,
        Loader(Counting(60), GPTCollate(), order=order, num_workers=num_workers) as ahead,
    ):
        for step in plan:
            assert firsts(plain.next_step(*step)) == firsts(ahead.next_step(*step))


def test_the_next_step_is_read_while_this_one_is_computed():
    read = threading.Event()

    class Watched(Counting):
        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            if index == 7:
                read.set()
            return super().__getitem__(index)

    dataset = Watched(100)
    with Loader(dataset, GPTCollate(), num_workers=1) as loader:
        loader.next_step(0, 4, 2)
        assert read.wait(10)
        loader.next_step(4, 4, 2)
    assert len(dataset.read) == len(set(dataset.read)), "nothing is read twice"


def test_reading_ahead_stops_at_the_end_of_the_data():
    with Loader(Counting(10), GPTCollate(), num_workers=2) as loader:
        assert firsts(loader.next_step(0, 8, 2)) == [[0, 1], [2, 3], [4, 5], [6, 7]]
        with pytest.raises(ProblemError, match="has 10 samples, and the step needs the first 16"):
            loader.next_step(8, 8, 2)


def test_closing_ends_the_threads():
    before = threading.active_count()
    loader = Loader(Counting(100), GPTCollate(), num_workers=3)
    loader.next_step(0, 8, 2)
    loader.close()
    assert threading.active_count() == before


def test_an_error_while_reading_reaches_the_caller():
    with Loader(Counting(100), GPTCollate(vocab_size=20), num_workers=2) as loader:
        for consumed in itertools.count(0, 8):
            if consumed == 16:
                break
            loader.next_step(consumed, 8, 2)
        with pytest.raises(ProblemError, match="the data holds token"):
            loader.next_step(16, 8, 2)


def test_no_samples():
    with pytest.raises(ProblemError, match="no samples"):
        Loader(Counting(0), GPTCollate(), order="cyclic").next_step(0, 1, 1)
