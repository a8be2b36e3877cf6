"""Bytes per parameter: as published for Megatron's optimizers, and as tensors of real models have them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.distributed.tensor import DTensor

from cordee.families.registry import spec_from_options
from cordee.model.gpt import GPTModel
from cordee.model.span import Span
from cordee.optim.build import build_optimizer
from cordee.parallel import data, sharding
from cordee.parallel.cost import MemoryCost, ParameterCount, cost, count
from cordee.parallel.degrees import Degrees
from cordee.train.options import TrainConfig
from tests.matrix import sampled
from tests.parallel.test_data import LENGTH, build, samples
from tests.train import tiny


def bytes_of(tensors) -> int:
    """On this rank."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(part.numel() * part.element_size() for part in parts)


def backward(model: GPTModel, config: TrainConfig, *, last: bool) -> int:
    """One micro-batch. Returns the bytes of gathered weights at its height."""
    rest = {id(p) for p in model.parameters()}
    data.begin_micro_batch(model, config.zero_stage, last=last)
    inputs = samples()[:1, :-1].contiguous()
    loss, _ = model(inputs, output=lambda head, hidden: head.loss(hidden, inputs))
    gathered = bytes_of(p for p in model.parameters() if id(p) not in rest)
    (loss / LENGTH).backward()
    return gathered


def measured(rank: int, world_size: int, given: dict) -> tuple[MemoryCost, MemoryCost]:
    """What the arithmetic says, and what the tensors take."""
    model, layout, config = build(world_size, **given, global_batch_size=64)
    predicted = cost(config, layout.degrees, count(model.config, layout.degrees))
    parameters = list(model.parameters())
    optimizer = build_optimizer(config, model.named_parameters(), model.parameter_specs(), fused=False)
    weights = bytes_of(parameters)
    assert weights == 4 * sharding.kept(model)
    weights += backward(model, config, last=False)
    summed = bytes_of(p.grad for p in model.parameters() if p.grad is not None)
    backward(model, config, last=True)
    gradients = max(summed, bytes_of(p.grad for p in parameters))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    state = bytes_of(value for slots in optimizer.state.values() for value in slots.values() if value.ndim)
    size = predicted.parameters
    found = MemoryCost(parameters=size, weights=weights / size, gradients=gradients / size, optimizer=state / size)
    return predicted, found


PRECISIONS = {
    "fp32": {},
    "bf16": {"bf16": True, "accumulate_allreduce_grads_in_fp32": False},  # a sum in another type is made of tiles
}
SHAPES = {"dp2": (2, 1), "tp2": (2, 2), "dp2 tp2": (4, 2)}  # ranks, and how many of them are tensor-parallel


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("stage", "shape"), sampled(range(4), SHAPES))
def test_equals_the_tensors(pool, stage: int, shape: str, precision: str):
    ranks, tensor = SHAPES[shape]
    given = {"zero_stage": stage, "tensor_model_parallel_size": tensor, **PRECISIONS[precision]}
    for predicted, found in pool.run(measured, ranks, given):
        assert found.weights == pytest.approx(predicted.weights, rel=0.02)  # shards of some are padded
        assert found.gradients == pytest.approx(predicted.gradients, rel=0.02)
        assert found.optimizer == pytest.approx(predicted.optimizer, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_alone(optimizer: str):
    predicted, found = measured(0, 1, {"optimizer": optimizer})
    assert found == predicted
    assert predicted.each == (16 if optimizer == "adam" else 12)


@pytest.mark.parametrize(
    ("given", "shards", "total"),
    [
        ({"bf16": True}, 8, 6 + 12 / 8),
        ({"bf16": True, "accumulate_allreduce_grads_in_fp32": False}, 8, 4 + 12 / 8),
        ({}, 8, 8 + 12 / 8),
        ({"bf16": True, "zero_stage": 2}, 8, 2 + 16 / 8),
        ({"bf16": True, "zero_stage": 3}, 8, 16 / 8),
        ({"bf16": True, "zero_stage": 0}, 1, 18),
        ({"bf16": True, "optimizer": "sgd", "sgd_momentum": 0.0}, 4, 6 + 4 / 4),
    ],
)
def test_by_hand(given: dict, shards: int, total: float):
    config = TrainConfig(seq_length=8, lr=1.0, global_batch_size=64, **given)
    shape = Degrees(shard=shards, unsharded=config.zero_stage == 0)
    assert cost(config, shape, ParameterCount(parameters=100)).each == pytest.approx(total)


def test_experts_have_fewer_shards():
    config = TrainConfig(seq_length=8, lr=1.0, zero_stage=3)
    found = cost(config, Degrees(shard=8, ep=4), ParameterCount(parameters=100, experts=60))
    assert found.optimizer == pytest.approx(8 * (0.4 / 8 + 0.6 / 2))


def test_in_words():
    said = MemoryCost(parameters=3 << 20, weights=3, gradients=4, optimizer=8 / 3).describe("rank 0")
    assert max(map(len, said.splitlines())) <= 80
    for figure in ("29 MiB", "9.667 bytes", "3,145,728", "9 MiB", "12 MiB", "2.667", "8 MiB"):
        assert figure in said


PIPELINE = (Span(0, 1, head=False), Span(1, 2, embedding=False))


@pytest.mark.parametrize("spans", [(), PIPELINE[:1], PIPELINE[1:]])
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_of_a_stage_are_those_of_a_model_of_it(spans, tied: bool):
    config = spec_from_options(TrainConfig(**tiny.MODEL, seq_length=8, lr=1.0)).config
    config = replace(config, tie_word_embeddings=tied)
    model = GPTModel(config, spans=spans, device="meta")
    found = count(config, Degrees(), spans)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert found.outside == found.parameters - sum(p.numel() for p in model.layers.parameters())
    assert count(config, Degrees(), spans, trained={"adapter"}).frozen == found.parameters


def test_parameters_of_a_shard():
    """By hand: what tensor and expert parallelism shard, and what they replicate."""
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 4, "ffn_hidden_size": 16, "vocab_size": 10}
    options = tiny.MODEL | sizes | {"num_query_groups": 2, "num_experts": 4, "moe_router_topk": 2}
    config = spec_from_options(TrainConfig(**options, seq_length=8, lr=1.0)).config
    expert, router, norms = 3 * 8 * 16, 4 * 8, 3 * 8
    attention = (4 + 2 * 2) * 2 * 8 + 4 * 2 * 8
    table = 10 * 8 * (1 if config.tie_word_embeddings else 2)
    for tp, ep in ((1, 1), (2, 1), (4, 1), (2, 4)):
        # Two groups of keys and values are replicated over four ranks, and their queries with them.
        sharded = attention // tp if tp <= 2 else (4 + 2 * 2) * 2 * 8 + 4 * 2 * 8 // 4
        rows = -(-10 // tp) * table // 10
        found = count(config, Degrees(tp=tp, ep=ep, shard=ep))
        assert found.parameters == sharded + rows + router + norms + 4 // ep * expert // tp
        assert found.experts == (expert // tp if ep > 1 else 0)
        assert found.outside == rows + 8
