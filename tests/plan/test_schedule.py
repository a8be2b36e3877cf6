"""The simulation: closed forms, steps worked out by hand, and what dynamic and folded pipelines gain."""

from __future__ import annotations

import pytest

from cordee.parallel.pipeline.micro_batches import EXAMPLES
from cordee.parallel.pipeline.schedules import rank_actions, with_reduction
from cordee.plan.schedule import Costs, simulate
from cordee.plan.timeline import Timeline


def equal(schedule: str, ranks: int, stages: int, micro_batches: int, costs: Costs | None = None, **how) -> Timeline:
    """One layer a rank, sharded over its stages; micro-batches of one sample."""
    made = rank_actions(schedule, ranks, stages, micro_batches)
    if how:
        made = with_reduction(made, **how)
    layers = [1 / stages] * (ranks * stages)
    return simulate(made, costs or Costs(), layers=layers, sizes=[1] * micro_batches)


@pytest.mark.parametrize("backward", [1.0, 2.0, 2.5])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 2), (4, 4), (4, 16), (8, 24)])
@pytest.mark.parametrize(
    ("schedule", "stages"), [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("fold_aiao", 2)]
)
def test_bubble_is_the_closed_form(schedule, stages, ranks, micro_batches, backward):
    costs = Costs(backward=backward, backward_input=backward / 2)
    timeline = equal(schedule, ranks, stages, micro_batches, costs)
    expected = (ranks - 1) / (stages * micro_batches + ranks - 1)
    assert timeline.bubbles() == pytest.approx([expected] * ranks)
    assert timeline.bubble == pytest.approx(expected)
    assert timeline.makespan == pytest.approx((1 + backward) * (micro_batches + (ranks - 1) / stages))


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 16)])
@pytest.mark.parametrize(
    ("schedule", "stages", "held"),
    [("interleaved_zero_bubble", 1, 0.0), ("interleaved_zero_bubble", 2, 0.0), ("zbv", 2, 0.0), ("dualpipev", 2, 0.5)],
)
def test_zero_bubble_schedules_leave_a_third(schedule, stages, held, ranks, micro_batches):
    """Qi et al. 2024: with equal times of F, I and W, p - 1 of them are idle where 1F1B idles 3 (p - 1).

    Activations are held until the backward by weights: as many as 1F1B's first rank holds, and `held` more.
    """
    timeline = equal(schedule, ranks, stages, micro_batches)
    assert timeline.makespan == pytest.approx(3 * micro_batches + (ranks - 1) / stages)
    assert timeline.bubble == pytest.approx((ranks - 1) / (3 * stages * micro_batches + ranks - 1))
    assert max(timeline.peak_activations()) == ranks + held


def test_peak_activations_of_the_closed_form():
    assert equal("gpipe", 4, 1, 8).peak_activations() == [8, 8, 8, 8]
    assert equal("1f1b", 4, 1, 8).peak_activations() == [4, 3, 2, 1]
    assert equal("1f1b", 4, 1, 2).peak_activations() == [2, 2, 2, 1]
    assert equal("fold_aiao", 2, 2, 4).peak_activations() == [4, 4]
    # Korthikanti et al. 2022: 1 + (p - 1) / (p v) of the p micro-batches that 1F1B holds
    assert equal("interleaved", 4, 2, 8).peak_activations()[0] == 4 * (1 + 3 / (4 * 2))


def test_different_sizes_by_hand():
    """Two ranks, 1F1B, sizes 1, 2, 1; rank 0 waits for the long backward of rank 1."""
    timeline = simulate(rank_actions("1f1b", 2, 1, 3), Costs(), layers=[1, 1], sizes=[1, 2, 1])
    found = {f"{span.action}": (span.start, span.end) for span in timeline.spans}
    assert found == {
        **{"0F0": (0, 1), "0F1": (1, 3), "0B0": (4, 6), "0F2": (6, 7), "0B1": (10, 14), "0B2": (14, 16)},
        **{"1F0": (1, 2), "1B0": (2, 4), "1F1": (4, 6), "1B1": (6, 10), "1F2": (10, 11), "1B2": (11, 13)},
    }
    assert timeline.bubbles() == [0.25, 0.25]
    assert timeline.peak_activations() == [3, 2]


def test_communication_fixed_time_and_uneven_layers_by_hand():
    timeline = simulate(rank_actions("1f1b", 2, 1, 1), Costs(communication=0.5, fixed=0.25), layers=[1, 2], sizes=[2])
    #  F 2.25, message 1, F 4.25, B 8.25, message 1, B 4.25
    assert timeline.makespan == 2.25 + 1 + 4.25 + 8.25 + 1 + 4.25
    assert timeline.bubbles() == pytest.approx([1 - 6.5 / 21, 1 - 12.5 / 21])


def test_stages_of_one_rank_send_no_message():
    quiet, loud = (equal("zbv", 1, 2, 3, Costs(communication=time)).makespan for time in (0, 5))
    assert quiet == loud


@pytest.mark.parametrize(
    ("name", "step", "bubble"), [("example-config-1", 217, 0.1152), ("example-config-2", 352, 0.1818)]
)
def test_dynamic_pipeline_beats_equal_micro_batches(name, step, bubble):
    """A backward is two forwards, time is proportional to samples, nothing is lost in between."""
    example = EXAMPLES[name]
    made = rank_actions("1f1b", example.num_ranks, 1, len(example.sizes))
    layers, plain_sizes = [1] * example.num_ranks, [example.micro_batch_size] * len(example.sizes)
    plain = simulate(made, Costs(), layers=layers, sizes=plain_sizes)
    dynamic = simulate(made, Costs(), layers=layers, sizes=example.sizes)
    print(
        f"{name}: 1f1b step {plain.makespan} bubble {plain.bubble:.4f}, dynamic {dynamic.makespan} {dynamic.bubble:.4f}"
    )
    assert plain.bubble == pytest.approx((example.num_ranks - 1) / (len(example.sizes) + example.num_ranks - 1))
    assert dynamic.makespan == step < plain.makespan
    assert dynamic.bubble == pytest.approx(bubble, abs=1e-4)


@pytest.mark.parametrize("schedule", ["fold_aiao", "fold_fifo"])
def test_fold_hides_the_reduction_of_all_chunks_but_the_last(schedule):
    ranks, stages, micro_batches, costs = 4, 2, 8, Costs(reduction=3.0)
    computing = equal(schedule, ranks, stages, micro_batches).makespan
    folded = equal(schedule, ranks, stages, micro_batches, costs, at_once=True)
    plain = equal("interleaved", ranks, stages, micro_batches, costs, at_once=False)
    of_a_stage = costs.reduction / stages
    assert folded.makespan == pytest.approx(computing + of_a_stage)
    assert folded.exposed_reduction == pytest.approx(of_a_stage)
    assert plain.makespan == pytest.approx(computing + stages * of_a_stage)
    for rank in range(ranks):
        spans = {str(span.action): span for span in folded.spans if span.rank == rank}
        last = str(micro_batches - 1)
        reduction, below = spans[f"{rank + ranks}R{last}"], spans[f"{rank}B{last}"]
        assert spans[f"{rank + ranks}B{last}"].end == reduction.start
        assert reduction.end <= below.end, "it is done before the next chunk's backward is"
    assert computing == equal("interleaved", ranks, stages, micro_batches).makespan
