"""Tiny models with everything that a layout has to get right, and a short training of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from cordee.data.batch import Batch
from cordee.model.balance import Balance
from cordee.model.config import (
    AttentionConfig,
    BalanceConfig,
    LatentAttentionConfig,
    LayerConfig,
    LogNScaling,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    QKNormConfig,
    RopeConfig,
    RouterConfig,
)
from cordee.model.gpt import GPTModel
from cordee.model.head import Head
from cordee.model.init import initialise
from cordee.ops.dropout import DropoutRNG
from cordee.optim.build import build_optimizer, set_rates
from cordee.optim.clip import global_norm, gradients
from cordee.parallel import apply, collectives, context, data, laws, wrapper
from cordee.parallel.degrees import degrees
from cordee.parallel.layout import Layout
from cordee.parallel.wrapper import Wrapper
from cordee.train.options import TrainConfig

SAMPLES, LENGTH, VOCAB = 4, 16, 53
RMS, LAYER = NormConfig(kind="rms", eps=1e-5), NormConfig(kind="layer", eps=1e-5)
SWIGLU = MLPConfig(ffn_hidden_size=48, activation="silu", gated=True)


def attention(**changes: Any) -> AttentionConfig:
    return AttentionConfig(**{"num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope": RopeConfig(), **changes})


def model(*layers: LayerConfig, **changes: Any) -> ModelConfig:
    options = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": LENGTH, "final_norm": RMS, **changes}
    return ModelConfig(layers=layers, **options)


def layer(**changes: Any) -> LayerConfig:
    return LayerConfig(**{"attention": attention(), "mlp": SWIGLU, "norm": RMS, **changes})


def _gpt2() -> ModelConfig:
    one = layer(
        attention=attention(num_kv_heads=4, rope=None, qkv_bias=True, out_bias=True),
        mlp=MLPConfig(ffn_hidden_size=64, activation="gelu_tanh", gated=False, bias=True),
        norm=LAYER,
    )
    dropout = {"embedding_dropout": 0.1, "attention_dropout": 0.1, "hidden_dropout": 0.1}
    return model(one, one, final_norm=LAYER, learned_positions=True, tie_word_embeddings=True, **dropout)


def _latent() -> ModelConfig:
    def one(q_lora_rank: int | None) -> LayerConfig:
        latent = LatentAttentionConfig(
            num_heads=4,
            q_lora_rank=q_lora_rank,
            kv_lora_rank=12,
            nope_head_dim=8,
            rope_head_dim=4,
            v_head_dim=6,
            norm=RMS,
            rope=RopeConfig(),
            scale=12**-0.5,
        )
        return layer(attention=latent)

    return model(one(None), one(10))


def moe(**changes: Any) -> MoEConfig:
    options = {
        "router": RouterConfig(num_experts=4, top_k=2, normalise=True),
        "expert": MLPConfig(ffn_hidden_size=16, activation="silu", gated=True),
        "balance": BalanceConfig(expert=0.01, z=0.001),
        **changes,
    }
    return MoEConfig(**options)


def _mixture() -> ModelConfig:
    router = RouterConfig(num_experts=4, top_k=2, score="sigmoid", normalise=True, scale=1.5, correction_bias=True)
    shared = moe(router=router, shared=SWIGLU, shared_gate=True)
    biased = moe(
        router=RouterConfig(num_experts=4, top_k=1, score_when="after", bias=True),
        expert=MLPConfig(ffn_hidden_size=16, activation="swiglu_clamped", gated=True, bias=True, limit=7.0),
    )
    return model(layer(), layer(mlp=shared), layer(mlp=biased, attention=attention(sinks=True)))


MODELS: dict[str, ModelConfig] = {
    "llama": model(layer(), layer()),
    "tied": model(layer(), layer(), tie_word_embeddings=True),
    "gpt2": _gpt2(),
    "bloom": model(
        layer(attention=attention(num_kv_heads=4, rope=None, alibi=True, qkv_bias=True), norm=LAYER),
        layer(attention=attention(num_kv_heads=4, rope=None, alibi=True), norm=LAYER),
        embedding_norm=LAYER,
    ),
    "gemma": model(
        layer(norm_placement="sandwich", attention=attention(window=5, softcap=20.0, scale=0.3)),
        layer(norm_placement="sandwich", attention=attention(softcap=20.0)),
        embedding_scale=5.0,
        logit_softcap=10.0,
    ),
    "qk norm": model(
        layer(attention=attention(qk_norm=QKNormConfig(norm=RMS))),
        layer(
            attention=attention(qk_norm=QKNormConfig(norm=RMS, over="all"), query_scaling=LogNScaling(length=8)),
            norm_placement="post",
        ),
        norm_head=True,
        logit_scale=0.5,
    ),
    "values": model(layer(), layer(), score=True),
    "latent": _latent(),
    "mixture": _mixture(),
}


def options(**given: Any) -> TrainConfig:
    return TrainConfig(**{"seq_length": LENGTH, "lr": 1e-3, **given})


def build(
    config: ModelConfig, world_size: int, wrappers: Sequence[Wrapper] = (), **given: Any
) -> tuple[GPTModel, Layout, TrainConfig]:
    settings = options(**given)
    layout = Layout(degrees(settings, world_size))
    found = [
        *laws.check(laws.PlacedRun(model=config, degrees=layout.degrees, options=settings)),
        *wrapper.check(wrappers, settings),
    ]
    assert not found, found
    built = apply.apply(GPTModel(config, device="meta"), layout, settings, torch.device("cpu"), wrappers)
    initialise(built, 7)
    return built, layout, settings


def traced():
    """A context in which torch.compile traces and differentiates, but makes no kernels, which takes minutes."""
    return mock.patch.object(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(built: GPTModel, layout: Layout, config: TrainConfig, steps: int = 2) -> dict[str, Any]:
    """Losses and gradient norms of some steps on the same samples, and all gradients of the first."""
    optimizer = build_optimizer(config, built.named_parameters(), built.parameter_specs(), fused=True)
    tokens = torch.randint(0, VOCAB, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    per_rank = SAMPLES // layout.data_size
    first = layout.data_rank * per_rank
    parts = [(first + n, part) for n, part in enumerate(tokens[first:][:per_rank].split(1))]
    count = SAMPLES * LENGTH
    found: dict[str, Any] = {"losses": [], "norms": [], "grads": {}}
    for step in range(steps):
        total = torch.zeros(())
        for index, (sample, part) in enumerate(parts):
            data.begin_micro_batch(built, config.zero_stage, last=index == len(parts) - 1)
            whole = Batch(part[:, :-1].contiguous(), part[:, 1:].contiguous(), samples=torch.tensor([sample]))
            batch = context.shard(whole, layout, config)
            loss, values = built(
                batch.input_ids,
                position_ids=batch.position_ids,
                balance=Balance(LENGTH / count),
                dropout_rng=DropoutRNG(1, batch.samples),
                output=partial(_loss, labels=batch.labels),
            )
            loss = loss if values is None else loss + values.square().sum()
            (loss / count).backward()
            total += loss.detach()
        if step == 0:
            found["grads"] = {name: full(p.grad) for name, p in built.named_parameters() if p.grad is not None}
        found["losses"].append(collectives.sum_over(total, layout).item() / count)
        found["norms"].append(global_norm(gradients(built.parameters())).item())
        set_rates(optimizer, config.lr, 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return found


def _loss(head: Head, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The sum of the cross entropy, and the values of all tokens where there is a head for them."""
    return head.loss(hidden, labels)[0], None if head._values is None else head.scores(hidden)


@functools.cache
def train_alone(name: str) -> dict[str, Any]:
    """`train` of a model of `MODELS` in this process; not to be changed."""
    return train(*build(MODELS[name], 1))


def train_on_ranks(rank: int, world_size: int, name: str, given: dict[str, Any]) -> dict[str, Any]:
    """For the pool: `train` of a model of `MODELS`."""
    return train(*build(MODELS[name], world_size, **given))
