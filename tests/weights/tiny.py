"""Tiny models on disk, made without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cordee.families.registry import ModelSpec, spec_from_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 61,
    "n_embd": 24,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-5,
}
MODELS = {"llama": LLAMA, "llama tied": {**LLAMA, "tie_word_embeddings": True}, "gpt2": GPT2}


def tensors_of(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random foreign tensors of a model."""
    generator = torch.Generator().manual_seed(0)
    shapes, made = spec.shapes(), {}
    for name, rule in spec.rules().items():
        for foreign, shape in zip(rule.foreign, rule.foreign_shapes(shapes[name]), strict=True):
            made[foreign] = torch.randn(shape, generator=generator).to(dtype)
    return made


def canonical_of(spec: ModelSpec, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The canonical tensors made of foreign ones."""
    return {name: rule.forward([tensors[f] for f in rule.foreign]) for name, rule in spec.rules().items()}


def save(directory: Path, hf: dict, tensors: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Write a Hugging Face directory with one safetensors file; its tensors."""
    tensors = tensors_of(spec_from_hf(hf)) if tensors is None else tensors
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def shard(directory: Path, tensors: dict[str, Tensor], count: int = 3, suffix: str = "safetensors") -> list[Path]:
    """Write tensors in `count` shards with an index; the shards."""
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    names, weight_map, paths = list(tensors), {}, []
    for number in range(count):
        path = directory / f"{stem}-{number + 1:05d}-of-{count:05d}.{suffix}"
        part = {name: tensors[name] for name in names[number::count]}
        save_file(part, path) if suffix == "safetensors" else torch.save(part, path)
        weight_map |= dict.fromkeys(part, path.name)
        paths.append(path)
    (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return paths
