"""Data parallelism: the same losses and gradients as one process, at every ZeRO stage and on every number of ranks."""

from __future__ import annotations

import functools
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from cordee.errors import Problem, ProblemError, RankLostError
from cordee.launch import RankInfo
from cordee.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig, RopeConfig
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.parallel import apply, collectives, data
from cordee.parallel.cost import needs_sharding
from cordee.parallel.degrees import degrees
from cordee.parallel.layout import Layout, process_group
from cordee.train.options import TrainConfig
from tests.matrix import sampled

CPU = torch.device("cpu")
SAMPLES, LENGTH, MICRO_BATCHES, VOCAB = 8, 12, 2, 53


def options(**given) -> TrainConfig:
    return TrainConfig(**{"seq_length": LENGTH, "lr": 1e-2, **given})


def shape(tied: bool, num_layers: int = 2) -> ModelConfig:
    norm = NormConfig(kind="rms", eps=1e-5)
    layer = LayerConfig(
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, rope=RopeConfig()),
        mlp=MLPConfig(ffn_hidden_size=48, activation="silu", gated=True),
        norm=norm,
    )
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        max_position_embeddings=LENGTH,
        layers=(layer,) * num_layers,
        final_norm=norm,
        tie_word_embeddings=tied,
    )


def build(world_size: int, tied: bool = False, num_layers: int = 2, **given) -> tuple[GPTModel, Layout, TrainConfig]:
    config = options(**given)
    layout = Layout(degrees(config, world_size))
    model = apply.apply(GPTModel(shape(tied, num_layers), device="meta"), layout, config, CPU)
    initialise(model, 7)
    return model, layout, config


def samples() -> torch.Tensor:
    return torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(3))


def train(model: GPTModel, layout: Layout, config: TrainConfig, steps: int = 2) -> tuple[list[float], dict]:
    """Losses of some AdamW steps on one global batch, and the gradients of the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    per_rank = SAMPLES // layout.data_size
    own = samples()[layout.data_rank * per_rank :][:per_rank].chunk(MICRO_BATCHES)
    losses, grads = [], {}
    for step in range(steps):
        total = torch.zeros(())
        for index, part in enumerate(own):
            data.begin_micro_batch(model, config.zero_stage, last=index == MICRO_BATCHES - 1)
            inputs, labels = part[:, :-1].contiguous(), part[:, 1:].contiguous()
            loss, _ = model(inputs, output=lambda head, hidden, labels=labels: head.loss(hidden, labels))
            (loss / (SAMPLES * LENGTH)).backward()
            total += loss.detach()
        if step == 0:
            grads = {name: full(p.grad) for name, p in model.named_parameters()}
        losses.append(collectives.sum_over(total, layout).item() / (SAMPLES * LENGTH))
        optimizer.step()
        optimizer.zero_grad()
    return losses, grads


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_ranks(rank: int, world_size: int, tied: bool, given: dict):
    return train(*build(world_size, tied, **given))


@functools.cache
def alone(tied: bool) -> tuple[list[float], dict]:
    return train(*build(1, tied))


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("stage", "ranks"), sampled(range(4), [2, 4]))
def test_equals_one_process(pool, stage: int, ranks: int, tied: bool):
    expected, grads = alone(tied)
    for losses, found in pool.run(on_ranks, ranks, tied, {"zero_stage": stage}):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert found.keys() == grads.keys()
        for name in grads:
            torch.testing.assert_close(found[name], grads[name], rtol=1e-4, atol=1e-6)


def bf16_on_one_rank(rank: int, world_size: int, given: dict):
    model, layout, config = build(1, **given)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return train(model, layout, config)[0]


@pytest.mark.parametrize(
    "precision", [{"bf16": True}, {"fp16": True}, {"bf16": True, "accumulate_allreduce_grads_in_fp32": False}]
)
def test_low_precision_keeps_float32_masters(pool, precision: dict):
    expected, _ = alone(False)
    (losses,) = pool.run(bf16_on_one_rank, 1, precision)
    assert losses == pytest.approx(expected, rel=2e-2)
    assert losses != expected


def shards(rank: int, world_size: int, stage: int) -> tuple[int, int, int, bool]:
    model, _, _ = build(world_size, zero_stage=stage)
    before = [p.to_local().numel() for p in model.parameters()]
    data.begin_micro_batch(model, stage, last=True)
    inputs = samples()[:1, :-1].contiguous()
    model.eval()
    with torch.no_grad():
        model(inputs)
    gathered = sum(not isinstance(p, DTensor) for p in model.parameters())
    data.release(model)
    restored = all(isinstance(p, DTensor) for p in model.parameters())
    return sum(before), sum(p.numel() for p in model.parameters()), gathered, restored


@pytest.mark.parametrize(("stage", "share"), [(0, 1), (1, 2), (2, 2), (3, 2)])
def test_what_a_rank_keeps(pool, stage: int, share: int):
    for local, whole, gathered, restored in pool.run(shards, 2, stage):
        assert whole / share <= local <= whole / share + 8 * 64
        assert restored
        # Stage 3 keeps only the root's own parameters between forward and backward.
        assert (gathered > 4) == (stage < 3)


def test_one_process_in_float32_is_not_wrapped():
    model, layout, _ = build(1)
    assert not any(isinstance(module, FSDPModule) for module in model.modules())
    assert layout.mesh is None and layout.data_mesh is None
    assert (layout.rank, layout.world_size, layout.data_rank, layout.data_size) == (0, 1, 0, 1)
    assert not needs_sharding(options(), 1)
    assert needs_sharding(options(bf16=True), 1)
    assert needs_sharding(options(), 2)


@pytest.mark.parametrize(
    ("shape", "size", "dim"), [((2, 96, 64), 4, 2), ((7, 6), 4, 0), ((8, 6), 4, 0), ((6, 8, 3), 4, 1), ((5,), 2, 0)]
)
def test_shards_lie_along_the_last_even_dim(shape, size, dim):
    assert data.shard_dim(torch.empty(shape), size) == dim


def test_shared_parameters_stay_shared():
    model, _, _ = build(1, tied=True)
    assert model.head.weight is model.embedding.weight


def layout_facts(rank: int, world_size: int, stage: int):
    layout = Layout(degrees(options(zero_stage=stage), world_size))
    return {
        "place": (layout.rank, layout.data_rank, layout.data_size),
        "mesh": tuple(layout.data_mesh.mesh_dim_names),
        "speaks": layout.speaks_for_samples,
        "sum": collectives.sum_over(torch.tensor([1.0, rank]), layout).tolist(),
        "counts": collectives.sum_numbers([1, rank], layout),
        "gathered": collectives.gather(f"rank {rank}", layout),
        "first": collectives.from_first(rank + 5, layout),
        "groups": [dist.get_backend(group) for group in (layout.control, layout.background)],
    }


@pytest.mark.parametrize(("stage", "mesh"), [(0, ("replicate", "shard")), (1, ("shard",))])
def test_layout_and_collectives(pool, stage: int, mesh: tuple[str, ...]):
    for rank, facts in enumerate(pool.run(layout_facts, 3, stage)):
        assert facts == {
            "place": (rank, rank, 3),
            "mesh": mesh,
            "speaks": True,
            "sum": [3.0, 3.0],
            "counts": [3, 3],
            "gathered": ["rank 0", "rank 1", "rank 2"],
            "first": 5,
            "groups": ["gloo", "gloo"],
        }


def timeouts(rank: int, world_size: int) -> set[timedelta]:
    layout = Layout(degrees(options(), world_size), timeout=timedelta(minutes=7))
    return {layout.background._get_backend(torch.device("cpu")).options._timeout}


def test_timeout_holds_for_every_group(pool):
    assert pool.run(timeouts, 2) == [{timedelta(minutes=7)}] * 2


def sums_of_two_runs(rank: int, world_size: int, port: int) -> list[float]:
    dist.destroy_process_group()  # of the pool: here the ranks find each other by themselves
    ranks = RankInfo(rank=rank, world_size=world_size, master_port=port, launcher="torchrun", agent_store=True)
    sums = []
    for run in range(2):
        time.sleep(0.5 * run * (rank == 0))  # the other finds in the store what this rank has left there
        with process_group(ranks, "gloo", timedelta(seconds=30)):
            layout = Layout(degrees(options(), world_size))
            sums += collectives.sum_over(torch.tensor([float(rank + run)]), layout).tolist()
    return sums


def test_processes_of_a_launcher_can_train_twice(pool):
    """Its agent keeps the store, and in it the addresses of the first run."""
    agent = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    assert pool.run(sums_of_two_runs, 2, agent.port) == [[1.0, 3.0]] * 2


GLOO = (
    "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer. Check. GLHF!"
)


@pytest.mark.parametrize("error", [RuntimeError(GLOO), dist.DistNetworkError("Connection reset by peer. Check.")])
def test_lost_contact_names_rank_and_innermost_phase(error: RuntimeError):
    with pytest.raises(RankLostError) as caught, collectives.contact("outside"), collectives.contact("in step 7"):
        raise error
    (problem,) = caught.value.problems
    assert (problem.option, problem.kind, problem.limit) == ("rank 0", "lost", "in step 7")
    assert problem.why.endswith("Connection reset by peer")  # torch's first sentence, without gloo's file and advice
    assert caught.value.exit_code != ProblemError.exit_code


def test_other_errors_are_not_lost_contact():
    error = RuntimeError("shape mismatch")
    with pytest.raises(RuntimeError) as caught, collectives.contact("in step 7"):
        raise error
    assert caught.value is error


def problems_of_one(rank: int, world_size: int) -> list[Problem]:
    layout = Layout(degrees(options(), world_size))
    own = [Problem("file", rank, "is broken", "fix it")] if rank == 1 else []
    with pytest.raises(ProblemError) as caught:
        collectives.raise_together([*own, Problem("all", None, "see it", "once")], layout.control)
    return caught.value.problems


def test_problems_are_raised_everywhere_and_once(pool):
    first, second = pool.run(problems_of_one, 2)
    assert first == second
    assert [problem.option for problem in first] == ["all", "file"]
