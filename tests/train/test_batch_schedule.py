"""Global batches and their ramp-up against Megatron's calculator."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cordee.train.batch_schedule import build_batch_schedule
from cordee.train.options import TrainConfig


def schedule(data_size: int = 2, **options):
    return build_batch_schedule(TrainConfig(seq_length=8, lr=1.0, **options), data_size)


@pytest.mark.parametrize(
    ("micro", "data", "end", "rampup"),
    [(1, 1, 16, (4, 4, 100)), (2, 2, 32, (8, 8, 64)), (1, 2, 10, (2, 2, 7)), (1, 2, 8, (8, 2, 50)), (2, 4, 24, None)],
)
def test_equals_megatron(micro: int, data: int, end: int, rampup: tuple[int, int, int] | None):
    module = pytest.importorskip("megatron.core.num_microbatches_calculator")
    ours = schedule(data, micro_batch_size=micro, global_batch_size=end, rampup_batch_size=rampup)
    if rampup is None or rampup[0] == end:  # Megatron divides by zero where nothing grows
        theirs = module.ConstantNumMicroBatchesCalculator(end, micro, data, False, 1)
    else:
        theirs = module.RampupBatchsizeNumMicroBatchesCalculator(end, micro, data, False, 1, *rampup)
    consumed = 0
    for _ in range(40):
        theirs.update(consumed, True)
        assert ours.batch_size(consumed) == theirs.get_current_global_batch_size()
        assert len(ours.micro_batches(consumed)) == theirs.get()
        consumed += ours.batch_size(consumed)


def test_global_batch_is_one_micro_batch_a_rank_by_default():
    assert schedule(3, micro_batch_size=2).global_batch_size == 6


@pytest.mark.parametrize("samples", [0, 5, 8, 48, 50, 100, 103])
def test_number_of_steps(samples: int):
    growing = schedule(1, global_batch_size=16, rampup_batch_size=(4, 4, 40))
    steps = consumed = 0
    while consumed + growing.batch_size(consumed) <= samples:
        consumed += growing.batch_size(consumed)
        steps += 1
    assert growing.whole_steps(samples) == (steps, consumed)
    assert schedule(1, global_batch_size=16).whole_steps(samples) == (samples // 16, samples // 16 * 16)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 6), st.integers(1, 400), st.integers(0, 600))
def test_steps_are_those_taken_one_by_one(start: int, increment: int, stages: int, ramp: int, samples: int):
    end = start + increment * stages
    growing = schedule(1, global_batch_size=end, rampup_batch_size=(start, increment, ramp))
    steps = consumed = 0
    while consumed + growing.batch_size(consumed) <= samples:
        consumed += growing.batch_size(consumed)
        steps += 1
    assert growing.whole_steps(samples) == (steps, consumed)


def test_steps_of_a_long_ramp_are_counted_at_once():
    """10^15 steps of one sample, then two a step, of which the sixth is not whole."""
    growing = schedule(1, global_batch_size=2, rampup_batch_size=(1, 1, 10**15))
    assert growing.whole_steps(10**15 + 11) == (10**15 + 5, 10**15 + 10)
    assert schedule(1, global_batch_size=2).whole_steps(10**30 + 1) == (10**30 // 2, 10**30)
