"""Tiny models for tests: a block of interest inside an ordinary decoder."""

from __future__ import annotations

from typing import Any

from cordee.model.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise

RMS = NormConfig(kind="rms", eps=1e-6)
MLP = MLPConfig(ffn_hidden_size=32, activation="silu", gated=True)
VOCAB = 50


def attention(**changes: Any) -> AttentionConfig:
    """Six heads in two groups."""
    return AttentionConfig(**{"num_heads": 6, "num_kv_heads": 2, "head_dim": 8, "rope": RopeConfig(), **changes})


def latent_attention(**changes: Any) -> LatentAttentionConfig:
    """Three heads; rotary and value dims differ."""
    shape = {"num_heads": 3, "q_lora_rank": 10, "kv_lora_rank": 12}
    dims = {"nope_head_dim": 6, "rope_head_dim": 4, "v_head_dim": 5}
    return LatentAttentionConfig(**{**shape, **dims, "norm": RMS, "rope": RopeConfig(), "scale": 0.3, **changes})


def layer(block: AttentionConfig | LatentAttentionConfig | None = None, **changes: Any) -> LayerConfig:
    return LayerConfig(**{"attention": block or attention(), "mlp": MLP, "norm": RMS, **changes})


def config(*layers: LayerConfig, **changes: Any) -> ModelConfig:
    """A model of these layers, or of two ordinary ones. Weights are large, so that every block is felt."""
    shape = {"vocab_size": VOCAB, "hidden_size": 24, "max_position_embeddings": 128, "init_std": 0.3}
    return ModelConfig(**{**shape, "layers": layers or (layer(), layer()), "final_norm": RMS, **changes})


def model(config: ModelConfig, seed: int = 0) -> GPTModel:
    """Initialised and in evaluation mode."""
    model = GPTModel(config)
    initialise(model, seed)
    return model.eval()
