"""Gemma.

Like LLaMA, with the tanh form of GELU in the gated MLP, a tied head, embeddings scaled by the root of their size, heads
of a size of their own, and norm weights stored as the distance from one (Gemma Team 2024)."""

import math
from dataclasses import replace
from typing import Any

from cordee.families import common
from cordee.families.family import Family
from cordee.families.reader import ConfigReader
from cordee.model.config import AttentionConfig, LayerConfig, MLPConfig, ModelConfig, NormConfig

TANH = common.names_of("gelu_tanh")


def read(hf: ConfigReader) -> ModelConfig:
    heads, bias = common.read_heads(hf, head_dim=256, groups=16), hf.flag("attention_bias", False)
    return read_model(hf, read_layers(hf, common.read_attention(hf, heads, bias)))


def read_norm(hf: ConfigReader) -> NormConfig:
    return replace(common.read_norm(hf), unit_offset=True)


def read_mlp(hf: ConfigReader) -> MLPConfig:
    activation = hf.choice("hidden_activation", TANH, "gelu_pytorch_tanh")
    # The first files say "gelu" under the older key and mean its tanh form, with which the models were trained.
    hf.choice("hidden_act", {**TANH, "gelu": "gelu_tanh"}, "gelu_pytorch_tanh")
    return MLPConfig(ffn_hidden_size=hf.integer("intermediate_size"), activation=activation, gated=True)


def read_layers(hf: ConfigReader, attention: AttentionConfig, **more: Any) -> list[LayerConfig]:
    return common.read_layers(hf, attention, mlp=read_mlp(hf), norm=read_norm(hf), **more)


def read_model(hf: ConfigReader, layers: list[LayerConfig], **more: Any) -> ModelConfig:
    scale = math.sqrt(hf.integer("hidden_size"))
    tied = hf.flag("tie_word_embeddings", True)
    return common.read_model(hf, layers, embedding_scale=scale, tie_word_embeddings=tied, **more)


FAMILY = Family(
    name="gemma", architectures=("GemmaForCausalLM", "GemmaModel", "GemmaForSequenceClassification"), read=read
)
