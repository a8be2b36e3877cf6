"""Adapters on every projection, over frozen weights: one loss and one gradient on every layout; nothing else moves."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cordee.checkpoint import directory
from cordee.checkpoint.files import read_metadata, read_tensor, tensors
from cordee.checkpoint.storage import location_of
from cordee.checkpoint.store import CheckpointStore, restore
from cordee.model.config import LowRankConfig, ModelConfig
from cordee.model.gpt import GPTModel
from cordee.model.init import fill, initialise
from cordee.model.parameter import local_shard, of_origins, train_only
from cordee.ops.dropout import stream_key
from cordee.optim.build import build_optimizer, set_rates
from cordee.parallel import apply, collectives, context, laws
from cordee.parallel.degrees import degrees
from cordee.parallel.execution import Criterion, LocalExecutor, StepBatches, own_parameters
from cordee.parallel.layout import Layout
from cordee.parallel.pipeline.executor import PipelineExecutor
from cordee.parallel.pipeline.split import partition_layers
from tests.matrix import sampled
from tests.parallel import models
from tests.parallel.test_pipeline import LENGTH, Twice, full, micro_batches, options, weight_of

CPU = torch.device("cpu")
STEPS = 2


def low_rank(*targets: str, **changes: Any) -> tuple[LowRankConfig, ...]:
    return (LowRankConfig(**{"targets": targets, "rank": 2, "scale": 1.5, **changes}),)


def everywhere(config: ModelConfig) -> ModelConfig:
    """An adapter on every projection, those of fused ones by slices."""
    targets = {full for _, name, full in config.projections() if name not in ("qkv", "gate_up")}
    return replace(config, low_rank=low_rank(*sorted(targets)))


GQA, LATENT, MIXTURE = (replace(models.MODELS[name], init_std=0.1) for name in ("llama", "latent", "mixture"))
BIASED = replace(models.MODELS["gpt2"], attention_dropout=0.0, hidden_dropout=0.0, embedding_dropout=0.0)
DROPPED = low_rank("q", "v", "out", "up", "down", dropout=0.3)
MODELS = {
    "dense": everywhere(GQA),
    "biased": everywhere(BIASED),
    "fused": replace(GQA, low_rank=low_rank("qkv", "gate_up", "out"), tie_word_embeddings=True),
    "queries": replace(GQA, low_rank=low_rank("q")),
    "latent": everywhere(LATENT),
    "mixture": everywhere(MIXTURE),
    "dropout": replace(GQA, low_rank=DROPPED),
    "latent dropout": replace(LATENT, low_rank=low_rank("q_up", "kv_down", "kv_up", "out", dropout=0.3)),
    "prefix": replace(GQA, num_prefix_tokens=3),
    "latent prefix": replace(LATENT, num_prefix_tokens=3, low_rank=low_rank("kv_up", dropout=0.3)),
    "both": replace(MIXTURE, low_rank=low_rank("v", "experts.up", "down", "head"), num_prefix_tokens=2),
}


@torch.no_grad()
def start(model: GPTModel) -> None:
    """Initial values, and random factors B, which would be zero."""
    initialise(model, 7)
    for name, spec in model.parameter_specs().items():
        if name.endswith(".b"):
            part, offset = local_shard(model.get_parameter(name))
            fill(part, replace(spec, std=0.2), offset, stream_key(7, name))


def train(world_size: int, config: ModelConfig, given: dict[str, Any], root: Path | None = None) -> dict[str, Any]:
    """Losses, gradient norms, the gradients of the first step and the parameters of this rank after AdamW steps.

    In `root` are checkpoints before and after, and below it what adapters were in the end.
    """
    chosen = options(**given)
    layout = Layout(degrees(chosen, world_size))
    assert not list(laws.check(laws.PlacedRun(model=config, degrees=layout.degrees, options=chosen)))
    partition = partition_layers(chosen, config, LENGTH) if layout.degrees.pp > 1 else None
    spans = () if partition is None else partition.spans_of(layout.axis_rank("pp"))
    model = GPTModel(config, spans=spans, device="meta")
    train_only(model, {"adapter"})
    apply.apply(model, layout, chosen, CPU)
    start(model)
    criterion = Criterion(Twice(), layout)
    if partition is None:
        executor = LocalExecutor(model, chosen, CPU, criterion)
    else:
        executor = PipelineExecutor(model, partition, layout, chosen, CPU, criterion)
    optimizer = build_optimizer(chosen, model.named_parameters(), model.parameter_specs(), fused=True)
    save(root, 0, model, optimizer, layout)
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": {}}
    for step in range(STEPS):
        whole = micro_batches(step, layout, chosen, LENGTH)
        weight = weight_of(whole, layout)
        batches = [context.shard(batch, layout, chosen) for batch in whole]
        sums = executor.train(
            StepBatches(batches=batches, weights=[batch.num_trained for batch in whole], weight=weight, scale=1.0)
        )
        found["losses"].append((collectives.sum_over(sums[""], layout) / weight).item())
        found["norms"].append(collectives.global_norm([p.grad for p in own_parameters(model)], layout, CPU))
        if step == 0:
            found["grads"] = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        set_rates(optimizer, chosen.lr, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    save(root, STEPS, model, optimizer, layout)
    found["adapters"] = {name: full(p) for name, p in of_origins(model, {"adapter"}).items()}
    return found


def save(root: Path | None, iteration: int, model: GPTModel, optimizer: torch.optim.Optimizer, layout: Layout) -> None:
    if root is None:
        return
    for path, origins in ((root, {"base", "adapter"}), (root / "adapters", {"adapter"})):
        with CheckpointStore(location_of(path), group=layout.background, origins=origins) as store:
            store.save(iteration, model, optimizer, {}, background=False)


def on_ranks(rank: int, world_size: int, *given: Any) -> dict[str, Any]:
    return train(world_size, *given)


@functools.cache
def alone(name: str) -> dict[str, Any]:
    return train(1, MODELS[name], {})


LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp2 sp": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "tp4 sp": (4, {"tensor_model_parallel_size": 4, "sequence_parallel": True}),  # of two key and value heads
    "zero0": (2, {"zero_stage": 0}),
    "zero3": (2, {"zero_stage": 3}),
    "tp2 zero3": (4, {"tensor_model_parallel_size": 2, "zero_stage": 3}),
    "pp2": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "1f1b"}),
    "pp2 zbv": (2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "zbv"}),
    "cp2": (2, {"context_parallel_size": 2}),
}
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep2": (2, {"expert_model_parallel_size": 2}),
    "ep2 allgather": (2, {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"}),
    "ep2 tp2": (4, {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}),
}


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """On every rank the losses of one process, and on all together its gradients and adapters."""
    assert all(len(each) == STEPS for each in (expected["losses"], expected["norms"]))
    for kind in ("grads", "adapters"):
        assert expected[kind].keys() == set().union(*(each[kind] for each in found))
    for each in found:
        assert each["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert each["norms"] == pytest.approx(expected["norms"], rel=2e-5)
        for kind, small in (("grads", 2e-6), ("adapters", 2e-4)):  # Adam makes much of the rounding of a tiny gradient
            for name, value in each[kind].items():
                torch.testing.assert_close(value, expected[kind][name], rtol=1e-4, atol=small, msg=name)


WHOLE = ("dense", "latent", "mixture")  # with an adapter on every projection


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), sampled(["tp2", "tp4 sp", "zero3", "pp2"], WHOLE, whole=["tp4 sp"]))
def test_every_projection_equals_one_process(pool, layout: str, name: str):
    ranks, given = LAYOUTS[layout]
    assert_same(pool.run(on_ranks, ranks, MODELS[name], given), alone(name))


OTHERS = sampled(LAYOUTS, [name for name in MODELS if name not in WHOLE], whole=["tp4 sp"])


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), OTHERS)
def test_further_adapters_equal_one_process(pool, layout: str, name: str):
    ranks, given = LAYOUTS[layout]
    if given.get("context_parallel_size") and MODELS[name].num_prefix_tokens:
        pytest.skip("refused: see test_what_does_not_fit")
    assert_same(pool.run(on_ranks, ranks, MODELS[name], given), alone(name))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), sampled(EXPERTS, ["mixture", "both"]))
def test_each_expert_has_its_own_adapter(pool, layout: str, name: str):
    ranks, given = EXPERTS[layout]
    assert_same(pool.run(on_ranks, ranks, MODELS[name], given), alone(name))


def stored(path: Path) -> dict[str, torch.Tensor]:
    folder = location_of(path)
    metadata = read_metadata(folder)
    return {name: read_tensor(folder, metadata, name) for name in tensors(metadata)}


@pytest.mark.parametrize(
    ("name", "ranks", "given"),
    [
        ("dense", 1, {}),
        ("dense", 4, {"tensor_model_parallel_size": 4}),
        ("mixture", 2, {"expert_model_parallel_size": 2}),
        ("latent", 2, {"pipeline_model_parallel_size": 2}),
        ("prefix", 2, {"zero_stage": 3}),
    ],
)
def test_only_adapters_change_and_are_saved(tmp_path: Path, pool, name: str, ranks: int, given: dict[str, Any]):
    config = MODELS[name]
    before, after = (tmp_path / directory.name_of(iteration) for iteration in (0, STEPS))
    pool.run(on_ranks, ranks, config, given, tmp_path)
    first, last = stored(before), stored(after)
    whole = GPTModel(config, device="meta")
    base, adapters = (of_origins(whole, {origin}).keys() for origin in ("base", "adapter"))
    assert {key.removeprefix("model.") for key in last if key.startswith("model.")} == base | adapters
    assert all(torch.equal(first[f"model.{name}"], last[f"model.{name}"]) for name in base)
    assert not any(torch.equal(first[f"model.{name}"], last[f"model.{name}"]) for name in adapters)
    # The optimizer has state of nothing else, and a checkpoint of the adapters has nothing else at all.
    assert {key.split(".", 1)[1].rpartition(".")[0] for key in last if key.startswith("optimizer.")} == set(adapters)
    own = stored(tmp_path / "adapters" / directory.name_of(STEPS))
    assert own.keys() == {key for key in last if not key.startswith("model.")} | {f"model.{name}" for name in adapters}
    # It goes over a base of any origin.
    model = GPTModel(config)
    initialise(model, 7, {"base"})
    restore(location_of(tmp_path / "adapters" / directory.name_of(STEPS)), model, origins={"adapter"})
    assert all(torch.equal(parameter, last[f"model.{name}"]) for name, parameter in model.named_parameters())


def test_what_does_not_fit():
    def problems(config: ModelConfig, **given: Any) -> list[tuple[str, Any]]:
        chosen = options(**given)
        world_size = chosen.tensor_model_parallel_size * chosen.context_parallel_size
        return [
            (each.option, each.value)
            for each in laws.check(laws.PlacedRun(model=config, degrees=degrees(chosen, world_size), options=chosen))
        ]

    overlap = {"tensor_model_parallel_size": 2, "tp_comm_overlap": True}
    assert problems(MODELS["dense"], **overlap) == [("--tp-comm-overlap", True)]
    assert problems(MODELS["prefix"], **overlap) == []
    assert problems(GQA, **overlap) == []
    assert problems(MODELS["prefix"], context_parallel_size=2) == [("--context-parallel-size", 2)]
    assert problems(MODELS["dense"], context_parallel_size=2) == []
