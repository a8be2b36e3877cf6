"""Weights of a model in training: into models of other layouts, again and again, and into files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cordee.errors import ProblemError
from cordee.families.registry import ModelSpec, spec_from_hf
from cordee.model.config import ModelConfig
from cordee.model.gpt import GPTModel
from cordee.parallel import collectives, inference, live
from cordee.parallel.degrees import Degrees
from cordee.parallel.execution import Executor, StepBatches
from cordee.parallel.layout import Layout
from cordee.parallel.live import LiveSource, refill
from cordee.tensors.views import View
from cordee.weights import hf
from cordee.weights.codec import Sink
from cordee.weights.load import load_into
from tests.matrix import sampled
from tests.parallel import models
from tests.parallel.test_pipeline import LENGTH, build, full, micro_batches, weight_of
from tests.weights import tiny

CPU = torch.device("cpu")
STEPS = 2
TRAINED: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2 zero3": {"zero_stage": 3},
    "dp2 zero1": {"zero_stage": 1},
    "ep2": {"expert_model_parallel_size": 2},
    "dp2 tp2 zero3": {"tensor_model_parallel_size": 2, "zero_stage": 3},
    "pp2 tp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
NAMES = ["llama", "tied", "gpt2", "mixture", "latent"]


def world_size(layout: str) -> int:
    return 4 if layout in ("dp2 tp2 zero3", "pp2 tp2") else 2


def spec_of(config: ModelConfig) -> ModelSpec:
    """A spec of a model that no family has."""
    return ModelSpec(spec_from_hf(tiny.LLAMA).family, {}, config)


def step(executor: Executor, number: int, layout: Layout, chosen) -> float:
    """A forward and backward; the loss of all ranks."""
    batches = micro_batches(number, layout, chosen, LENGTH)
    weight = weight_of(batches, layout)
    weights = [batch.num_trained for batch in batches]
    sums = executor.train(StepBatches(batches=batches, weights=weights, weight=weight, scale=1.0))
    return collectives.sum_over(sums[""].clone(), layout).item() / weight


def whole_weights(model: GPTModel, layout: Layout) -> dict[str, torch.Tensor]:
    """All parameters of a model on every rank, gathered by torch."""
    own = {name: full(parameter).detach() for name, parameter in model.named_parameters()}
    return {name: tensor for part in collectives.gather(own, layout) for name, tensor in part.items()}


@torch.no_grad()
def check_copies(
    source: LiveSource, trained: GPTModel, targets: dict[str, tuple[GPTModel, inference.InferenceStage]]
) -> None:
    """Refill every target, and compare weights with those that torch gathers and logits with those of one process."""
    expected = whole_weights(trained, source.layout)
    ids = torch.randint(0, models.VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5))
    logits = {}
    for name, (model, stage) in targets.items():
        refill(model, source)
        assert dict(model.named_parameters()).keys() <= expected.keys()
        for parameter, tensor in model.named_parameters():
            assert torch.equal(full(tensor), expected[parameter].to(tensor.dtype)), (name, parameter)
        logits[name] = stage.run(model, ids).float()
    torch.testing.assert_close(logits["tp"], logits["copies"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits["pp"], logits["copies"], rtol=1e-5, atol=1e-5)


def train(rank: int, world_size: int, name: str, given: dict, *, refilled: bool) -> tuple[list[float], list[float]]:
    """Losses of some steps, and those of the same samples before each step under a model that is filled with what is
    trained."""
    config = models.MODELS[name]
    model, layout, chosen, executor = build(world_size, config, given)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=chosen.lr)
    targets, source = {}, None
    if refilled:
        source = LiveSource(model, spec_of(config), layout)
        shapes = {
            "copies": Degrees(replicate=world_size),
            "tp": Degrees(replicate=world_size // 2, tp=2),
            "pp": Degrees(replicate=world_size // 2, pp=2),
        }
        for kind, degrees in shapes.items():
            targets[kind] = inference.build(config, Layout(degrees), torch.float32, CPU)
            targets[kind][0].eval()
    losses, found = [], []
    for number in range(STEPS):
        if source is not None:
            check_copies(source, model, targets)
            found.append(loss_of(targets["copies"][0], number, layout, chosen))
        losses.append(step(executor, number, layout, chosen))
        optimizer.step()
        optimizer.zero_grad()
    return losses, found


@torch.no_grad()
def loss_of(model: GPTModel, number: int, layout: Layout, chosen) -> float:
    batches = micro_batches(number, layout, chosen, LENGTH)
    total = sum(
        model(batch.input_ids, output=lambda head, hidden, batch=batch: head.loss(hidden, batch.labels)[0])
        for batch in batches
    )
    own = float(total) if layout.speaks_for_samples else 0.0
    return sum(collectives.gather(own, layout)) / weight_of(batches, layout)


def check_training(rank: int, world_size: int, name: str, given: dict) -> None:
    losses, found = train(rank, world_size, name, given, refilled=True)
    plain, _ = train(rank, world_size, name, given, refilled=False)
    assert losses == plain
    if not models.MODELS[name].hidden_dropout:
        assert found == pytest.approx(losses, rel=1e-5)
    assert len(set(losses)) == STEPS


@pytest.mark.parametrize(("layout", "name"), sampled([n for n in TRAINED if n != "ep2"], NAMES))
def test_a_model_in_training_fills_models_of_other_layouts(pool, layout: str, name: str):
    pool.run(check_training, world_size(layout), name, TRAINED[layout])


def test_experts_of_several_ranks_fill_one(pool):
    pool.run(check_training, 2, "mixture", TRAINED["ep2"])


# ---- types, files, and what does not fit -----------------------------------------------------------------------------


def filled_in_bfloat16(rank: int, world_size: int) -> bool:
    config = models.MODELS["tied"]
    model, layout, *_ = build(world_size, config, TRAINED["dp2 zero3"])
    target, _ = inference.build(config, Layout(Degrees(replicate=2)), torch.bfloat16, CPU)
    memory = [parameter.data_ptr() for parameter in target.parameters()]
    refill(target, LiveSource(model, spec_of(config), layout, torch.bfloat16))
    assert [parameter.data_ptr() for parameter in target.parameters()] == memory
    assert target.head.weight is target.embedding.weight
    expected = whole_weights(model, layout)
    return all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in target.named_parameters())


def test_weights_are_converted_on_the_way(pool):
    assert pool.run(filled_in_bfloat16, 2) == [True, True]


def saved(rank: int, world_size: int, directory: Path, output: Path, given: dict) -> None:
    original = hf.read(directory)
    model, layout, *_ = build(world_size, original.spec.config, given)
    load_into(model, original)
    source = LiveSource(model, original.spec, layout)
    if rank == 0:
        with hf.write(output, original.spec) as sink:
            live.save(source, sink)
    else:
        live.save(source, None)


@pytest.mark.parametrize("layout", ["pp2", "dp2 zero3"])
def test_a_model_in_training_is_written_to_a_format(pool, tmp_path, layout):
    tiny.save(tmp_path / "model", tiny.MODELS["llama tied"])
    pool.run(saved, 2, tmp_path / "model", tmp_path / "out", TRAINED[layout])
    original, written = hf.read(tmp_path / "model"), hf.read(tmp_path / "out")
    assert all(torch.equal(written.tensor(name), original.tensor(name)) for name in original.names())


def other_shape(rank: int, world_size: int) -> list[str]:
    model, layout, *_ = build(world_size, models.MODELS["llama"], TRAINED["pp2"])
    target, _ = inference.build(models.MODELS["gpt2"], Layout(Degrees(pp=2)), torch.float32, CPU)
    with pytest.raises(ProblemError) as caught:
        refill(target, LiveSource(model, spec_of(models.MODELS["llama"]), layout))
    return sorted({problem.option for problem in caught.value.problems})


def test_a_model_of_another_shape_is_refused_on_all_ranks(pool):
    first, second = pool.run(other_shape, 2)
    assert first == second
    assert {"position_embedding.weight", "final_norm.bias"} <= set(first)  # of the first stage and of the last


class Full(Sink):
    """Of a disk that has no room for the second parameter."""

    def __init__(self) -> None:
        self.written: list[str] = []

    def take(self, name: str, view: View) -> None:
        if self.written:
            raise OSError("No space left on device")
        self.written.append(name)

    def close(self) -> None: ...

    def abort(self) -> None: ...


def not_saved(rank: int, world_size: int) -> list[str]:
    config = models.MODELS["llama"]
    model, layout, *_ = build(world_size, config, TRAINED["dp2 zero3"])
    with pytest.raises(ProblemError) as caught:
        live.save(LiveSource(model, spec_of(config), layout), Full() if rank == 0 else None)
    return [problem.option for problem in caught.value.problems]


def test_what_one_rank_cannot_write_is_reported_on_all(pool):
    assert pool.run(not_saved, 2) == [["output"], ["output"]]
