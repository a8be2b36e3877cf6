"""Pipelines: the losses, gradients and parameters of one process, for every schedule and in every company."""

from __future__ import annotations

import functools
import json
import shutil
import threading
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cordee.data.batch import Batch
from cordee.families.registry import spec_from_hf
from cordee.model.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.parallel import apply, collectives
from cordee.parallel.degrees import degrees
from cordee.parallel.execution import Criterion, Executor, LocalExecutor, StepBatches, own_parameters
from cordee.parallel.layout import Layout
from cordee.parallel.pipeline.executor import PipelineExecutor
from cordee.parallel.pipeline.split import partition_layers
from cordee.train.objectives.next_token import NextToken
from cordee.train.options import TrainConfig
from cordee.train.plan import check_run, plan_run
from cordee.weights import hf
from cordee.weights.load import load_into
from tests.matrix import sampled
from tests.model import tiny
from tests.parallel import models
from tests.train import tiny as runs
from tests.weights import tiny as saved

CPU = torch.device("cpu")
LENGTH, SAMPLES = 12, 8


def shape(num_layers: int = 4, **changes: Any) -> ModelConfig:
    layer = tiny.layer(tiny.attention(num_heads=4, num_kv_heads=2))
    return tiny.config(*(layer,) * num_layers, **{"init_std": 0.1, **changes})


def options(**given: Any) -> TrainConfig:
    return TrainConfig(**{"seq_length": LENGTH, "lr": 1e-2, "micro_batch_size": 1, **given})


def samples(step: int, length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(0, tiny.VOCAB, (SAMPLES, length + 1), generator=generator)


class Twice(NextToken):
    """With a metric."""

    def loss(self, head, hidden, batch, reduce):
        total, _ = super().loss(head, hidden, batch, reduce)
        return total, {"twice": 2 * total.detach()}


def build(
    world_size: int, config: ModelConfig, given: dict, wrappers=()
) -> tuple[GPTModel, Layout, TrainConfig, Executor]:
    chosen = options(**given)
    layout = Layout(degrees(chosen, world_size))
    criterion = Criterion(Twice(), layout)
    if layout.degrees.pp == 1:
        model = apply.apply(GPTModel(config, device="meta"), layout, chosen, CPU, wrappers)
        executor = LocalExecutor(model, chosen, CPU, criterion)
    else:
        partition = partition_layers(chosen, config, LENGTH)
        model = GPTModel(config, spans=partition.spans_of(layout.axis_rank("pp")), device="meta")
        model = apply.apply(model, layout, chosen, CPU, wrappers)
        executor = PipelineExecutor(model, partition, layout, chosen, CPU, criterion)
    initialise(model, 7)
    return model, layout, chosen, executor


def micro_batches(step: int, layout: Layout, chosen: TrainConfig, length: int, sizes=None) -> list[Batch]:
    size = layout.data_size
    sizes = sizes or [chosen.micro_batch_size] * (SAMPLES // size // chosen.micro_batch_size)
    found, begin = [], 0
    for count in sizes:
        indices = range(begin + layout.data_rank * count, begin + (layout.data_rank + 1) * count)
        begin += count * size
        own = samples(step, length)[indices.start : indices.stop]
        labels = own[:, 1:].clone()
        for row, index in zip(labels, indices, strict=True):  # samples of different weights
            row[: index % 3] = -100
        found.append(Batch(own[:, :-1].contiguous(), labels, samples=torch.tensor(indices) + step * SAMPLES))
    return found


def weight_of(batches: list[Batch], layout: Layout) -> int:
    own = sum(batch.num_trained for batch in batches) if layout.speaks_for_samples else 0
    return collectives.sum_numbers([own], layout)[0]


def train(
    world_size: int, config: ModelConfig, given: dict, lengths=(LENGTH,) * 2, sizes=None, wrappers=()
) -> dict[str, Any]:
    """Losses, metrics, gradient norms, and all parameters and gradients of this rank, after AdamW steps."""
    model, layout, chosen, executor = build(world_size, config, given, wrappers)
    # Where a gradient is near zero, Adam with its usual eps makes much of how a processor's kernels round.
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=chosen.lr, eps=1e-4, fused=True)
    found: dict[str, Any] = {"losses": [], "norms": [], "evaluated": [], "zeros": [], "grads": {}}
    for step, length in enumerate(lengths):
        batches = micro_batches(step, layout, chosen, length, sizes)
        weight = weight_of(batches, layout)
        sums = executor.train(
            StepBatches(batches=batches, weights=[batch.num_trained for batch in batches], weight=weight, scale=1.0)
        )
        values = collectives.sum_over(torch.stack(list(sums.values())), layout) / weight
        found["losses"].append(dict(zip(sums, values.tolist(), strict=True)))
        grads = [p.grad for p in own_parameters(model)]
        found["norms"].append(collectives.global_norm(grads, layout, CPU))
        found["zeros"].append(collectives.count_zeros(grads, layout, CPU))
        if step == 0:
            found["grads"] = {name: full(p.grad) for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        total = collectives.sum_over(executor.evaluate(batches), layout).item()
        apply.data.release(model)
        model.train()
        found["evaluated"].append(total / weight)
    found["parameters"] = {name: full(p) for name, p in model.named_parameters()}
    return found


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def on_ranks(rank: int, world_size: int, config: ModelConfig, given: dict, *more):
    with models.traced():
        return train(world_size, config, given, *more)


@functools.cache
def alone(config: ModelConfig, *more) -> dict[str, Any]:
    return train(1, config, {}, *more)


def assert_same(pool, ranks: int, config: ModelConfig, given: dict, *more) -> list[dict[str, Any]]:
    expected = alone(config, *more)
    results = pool.run(on_ranks, ranks, config, given, *more)
    names = set()
    for found in results:
        assert found["losses"] == [pytest.approx(each, rel=1e-5) for each in expected["losses"]]
        assert found["evaluated"] == pytest.approx(expected["evaluated"], rel=1e-5)
        assert found["norms"] == pytest.approx(expected["norms"], rel=2e-5)
        assert found["zeros"] == expected["zeros"]
        names |= found["parameters"].keys()
        for kind, small in (("grads", 2e-6), ("parameters", 2e-4)):
            for name in found[kind]:
                torch.testing.assert_close(found[kind][name], expected[kind][name], rtol=1e-4, atol=small)
    assert names == expected["parameters"].keys()
    return results


def pipeline(ranks: int, schedule: str | None = None, **given: Any) -> dict[str, Any]:
    if schedule in ("interleaved", "interleaved_zero_bubble", "fold_aiao", "fold_fifo"):
        given["num_layers_per_virtual_pipeline_stage"] = 1
    return {"pipeline_model_parallel_size": ranks, "pipeline_schedule": schedule, **given}


SCHEDULES = ["gpipe", "1f1b", "interleaved", "interleaved_zero_bubble", "zbv", "dualpipev", "fold_aiao", "fold_fifo"]
slow = pytest.mark.slow


@slow
@pytest.mark.parametrize(("schedule", "how"), sampled(SCHEDULES, product([4, 2], [False, True])))
def test_equals_one_process(pool, schedule: str, how: tuple[int, bool]):
    ranks, tied = how
    results = assert_same(pool, ranks, shape(2 * ranks, tie_word_embeddings=tied), pipeline(ranks, schedule))
    if tied:  # the copies of the first and the last rank stay the same to the bit
        copies = [
            found["parameters"]["embedding.weight"] for found in results if "embedding.weight" in found["parameters"]
        ]
        assert all(torch.equal(copy, copies[0]) for copy in copies)
        assert len(copies) == (1 if schedule in ("zbv", "dualpipev") else 2)


@slow
@pytest.mark.parametrize(("schedule", "stage"), sampled(SCHEDULES, [0, 1, 2]))
def test_with_data_parallelism(pool, schedule: str, stage: int):
    assert_same(pool, 4, shape(tie_word_embeddings=True), pipeline(2, schedule, zero_stage=stage))


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved"])
def test_whole_backwards_go_with_sharded_parameters(pool, schedule: str):
    assert_same(pool, 4, shape(), pipeline(2, schedule, zero_stage=3))


def reducing_threads(rank: int, world_size: int) -> tuple[set[str], set[str]]:
    """Names of the threads that reduce gradients: the model's own, and those of layers."""
    own, layers = set(), set()
    model, layout, chosen, executor = build(world_size, shape(), pipeline(2, "fold_aiao", zero_stage=0))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            names = own if module is model else layers
            module.set_all_reduce_hook(lambda reduced, names=names: names.add(threading.current_thread().name))
    batches = micro_batches(0, layout, chosen, LENGTH)
    weights = [batch.num_trained for batch in batches]
    executor.train(StepBatches(batches=batches, weights=weights, weight=weight_of(batches, layout), scale=1.0))
    return own, layers


@slow
def test_a_thread_beside_reduces_only_what_no_other_backward_touches(pool):
    """Else two threads reduce over one group, in an order that differs between ranks."""
    assert pool.run(reducing_threads, 4) == [({"MainThread"}, {"reduction_0"})] * 4


@slow
@pytest.mark.parametrize(("schedule", "sequence"), sampled(["1f1b", "zbv", "interleaved_zero_bubble"], [False, True]))
def test_with_tensor_parallelism(pool, schedule: str, sequence: bool):
    given = pipeline(2, schedule, tensor_model_parallel_size=2, sequence_parallel=sequence)
    assert_same(pool, 4, shape(tie_word_embeddings=True), given)


def mixture() -> ModelConfig:
    """Dense layers and mixtures with every auxiliary loss that a micro-batch has."""
    balance = BalanceConfig(expert=0.02, z=0.01)
    router = RouterConfig(num_experts=4, top_k=2)
    experts = MoEConfig(router=router, expert=tiny.MLP, balance=balance)
    dense = tiny.layer(tiny.attention(num_heads=4, num_kv_heads=2))
    sparse = tiny.layer(tiny.attention(num_heads=4, num_kv_heads=2), mlp=experts)
    return tiny.config(dense, sparse, sparse, sparse, init_std=0.1)


@slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_auxiliary_losses_enter_where_their_layers_are(pool, schedule: str):
    config = mixture()
    (first, _) = assert_same(pool, 2, config, pipeline(2, schedule))
    assert {"", "twice", "load_balancing_loss", "z_loss", "largest_expert_load"} == first["losses"][0].keys()


@slow
@pytest.mark.parametrize("counts", ["1,3", "4,0", "0,4"])
def test_uneven_stages(pool, counts: str):
    assert_same(pool, 2, shape(tie_word_embeddings=True), pipeline(2, "1f1b", num_layer_list=counts))


def test_placeholders(pool):
    given = pipeline(2, None, num_layers_per_virtual_pipeline_stage=2, noop_layers="0,1,2,7")
    assert_same(pool, 2, shape(), given)


@slow
@pytest.mark.parametrize("sizes", [(1, 3, 2, 2), (2, 1, 1, 1, 3)])
def test_micro_batches_of_different_sizes(pool, sizes: tuple[int, ...]):
    assert_same(pool, 2, shape(), pipeline(2, "1f1b"), (LENGTH,) * 2, sizes)


@slow
@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
def test_lengths_change_between_steps(pool, schedule: str):
    assert_same(pool, 2, shape(), pipeline(2, schedule), (12, 7, 15))


def test_dropout_does_not_depend_on_the_pipeline(pool):
    assert_same(pool, 2, shape(hidden_dropout=0.2, embedding_dropout=0.1), pipeline(2, "1f1b"))


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_zero_bubble"])
def test_nothing_of_the_first_stage_is_trained(pool, schedule: str):
    expected = frozen(0, 1, {})
    results = pool.run(frozen, 2, pipeline(2, schedule))
    assert set().union(*results) == expected.keys()
    for found in results:
        for name in found:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=2e-6)


def frozen(rank: int, world_size: int, given: dict) -> dict[str, torch.Tensor]:
    model, layout, chosen, executor = build(world_size, shape(), given)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(("layers.2", "layers.3", "head")))
    batches = micro_batches(0, layout, chosen, LENGTH)
    weight = weight_of(batches, layout)
    weights = [batch.num_trained for batch in batches]
    executor.train(StepBatches(batches=batches, weights=weights, weight=weight, scale=1.0))
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}


@slow
@pytest.mark.parametrize("how", ["blocks", "model"])
def test_compiled_stages(pool, how: str):
    assert_same(pool, 2, shape(), pipeline(2, "1f1b", compile=how, num_layer_list="2,2"))


@slow
def test_low_precision_is_sent_as_it_is_computed(pool):
    given = {"bf16": True}
    (expected,) = pool.run(on_ranks, 1, shape(), given)
    for found in pool.run(on_ranks, 2, shape(), pipeline(2, "zbv", **given)):
        for here, there in zip(found["losses"], expected["losses"], strict=True):
            assert here == pytest.approx(there, rel=1e-2)
        assert found["norms"] == pytest.approx(expected["norms"], rel=3e-2)


def load(rank: int, world_size: int, folder: Path, given: dict) -> dict[str, torch.Tensor]:
    source = hf.read(folder)
    chosen = options(**given)
    layout = Layout(degrees(chosen, world_size))
    partition = partition_layers(chosen, source.spec.config, LENGTH)
    model = GPTModel(source.spec.config, spans=partition.spans_of(rank), device="meta")
    load_into(apply.apply(model, layout, chosen, CPU), source)
    return {name: full(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("model", list(saved.MODELS))
def test_hugging_face_files_load_into_stages(pool, tmp_path: Path, model: str):
    tensors = saved.save(tmp_path, saved.MODELS[model])
    expected = saved.canonical_of(spec_from_hf(saved.MODELS[model]), tensors)
    parts = pool.run(load, 2, tmp_path, pipeline(2))
    assert set().union(*parts) == expected.keys()
    for part in parts:
        assert all(torch.equal(part[name], expected[name]) for name in part)


# ---- through a run ---------------------------------------------------------------------------------------------------


def run_config(folder: Path, **given: Any) -> TrainConfig:
    few = {"num_layers": 4, "train_iters": 4, "save_interval": 2, "eval_iters": 1, "eval_interval": 2}
    return runs.config(folder, **{**few, "log_params_norm": True, "log_num_zeros_in_grad": True, **given})


def figures(config: TrainConfig) -> list[tuple[float, ...]]:
    found = runs.records(config)
    names = ("loss", "grad_norm", "params_norm", "zeros_in_grad")
    return [tuple(found[step][name] for name in names) for step in sorted(found)]


LATER = {
    "alone": (1, {}),
    "zbv": (2, pipeline(2, "zbv")),
    "four": (4, pipeline(4, "1f1b")),
    "virtual": (2, pipeline(2, num_layers_per_virtual_pipeline_stage=1)),
}


@slow
@pytest.mark.parametrize("later", [("alone", "four"), pytest.param(("zbv", "virtual"), marks=pytest.mark.exhaustive)])
def test_a_run_and_its_checkpoints(pool, tmp_path: Path, later: tuple[str, ...]):
    """Saved on one layout, resumed on another: as the run that was never stopped."""
    alone = run_config(tmp_path, save=str(tmp_path / "alone"))
    runs.train_rank(0, 1, alone)
    timeline = tmp_path / "timeline.json"
    half = run_config(
        tmp_path, save=str(tmp_path / "half"), exit_interval=2, pipeline_timeline=str(timeline), **pipeline(2)
    )
    pool.run(runs.train_rank, 2, half)
    assert figures(half) == [pytest.approx(each, rel=1e-5) for each in figures(alone)[:2]]
    validated = {step: line["loss"] for step, line in runs.records(alone, "validation").items()}
    assert {step: line["loss"] for step, line in runs.records(half, "validation").items()} == pytest.approx(
        {2: validated[2]}, rel=1e-5
    )
    spans = json.loads(timeline.read_text())
    assert {(span["rank"], span["kind"], span["stage"]) for span in spans} == {
        (rank, kind, rank) for rank in (0, 1) for kind in "FBR"
    }
    assert all(0 <= span["start"] <= span["end"] for span in spans)
    for name in later:
        folder = tmp_path / f"on {name}"
        ranks, other = LATER[name]
        shutil.copytree(tmp_path / "half", folder)
        there = run_config(tmp_path, save=str(folder), load=str(folder), pipeline_model_parallel_size=1)
        there = replace(there, **other)
        pool.run(runs.train_rank, ranks, there)
        assert figures(there)[-2:] == [pytest.approx(each, rel=1e-5) for each in figures(alone)[-2:]]


def test_a_dynamic_pipeline_trains(pool, tmp_path: Path):
    alone = run_config(tmp_path, save=str(tmp_path / "alone"), train_iters=2)
    runs.train_rank(0, 1, alone)
    dynamic = run_config(
        tmp_path,
        save=str(tmp_path / "dynamic"),
        train_iters=2,
        micro_batch_size=2,
        optimized_pipeline=True,
        manual_mbs="1,3,3,1",
        pipeline_model_parallel_size=2,
    )
    pool.run(runs.train_rank, 2, dynamic)
    assert figures(dynamic) == [pytest.approx(each, rel=1e-5) for each in figures(alone)]


def test_check_finds_what_does_not_fit(tmp_path: Path):
    given = {"nproc_per_node": 2, "pipeline_model_parallel_size": 2, "zero_stage": 3}
    bad = run_config(tmp_path, num_layer_list="1,2", pipeline_schedule="dualpipev", global_batch_size=2, **given)
    assert {(problem.option, problem.kind, problem.limit) for problem in check_run(bad)} >= {
        ("--pipeline-schedule", "excludes", "--zero-stage"),
        ("--pipeline-schedule", "micro-batches", 4),
        ("--num-layer-list", "excludes", "dualpipev"),
        ("--num-layer-list", "sum", 4),
    }
    assert not check_run(run_config(tmp_path, global_batch_size=3, **given))


def test_placeholders_count_among_the_layers_of_the_options(tmp_path: Path):
    given = run_config(tmp_path, num_layers=6, noop_layers="0,5", nproc_per_node=2, pipeline_model_parallel_size=2)
    plan = plan_run(given, 2)
    assert plan.spec.config.num_layers == 4
    assert plan.partition is not None
    assert [span.stop for span in plan.partition.spans] == [2, 4]
