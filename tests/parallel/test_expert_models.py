"""Whole models with sharded experts: losses, gradients and norms of one process, and checkpoints across layouts."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cordee.checkpoint.storage import location_of
from cordee.checkpoint.store import CheckpointStore, restore
from cordee.model.balance import Balance
from cordee.model.config import (
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.optim.build import build_optimizer, set_rates
from cordee.optim.clip import clip_factor, count_zeros, global_norm, gradients, scale_
from cordee.parallel import apply, collectives, data
from cordee.parallel.degrees import degrees
from cordee.parallel.layout import Layout
from cordee.tensors.views import Leaf, View
from cordee.train.options import TrainConfig
from cordee.weights.codec import Source
from cordee.weights.load import load_into
from tests.matrix import sampled
from tests.parallel.test_expert import full, mlp

SAMPLES, LENGTH, VOCAB, EXPERTS = 4, 10, 48, 8


def router(top_k: int, **changes) -> RouterConfig:
    return RouterConfig(num_experts=EXPERTS, top_k=top_k, **changes)


GPT_OSS = MoEConfig(
    router=router(2, bias=True, score_when="after"), expert=mlp(activation="swiglu_clamped", bias=True, limit=7.0)
)
QWEN2 = MoEConfig(
    router=router(3), expert=mlp(), shared=mlp(ffn_hidden_size=20), shared_gate=True, balance=BalanceConfig(expert=0.05)
)
DEEPSEEK_V3 = MoEConfig(
    router=router(3, score="sigmoid", correction_bias=True, normalise=True, num_groups=4, top_groups=2, scale=2.5),
    expert=mlp(),
    shared=mlp(),
    balance=BalanceConfig(expert=0.05, per_sequence=True, z=0.01),
)
LLAMA4 = MoEConfig(router=router(1, score="sigmoid"), expert=mlp(), shared=mlp(), weight_input=True)
DROPPING = MoEConfig(
    router=router(2, normalise=True), expert=mlp(), capacity=CapacityConfig(factor=0.8, drop="position", pad=True)
)
MODELS: dict[str, tuple[MLPConfig | MoEConfig, ...]] = {
    "softmax": (GPT_OSS, mlp(), QWEN2),
    "sigmoid": (DEEPSEEK_V3, LLAMA4, DROPPING),
}


def shape(name: str) -> ModelConfig:
    norm = NormConfig(kind="rms", eps=1e-5)
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, rope=RopeConfig())
    return ModelConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        max_position_embeddings=LENGTH,
        layers=tuple(LayerConfig(attention=attention, mlp=block, norm=norm) for block in MODELS[name]),
        final_norm=norm,
        init_std=0.1,
    )


def build(name: str, world_size: int, given: dict, seed: int = 7):
    options = TrainConfig(seq_length=LENGTH, lr=1e-2, weight_decay=0.1, **given)
    layout = Layout(degrees(options, world_size))
    model = apply.apply(GPTModel(shape(name), device="meta"), layout, options, torch.device("cpu"))
    initialise(model, seed)
    optimizer = build_optimizer(options, model.named_parameters(), model.parameter_specs(), fused=True)
    return model, optimizer, layout, options


def train(name: str, world_size: int, given: dict, steps: int = 2) -> tuple[list, dict[str, Tensor], Trained]:
    """Loss, gradient norm and number of zeros of some steps, clipped; the gradients of the first."""
    model, optimizer, layout, options = build(name, world_size, given)
    ids = torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    own = ids.chunk(layout.data_size)[layout.data_rank].split(1)
    facts, first = [], {}
    for step in range(steps):
        total = torch.zeros(())
        for index, part in enumerate(own):
            data.begin_micro_batch(model, options.zero_stage, last=index == len(own) - 1)
            total += backward(model, part, Balance(1 / SAMPLES))
        grads = gradients(model.parameters())
        norm = global_norm(grads).item()
        if step == 0:
            first = {n: full(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None}
        loss = collectives.sum_over(total, layout, ("pp", "replicate", "shard", "cp")).item() / (SAMPLES * LENGTH)
        facts.append((loss, norm, int(count_zeros(grads))))
        scale_(grads, clip_factor(norm, 1.0))
        set_rates(optimizer, options.lr, options.weight_decay)
        optimizer.step()
        optimizer.zero_grad()
    return facts, first, (model, optimizer, layout)


Trained = tuple[GPTModel, torch.optim.Optimizer, Layout]


def backward(model: GPTModel, part: Tensor, balance: Balance) -> Tensor:
    labels = part[:, 1:].contiguous()
    loss, _ = model(part[:, :-1].contiguous(), balance=balance, output=lambda head, hidden: head.loss(hidden, labels))
    (loss / (SAMPLES * LENGTH)).backward()
    return loss.detach()


@cache
def in_one_process(name: str) -> tuple[list, dict[str, Tensor]]:
    facts, grads, _ = train(name, 1, {})
    return facts, grads


def on_ranks(rank: int, world_size: int, name: str, given: dict):
    facts, grads, _ = train(name, world_size, given)
    return facts, grads


LAYOUTS = {
    "ep2 dp2": (4, {"expert_model_parallel_size": 2}),
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "ep2 tp2": (4, {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "ep2 tp2 sequence": (
        4,
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "ep2 hsdp": (4, {"expert_model_parallel_size": 2, "num_distributed_optimizer_instances": 2, "zero_stage": 2}),
    "ep2 dp2 zero3": (4, {"expert_model_parallel_size": 2, "zero_stage": 3}),
    "ep2 dp2 zero0": (4, {"expert_model_parallel_size": 2, "zero_stage": 0}),
    **{f"ep2 zero{stage}": (2, {"expert_model_parallel_size": 2, "zero_stage": stage}) for stage in range(4)},
}


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), sampled(LAYOUTS, MODELS))
def test_equals_one_process(pool, layout: str, name: str):
    check(pool, name, layout, moe_permutation_async_comm="tp2" in layout)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "name"), sampled(["ep2 dp2", "ep2 tp2 sequence", "ep2 zero3"], MODELS))
def test_gathering_tokens_equals_one_process(pool, layout: str, name: str):
    check(pool, name, layout, moe_token_dispatcher_type="allgather", moe_permutation_async_comm="tp2" in layout)


def check(pool, name: str, layout: str, **more) -> None:
    expected, grads = in_one_process(name)
    ranks, given = LAYOUTS[layout]
    for facts, found in pool.run(on_ranks, ranks, name, given | more):
        for own, other in zip(facts, expected, strict=True):
            assert own == pytest.approx(other, rel=1e-5)
        assert found.keys() == grads.keys()
        for key in grads:
            torch.testing.assert_close(found[key], grads[key], rtol=1e-4, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


def in_low_precision(rank: int, world_size: int, given: dict):
    return train("softmax", world_size, {"expert_model_parallel_size": 2, "bf16": True, **given})[0]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_bfloat16(pool, dispatcher: str):
    expected, _ = in_one_process("softmax")
    for facts in pool.run(in_low_precision, 2, {"moe_token_dispatcher_type": dispatcher}):
        for (loss, norm, _), (other, other_norm, _) in zip(facts, expected, strict=True):
            assert loss == pytest.approx(other, rel=1e-2) and loss != other
            assert norm == pytest.approx(other_norm, rel=0.1)


# ---- checkpoints and weights -----------------------------------------------------------------------------------------


def save(rank: int, world_size: int, root: Path, given: dict) -> dict[str, Tensor]:
    _, _, (model, optimizer, layout) = train("softmax", world_size, given, steps=1)
    with CheckpointStore(location_of(root), group=layout.background) as store:
        store.save(1, model, optimizer, {})
    return values(model, optimizer)


def load(rank: int, world_size: int, root: Path, given: dict) -> dict[str, Tensor]:
    model, optimizer, layout, _ = build("softmax", world_size, given, seed=rank + 20)
    restore(location_of(root / "iter_0000001"), model, optimizer, group=layout.background)
    return values(model, optimizer)


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        found[name] = full(parameter.detach()).clone()
        for kind, value in optimizer.state.get(parameter, {}).items():
            found[f"{name}/{kind}"] = full(value).clone()
    return found


OTHERS = {
    "ep4": (4, {"expert_model_parallel_size": 4}),
    "dp2": (2, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "ep2 tp2": (4, {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "alone": (1, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "other"), sampled([0, 1, 3], OTHERS, per_row=2))
def test_checkpoints_change_layout(tmp_path: Path, pool, stage: int, other: str):
    at_ep2 = {"expert_model_parallel_size": 2, "zero_stage": stage}
    saved = pool.run(save, 4 if stage == 1 else 2, tmp_path, at_ep2)[0]
    assert any(name.endswith("experts.down.weight/exp_avg") for name in saved)
    ranks, given = OTHERS[other]
    for loaded in pool.run(load, ranks, tmp_path, given):
        assert loaded.keys() == saved.keys()
        assert [name for name in saved if not torch.equal(loaded[name], saved[name])] == []


class Held(Source):
    """Weights in memory."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights

    def names(self) -> list[str]:
        return list(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.weights[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self.weights[name].dtype

    def view(self, name: str) -> View:
        return Leaf(self.shape(name), self.weights[name].__getitem__)


def weights() -> dict[str, Tensor]:
    model = GPTModel(shape("softmax"))
    initialise(model, 11)
    return {name: p.detach() for name, p in model.named_parameters()}


def load_slices(rank: int, world_size: int, given: dict) -> tuple[dict[str, Tensor], int]:
    model, optimizer, _, _ = build("softmax", world_size, given)
    report = load_into(model, Held(weights()))
    return values(model, optimizer), report.elements


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ep2 tp2", "ep2 hsdp", "ep4"])
def test_weights_are_loaded_by_slices(pool, layout: str):
    expected = weights()
    for found, elements in pool.run(load_slices, *LAYOUTS[layout]):
        assert elements == sum(tensor.numel() for tensor in expected.values())
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
