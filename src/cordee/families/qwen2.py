"""Qwen 1.5, 2 and 2.5, and CodeQwen 1.5.

LLaMA's form with biases on queries, keys and values (Bai et al. 2023; Yang et al. 2024); the smaller ones tie the head.
Longer texts than trained on are reached with YaRN."""

from cordee.families import common
from cordee.families.family import Family
from cordee.families.reader import ConfigReader
from cordee.model.config import ModelConfig


def read(hf: ConfigReader) -> ModelConfig:
    attention = common.read_attention(hf, common.read_heads(hf, groups=32), qkv_bias=True)
    return common.read_model(hf, common.windowed(common.read_layers(hf, attention), read_windows(hf)))


def read_windows(hf: ConfigReader) -> list[int | None]:
    """The window of every layer; without `layer_types` those from `max_window_layers` on have one, despite its name."""
    hf.value("sliding_window", None)  # given in most files, but without meaning unless the next key says so
    window = common.read_window(hf, 4096) if hf.flag("use_sliding_window", False) else None
    first = hf.number("max_window_layers", 28)
    return common.read_windows(hf, window, lambda layer: layer >= first)


FAMILY = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM", "Qwen2Model", "Qwen2ForSequenceClassification"),
    read=read,
    ignored=common.FREQUENCIES,
    plain=True,
)
