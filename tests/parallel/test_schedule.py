"""When gradients are reduced and parameters prefetched: the options change the order, and no result."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from cordee.log import logger
from tests.parallel.test_data import build, train

OPTIONS = ["overlap_grad_reduce", "overlap_param_gather", "delay_param_gather"]


def losses_and_gradients(rank: int, world_size: int, given: dict) -> list[tuple[list[float], dict]]:
    """Without any option, then with each."""
    return [train(*build(world_size, **given, **dict.fromkeys(names, True))) for names in ([], *zip(OPTIONS))]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"zero_stage": stage} for stage in range(4)] + [{"tensor_model_parallel_size": 2}])
def test_no_option_changes_results(pool, layout: dict):
    for (losses, grads), *others in pool.run(losses_and_gradients, 2, layout):
        for name, (found_losses, found_grads) in zip(OPTIONS, others, strict=True):
            assert found_losses == losses
            for parameter, grad in grads.items():
                assert torch.equal(found_grads[parameter], grad), (name, parameter)


def gathers(rank: int, world_size: int, given: dict) -> dict[str, int]:
    """How many layers are gathered before their own turn at most, forward and backward, over one step."""
    model, layout, config = build(world_size, num_layers=5, zero_stage=3, **given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(model, layout, config, steps=1)
    events = sorted(profile.events(), key=lambda event: event.time_range.start)
    most, phase, early = {"pre_forward": 0, "pre_backward": 0}, "pre_forward", set()
    for event in events:
        kind, _, layer = event.name.removeprefix("FSDP::").partition(" ")
        if kind in most:
            phase = kind
            early.discard(layer)
            turn = layer
        elif kind == "all_gather" and layer != turn:
            early.add(layer)
            most[phase] = max(most[phase], len(early))
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    ("given", "forward", "backward"),
    [({}, 0, 1), ({"overlap_param_gather": True}, 2, 2), ({"delay_param_gather": True}, 0, 0)],
)
def test_how_far_ahead_parameters_are_gathered(pool, given: dict, forward: int, backward: int):
    for most in pool.run(gathers, 2, given):
        assert most == {"pre_forward": forward, "pre_backward": backward}


def ignored_lines(rank: int, world_size: int, given: dict) -> list[str]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        build(world_size, **given)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [line for line in lines if line.startswith("ignored")]


def test_what_a_cpu_cannot_do_is_reported(pool):
    assert pool.run(ignored_lines, 2, {}) == [[], []]
    for (line,) in pool.run(ignored_lines, 2, {"overlap_grad_reduce": True, "delay_param_gather": True}):
        assert line.startswith("ignored: --overlap-grad-reduce, --delay-param-gather (")


def buffers(rank: int, world_size: int, given: dict) -> set[int]:
    """Gradient buckets in flight that FSDP2 allows."""
    model, layout, config = build(world_size, **given)
    train(model, layout, config, steps=1)
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return {group._get_fsdp_state()._comm_ctx.reduce_scatter_max_input_buffers for group in groups}


@pytest.mark.parametrize(("on", "count"), [(False, 1), (True, 2)])
def test_gradient_buckets_in_flight(pool, on: bool, count: int):
    assert pool.run(buffers, 2, {"overlap_grad_reduce": on}) == [{count}] * 2
