"""Tiny bases in Hugging Face's format, PEFT's models of them, and runs that train adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from cordee.config.load import load_config
from cordee.convert import job as convert_job
from cordee.convert.options import ConvertConfig
from cordee.families.registry import spec_from_hf
from cordee.train.options import TrainConfig
from tests.train import tiny
from tests.weights import models
from tests.weights import tiny as saved

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "zero3": {"zero_stage": 3},
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**models.MODELS["llama"], "num_hidden_layers": 2},
    "tied": {**models.MODELS["llama tied"], "num_hidden_layers": 2},
    "mixtral": {**models.MODELS["mixtral"], "num_hidden_layers": 2, "router_aux_loss_coef": 0.0},
    "gpt_oss": {
        **models.MODELS["mixtral"],
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_hidden_layers": 2,
        "head_dim": 8,
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "glm": {
        **models.MODELS["llama"],
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "num_hidden_layers": 2,
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
        "pad_token_id": 0,
    },
    "bloom": {**models.MODELS["bloom"], "n_layer": 2},
    "gpt2": {**models.MODELS["gpt2"], "n_layer": 2, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_OF_MODEL = {*tiny.MODEL}


def base(folder: Path, name: str, seed: int = 0) -> Path:
    """A model with weights of the usual size, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    made = saved.tensors_of(spec_from_hf(MODELS[name]))
    made = {key: 1 + 0.1 * value if "norm" in key or "ln" in key else 0.15 * value for key, value in made.items()}
    made = {key: value.roll(seed) for key, value in made.items()}
    saved.save(folder / name, MODELS[name], made)
    return folder / name


def config(folder: Path, load: Path, **options: Any) -> TrainConfig:
    """Ten steps of AdamW at a constant rate, over the weights at `load`."""
    given = {
        "train_iters": 10,
        "micro_batch_size": 8,
        "lr_decay_style": "constant",
        "lr_warmup_iters": 0,
        "clip_grad": 0.0,
        "save_interval": 5,
        **options,
    }
    common = vars(tiny.config(folder, **given))
    kept = {key: value for key, value in common.items() if key not in _OF_MODEL}
    return TrainConfig(**{**kept, "load": str(load)})


def peft_model(load: Path, lora: Any = None, adapter: Path | None = None) -> Any:
    """The model at `load` with new adapters as `lora` has them, or with those in `adapter`."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(load, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        trains = not peft.PeftConfig.from_pretrained(adapter).is_prompt_learning  # which it only runs
        return peft.PeftModel.from_pretrained(model, adapter, is_trainable=trains)
    return peft.get_peft_model(model, lora)


def convert(load: object, save: Path, *flags: object) -> Path:
    words = ["--load-dir", str(load), "--save-dir", str(save), *map(str, flags)]
    convert_job.run(load_config(ConvertConfig, words).config)
    return save


def factors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")
