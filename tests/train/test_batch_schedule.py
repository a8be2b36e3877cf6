"""Global batches and their ramp-up against Megatron's calculator."""

from __future__ import annotations

import pytest

from cordee.config.schema import TrainConfig
from cordee.train.batch_schedule import build_batch_schedule


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
        assert ours.num_micro_batches(consumed) == theirs.get()
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
