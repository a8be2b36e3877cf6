"""A sharded mixture of experts learns what one process learns, auxiliary losses included."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from cordee.model import init
from cordee.model.balance import Balance
from cordee.model.config import (
    AttentionConfig,
    BalanceConfig,
    LayerConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RouterConfig,
)
from cordee.model.gpt import GPTModel
from tests.model.moe_cases import mlp

SAMPLES, SEQ = 4, 9


def model() -> GPTModel:
    norm = NormConfig(kind="rms", eps=1e-6)
    moe = MoEConfig(
        router=RouterConfig(num_experts=8, top_k=2, score="sigmoid", correction_bias=True, normalise=True),
        expert=mlp(12),
        shared=mlp(12),
        balance=BalanceConfig(expert=0.1, per_sequence=True, z=0.01),
    )
    layer = LayerConfig(attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8), mlp=moe, norm=norm)
    config = ModelConfig(
        vocab_size=32, hidden_size=16, max_position_embeddings=SEQ, layers=(layer,) * 2, final_norm=norm, init_std=0.2
    )
    built = GPTModel(config)
    init.initialise(built, 0)
    return built


def backward(built: GPTModel, ids: torch.Tensor) -> float:
    """The loss of `ids`, summed over tokens; gradients of the mean over all samples are added up."""
    labels = ids.roll(-1, 1)
    balance = Balance(scale=len(ids) / SAMPLES)
    loss, _ = built(ids, balance=balance, output=lambda head, hidden: head.loss(hidden, labels))
    (loss / (SAMPLES * SEQ)).backward()
    return loss.item()


def sharded(rank: int, world_size: int, reshard: bool):
    built = model()
    mesh = init_device_mesh("cpu", (world_size,))
    for module in [*built.layers.values(), built]:
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, shard_placement_fn=lambda p: Shard(p.ndim - 1))
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    part = SAMPLES // world_size
    ids = token_ids()[rank * part : (rank + 1) * part]
    loss = torch.tensor(backward(built, ids))
    dist.all_reduce(loss)
    grads = {name: p.grad for name, p in built.named_parameters() if p.grad is not None}
    return loss.item(), {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def token_ids() -> torch.Tensor:
    return torch.randint(0, 32, (SAMPLES, SEQ), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reshard", [False, True])
def test_two_ranks_equal_one_process(pool, reshard):
    alone = model()
    expected = backward(alone, token_ids())
    gradients = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert "layers.0.mlp.router.correction_bias" not in gradients
    for loss, found in pool.run(sharded, 2, reshard):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_initial_values_of_stacked_experts_do_not_depend_on_blocks_or_shards(monkeypatch):
    spec = model().parameter_specs()["layers.0.mlp.experts.gate_up.weight"]
    whole, in_blocks, part = torch.empty(spec.shape), torch.empty(spec.shape), torch.empty(3, 1, 5, 7)
    init.fill(whole, spec, (0, 0, 0, 0), 7)
    monkeypatch.setattr(init, "BLOCK", 50)
    init.fill(in_blocks, spec, (0, 0, 0, 0), 7)
    init.fill(part, spec, (2, 1, 4, 6), 7)
    assert torch.equal(in_blocks, whole)
    assert torch.equal(part, whole[2:5, 1:2, 4:9, 6:13])
