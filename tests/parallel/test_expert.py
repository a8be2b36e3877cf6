"""Expert parallelism: what dispatchers over ranks make of tokens, and whole models, against one process."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from cordee.model.config import (
    AttentionConfig,
    CapacityConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from cordee.model.gpt import GPTModel
from cordee.model.moe import MoE, local_dispatch, loop_dispatch
from cordee.model.parameter import local_shard
from cordee.parallel import expert, laws, sharding, tensor
from cordee.parallel.degrees import Degrees, degrees
from cordee.parallel.layout import Layout
from cordee.train.options import TrainConfig
from cordee.weights.load import materialise
from tests.matrix import sampled

HIDDEN, FFN, EXPERTS = 16, 12, 8
DISPATCHERS = ["alltoall", "allgather"]


def mlp(**changes) -> MLPConfig:
    return MLPConfig(**{"ffn_hidden_size": FFN, "activation": "silu", "gated": True, **changes})


def mixture(top_k: int = 2, **changes) -> MoEConfig:
    router = RouterConfig(num_experts=EXPERTS, top_k=top_k, normalise=True)
    return MoEConfig(**{"router": router, "expert": mlp(bias=True), **changes})


def model_config(*mlps: MLPConfig | MoEConfig, seq: int = 32) -> ModelConfig:
    norm = NormConfig(kind="rms", eps=1e-6)
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4)
    return ModelConfig(
        vocab_size=40,
        hidden_size=HIDDEN,
        max_position_embeddings=seq,
        layers=tuple(LayerConfig(attention=attention, mlp=block, norm=norm) for block in mlps),
        final_norm=norm,
        init_std=0.2,
    )


def full(values: Tensor) -> Tensor:
    return values.full_tensor() if isinstance(values, DTensor) else values


# ---- a block alone ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill(block: MoE, lean: int | None) -> MoE:
    """Values by name and place, the same on every layout. `lean`: all tokens go to this expert first."""
    for name, parameter in block.named_parameters():
        generator = torch.Generator().manual_seed(len(name) * 31 + sum(map(ord, name)))
        values = torch.randn(parameter.shape, generator=generator) * 0.3
        if name == "router.weight" and lean is not None:
            values[lean] = 3.0
        own, offset = local_shard(parameter)
        own.copy_(values[tuple(slice(o, o + n) for o, n in zip(offset, own.shape, strict=True))])
    return block


def tokens_of(rank: int, length: int, lean: int | None) -> tuple[Tensor, Tensor]:
    """What a rank has, and the gradient of its result: `[1, length, embed]`."""
    generator = torch.Generator().manual_seed(100 + rank)
    x, upstream = torch.randn(2, 1, length, HIDDEN, generator=generator)
    return (x.abs() if lean is not None else x), upstream


def in_one_process(config: MoEConfig, lengths: list[int], lean: int | None, dispatch):
    """Results and gradients of every rank's tokens, and the sums of the parameters' gradients."""
    block = fill(GPTModel(model_config(config)).layers["0"].mlp, lean)
    block.placement.replace("dispatch", "test", dispatch)
    found = []
    for rank, length in enumerate(lengths):
        x, upstream = tokens_of(rank, length, lean)
        y = block(x.requires_grad_())
        y.backward(upstream)
        found.append((y.detach(), x.grad))
    return found, {name: p.grad for name, p in block.named_parameters()}


def on_ranks(rank: int, world_size: int, config: MoEConfig, lengths: list[int], lean: int | None, given: dict):
    options = TrainConfig(seq_length=8, lr=1e-3, **given)
    layout = Layout(degrees(options, world_size))
    model = GPTModel(model_config(config), device="meta")
    for technique in (sharding, tensor, expert):
        technique.apply(model, layout, options)
    materialise(model)
    block = fill(model.layers["0"].mlp, lean)
    x, upstream = tokens_of(layout.data_rank, lengths[layout.data_rank], lean)
    if options.sequence_parallel:
        x, upstream = (part.chunk(layout.degrees.tp, 1)[layout.axis_rank("tp")].contiguous() for part in (x, upstream))
    y = block(x.requires_grad_())
    y.backward(upstream)
    result = [y.detach(), x.grad]
    if options.sequence_parallel:
        result = [torch.cat(_all(part, layout.group("tp")), 1) for part in result]
    grads = {name: full(p.grad) for name, p in block.named_parameters()}
    for name, grad in grads.items():
        if not name.startswith("experts."):  # whose gradients have come from all ranks already
            dist.all_reduce(grad, group=layout.group("ep"))
    return layout.data_rank, result, grads


def _all(part: Tensor, group) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return parts


def assert_equal(pool, ranks: int, config: MoEConfig, lengths: list[int], given: dict, lean: int | None = None) -> None:
    local, grads = in_one_process(config, lengths, lean, local_dispatch)
    loop, loop_grads = in_one_process(config, lengths, lean, loop_dispatch)
    for data_rank, (y, x_grad), found in pool.run(on_ranks, ranks, config, lengths, lean, given):
        for expected in (local, loop):
            torch.testing.assert_close(y, expected[data_rank][0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(x_grad, expected[data_rank][1], rtol=1e-4, atol=1e-5)
        assert found.keys() == grads.keys()
        for name in grads:
            for expected in (grads, loop_grads):
                torch.testing.assert_close(
                    found[name], expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: n + m
                )


@pytest.mark.slow
@pytest.mark.parametrize(("way", "top_k"), sampled(product([2, 4], DISPATCHERS, [False, True]), [1, 2, 3, 4]))
def test_dispatchers_equal_local_dispatch(pool, way: tuple[int, str, bool], top_k: int):
    ep, dispatcher, overlap = way
    given = {
        "expert_model_parallel_size": ep,
        "moe_token_dispatcher_type": dispatcher,
        "moe_permutation_async_comm": overlap,
    }
    assert_equal(pool, ep, mixture(top_k), [12] * ep, given)


CAPACITIES = {
    "none": None,
    "least probable": CapacityConfig(factor=0.5, drop="probs"),
    "last": CapacityConfig(factor=0.5, drop="position", pad=True),
    "roomy": CapacityConfig(factor=3.0, drop="probs", pad=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize(("weight_input", "capacity"), sampled([False, True], CAPACITIES, per_row=2))
def test_dropped_and_padded_routes(pool, dispatcher: str, capacity: str, weight_input: bool):
    """Ranks have micro-batches of different lengths, one of a single token."""
    limit = CAPACITIES[capacity]
    given = {"expert_model_parallel_size": 4, "moe_token_dispatcher_type": dispatcher}
    assert_equal(pool, 4, mixture(capacity=limit, weight_input=weight_input), [9, 1, 14, 6], given)


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize(("lean", "padded"), sampled([0, 5], [False, True]))
def test_ranks_that_get_no_rows(pool, dispatcher: str, lean: int, padded: bool):
    """All tokens choose one expert: three ranks compute nothing, and most experts get no gradient."""
    capacity = CapacityConfig(factor=1.0, pad=True) if padded else None
    given = {"expert_model_parallel_size": 4, "moe_token_dispatcher_type": dispatcher}
    assert_equal(pool, 4, mixture(1, capacity=capacity), [7, 5, 7, 3], given, lean)


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize(("sequence", "shared"), sampled([False, True], [False, True]))
def test_experts_under_tensor_parallelism(pool, dispatcher: str, sequence: bool, shared: bool):
    config = mixture(shared=mlp(), shared_gate=True) if shared else mixture()
    given = {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": sequence,
        "moe_token_dispatcher_type": dispatcher,
    }
    assert_equal(pool, 4, config, [12, 8], given)


# ---- what fits -------------------------------------------------------------------------------------------------------


def broken(config: ModelConfig, ranks: int) -> list[tuple[str, object]]:
    chosen = TrainConfig(seq_length=8, lr=1e-3, expert_model_parallel_size=ranks)
    run = laws.PlacedRun(model=config, degrees=Degrees(shard=ranks, ep=ranks), options=chosen)
    return [(problem.kind, problem.limit) for problem in laws.expert(run)]


def test_check():
    model = model_config(mlp(), mixture())
    assert broken(model, 4) == broken(model_config(mlp()), 1) == []
    assert broken(model, 3) == [("divides", 8)]
    assert broken(model_config(mlp()), 2) == [("requires", None)]
    fewer = replace(mixture(), router=RouterConfig(num_experts=6, top_k=1))
    assert broken(model_config(mixture(), fewer), 4) == [("divides", 6)]
