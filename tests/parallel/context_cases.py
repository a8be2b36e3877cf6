"""What the tests of context parallelism share: layouts, documents of a sequence and small models of every kind."""

from __future__ import annotations

from dataclasses import replace

import torch

from cordee.model.config import (
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    DynamicNTKScaling,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    NormConfig,
    RopeConfig,
    RouterConfig,
)
from cordee.train.options import TrainConfig

CPU = torch.device("cpu")
BATCH, LENGTH, VOCAB = 2, 32, 53

ULYSSES = {"context_parallel_algo": "ulysses_cp_algo"}
RING = {"context_parallel_algo": "megatron_cp_algo"}
HYBRID = {"context_parallel_algo": "hybrid_cp_algo", "ulysses_degree_in_cp": 2}
OVERLAP = {"use_cp_send_recv_overlap": True}
LAYOUTS = {
    "ulysses2": (2, ULYSSES),
    "ulysses4": (4, ULYSSES),
    "ulysses4 gathering": (4, {**ULYSSES, "kv_head_repeat_before_uly_alltoall": False}),
    "ring2": (2, RING),
    "ring4": (4, {**RING, **OVERLAP}),
    "double ring4": (4, {**RING, "cp_window_size": 2}),
    "double ring4 overlapped": (4, {**RING, **OVERLAP, "cp_window_size": 2}),
    "hybrid4": (4, HYBRID),
}


def options(ranks: int = 1, **given) -> TrainConfig:
    return TrainConfig(**{"seq_length": LENGTH, "lr": 1e-2, "context_parallel_size": ranks, **given})


def documents() -> torch.Tensor:
    """Two sequences of several documents, some of which lie over the borders of every rank."""
    return torch.stack([torch.arange(LENGTH) // 7, (torch.arange(LENGTH) >= 13).long()])


def positions() -> torch.Tensor:
    """As they begin anew in every document."""
    ids, place = documents(), torch.arange(LENGTH).expand(BATCH, -1)
    return place - torch.stack([(row[:, None] > row[None]).sum(1) for row in ids])


NORM = NormConfig(kind="rms", eps=1e-5)
DENSE = MLPConfig(ffn_hidden_size=48, activation="silu", gated=True)
GROUPED = AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=4, rope=RopeConfig())
STRETCHED = DynamicNTKScaling(factor=2.0, original_max_position_embeddings=8)
LATENT = LatentAttentionConfig(
    num_heads=8,
    q_lora_rank=None,
    kv_lora_rank=12,
    nope_head_dim=4,
    rope_head_dim=4,
    v_head_dim=6,
    rope=RopeConfig(),
    norm=NORM,
    scale=0.3,
)


def mixture(drop: str, pad: bool = False) -> MoEConfig:
    return MoEConfig(
        router=RouterConfig(num_experts=4, top_k=2, normalise=True),
        expert=replace(DENSE, ffn_hidden_size=16),
        balance=BalanceConfig(expert=0.1, z=0.01, per_sequence=True),
        capacity=CapacityConfig(factor=0.7, drop=drop, pad=pad),
    )


def shape(attention=GROUPED, mlp=DENSE, **given) -> ModelConfig:
    layer = LayerConfig(attention=attention, mlp=mlp, norm=NORM)
    defaults = {"vocab_size": VOCAB, "hidden_size": 32, "max_position_embeddings": LENGTH}
    return ModelConfig(**{**defaults, "layers": (layer, layer), "final_norm": NORM, **given})


MODELS = {
    "grouped": shape(),
    "alibi": shape(AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=4, alibi=True)),
    "learned positions": shape(replace(GROUPED, rope=None), learned_positions=True),
    "windows and sinks": shape(replace(GROUPED, window=7, sinks=True)),
    "chunks": shape(replace(GROUPED, chunk=6)),
    "softcap": shape(replace(GROUPED, softcap=2.0)),
    "latent": shape(LATENT),
    "stretched by length": shape(replace(GROUPED, rope=RopeConfig(scaling=STRETCHED))),
    "mixture": shape(mlp=mixture("probs")),
    "mixture, first tokens": shape(mlp=mixture("position", pad=True)),
}
