"""Wrappers of layers, blocks and cores in the order of techniques: each runs what it is to run, under every layout."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from cordee.errors import ProblemError
from cordee.model.gpt import GPTModel
from cordee.parallel import apply, compile, wrapper
from cordee.parallel.degrees import degrees
from cordee.parallel.execution import StepBatches
from cordee.parallel.layout import Layout
from cordee.parallel.pipeline.check import SPLIT_BACKWARD
from cordee.parallel.wrapper import Wrapper
from tests.parallel import models
from tests.parallel import test_pipeline as pipelines

CPU = torch.device("cpu")
INSIDE = ("layer", "attention", "mlp", "core")
TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tp2": (2, TP2),
    "tp2 sp": (2, {**TP2, "sequence_parallel": True}),
    "tp2 overlap": (2, {**TP2, "tp_comm_overlap": True}),
    "tp2 sp overlap": (2, {**TP2, "sequence_parallel": True, "tp_comm_overlap": True}),
    "cp2 ring": (2, {**CP2, "context_parallel_algo": "megatron_cp_algo"}),
    "cp2 ulysses": (2, {**CP2, "context_parallel_algo": "ulysses_cp_algo"}),
    "ep2": (2, {"expert_model_parallel_size": 2, "zero_stage": 3}),
    "zero1": (2, {"zero_stage": 1}),
    "zero2": (2, {"zero_stage": 2}),
    "zero3": (2, {"zero_stage": 3}),
    "compile": (1, {"compile": "blocks"}),
    "tp2 compile": (2, {**TP2, "compile": "blocks"}),
}


def counted(calls: Counter, what: str):
    """A wrapper that counts how often what is inside runs."""

    def around(inner):
        @torch._disable_dynamo(recursive=False)
        def call(*inputs, **options):
            calls[what] += 1
            return inner(*inputs, **options)

        return call

    return around


def recomputed(inner):
    return partial(checkpoint, inner, use_reentrant=False)


def counting(calls: Counter, inside: str, **options: bool) -> list[Wrapper]:
    """A count, recompute around it, and a count around that."""
    around = {"in": counted(calls, "in"), "recompute": recomputed, "out": counted(calls, "out")}
    return [Wrapper(name=name, around=wrap, inside=inside, **options) for name, wrap in around.items()]


def on_ranks(rank: int, world_size: int, name: str, given: dict[str, Any], compiles: bool) -> list[tuple]:
    """For every kind of call: what training gives, the counts, and how many forwards there were."""
    found = []
    for inside in INSIDE:
        calls: Counter = Counter()
        wrappers = counting(calls, inside, compiles=compiles)
        with models.traced():
            model, layout, settings = models.build(models.MODELS[name], world_size, wrappers, **given)
            result = models.train(model, layout, settings)
        found.append((result, calls, 2 * len(model.own_layers()) * models.SAMPLES // layout.data_size))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_recompute_runs_twice_with_the_same_gradients(pool, layout: str):
    ranks, given = LAYOUTS[layout]
    name = "mixture" if layout == "ep2" else "llama"
    expected = models.train_alone(name)
    # torch.compile cannot trace recompute of sharded parameters: layers that do not say so stay as they are.
    for of_rank in pool.run(on_ranks, ranks, name, given, layout == "compile"):
        for found, calls, forwards in of_rank:
            assert calls == {"out": forwards, "in": 2 * forwards}
            assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
            assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
            for parameter, grad in expected["grads"].items():
                torch.testing.assert_close(found["grads"][parameter], grad, rtol=1e-4, atol=1e-6, msg=parameter)


# ---- pipelines -------------------------------------------------------------------------------------------------------


def through_a_pipeline(rank: int, world_size: int, given: dict[str, Any], recompute: bool, splits: bool) -> tuple:
    calls: Counter = Counter()
    wrappers = counting(calls, "layer", splits_backward=splits)
    chosen = [wrapper for wrapper in wrappers if recompute or wrapper.name != "recompute"]
    model, *built = pipelines.build(world_size, pipelines.shape(), given, chosen)
    executor = built[-1]
    batches = pipelines.micro_batches(0, built[0], built[1], pipelines.LENGTH)
    weights = [batch.num_trained for batch in batches]
    executor.train(
        StepBatches(batches=batches, weights=weights, weight=pipelines.weight_of(batches, built[0]), scale=1.0)
    )
    grads = {name: pipelines.full(p.grad) for name, p in model.named_parameters()}
    return grads, calls, len(model.own_layers()) * len(batches)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "zbv", "interleaved_zero_bubble"])
def test_pipelines(pool, schedule: str):
    recompute = schedule not in SPLIT_BACKWARD
    expected, *_ = through_a_pipeline(0, 1, {}, False, True)
    given = pipelines.pipeline(2, schedule)
    for grads, calls, forwards in pool.run(through_a_pipeline, 2, given, recompute, not recompute):
        assert calls == {"out": forwards, "in": forwards * (2 if recompute else 1)}
        for name, grad in grads.items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("schedule", SPLIT_BACKWARD)
def test_what_cannot_run_in_a_split_backward_is_refused(schedule: str):
    virtual = {"num_layers_per_virtual_pipeline_stage": 2} if schedule == "interleaved_zero_bubble" else {}
    options = models.options(pipeline_model_parallel_size=2, pipeline_schedule=schedule, **virtual)
    recompute = Wrapper(name="recompute", around=recomputed)
    llama = models.MODELS["llama"]
    (problem,) = wrapper.check([recompute], options)
    assert (problem.option, problem.value, problem.kind) == ("--pipeline-schedule", schedule, "excludes")
    with pytest.raises(ProblemError):
        apply.apply(GPTModel(llama, device="meta"), Layout(degrees(models.options(), 1)), options, CPU, [recompute])
    assert not list(wrapper.check([replace(recompute, splits_backward=True)], options))


# ---- where they go ---------------------------------------------------------------------------------------------------


def test_wrappers_are_the_last_on_a_hook_and_pick_layers():
    only_second = Wrapper(name="swap", around=recomputed, inside="core", layers=lambda index: index == 1)
    model, *_ = models.build(models.MODELS["llama"], 1, [only_second, replace(only_second, name="recompute")])
    found = [[(c.hook, c.by) for c in layer.attention.placement.applied] for layer in model.own_layers()]
    assert found == [[], [("core", "swap"), ("core", "recompute")]]


def names_on_core(rank: int, world_size: int, given: dict[str, Any]) -> list[str]:
    wrapper = Wrapper(name="recompute", around=recomputed, inside="core")
    model, *_ = models.build(models.MODELS["llama"], world_size, [wrapper], **given)
    return [change.by for change in model.own_layers()[0].attention.placement.applied if change.hook == "core"]


def test_wrappers_are_around_parallelism(pool):
    assert pool.run(names_on_core, 2, LAYOUTS["cp2 ulysses"][1]) == [["context parallelism", "recompute"]] * 2


# ---- compilation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compiles", [False, True])
def test_only_what_is_known_to_be_traceable_is_compiled(compiles: bool):
    second = Wrapper(name="swap", around=lambda inner: inner, inside="mlp", layers=lambda i: i == 1, compiles=compiles)
    model, *_ = models.build(models.MODELS["llama"], 1, [second], compile="blocks")
    assert [layer._compiled_call_impl is not None for layer in model.own_layers()] == [True, compiles]
    options = models.options(compile="model")
    assert (compile.whole(model, options, model.forward) == model.forward) is not compiles
