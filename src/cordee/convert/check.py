"""What `cordee convert` is told, held against itself, against what there is to read, and against the model in it.

Owns these checks. Options of older converters that state what could not be known there are checked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cordee.checkpoint.storage import is_url
from cordee.config.option import to_flag
from cordee.config.schema import ConvertConfig
from cordee.convert.formats import Format
from cordee.errors import Problem
from cordee.families.reader import nearest
from cordee.model.config import AttentionConfig, LayerConfig

if TYPE_CHECKING:
    from cordee.families.registry import ModelSpec
    from cordee.weights.megatron.source import MegatronSource

FAMILIES = {  # of --model-type-hf
    "aquila": {"aquila"},
    "baichuan": {"baichuan"},
    "baichuan2": {"baichuan"},
    "bloom": {"bloom"},
    "chatglm3": {"chatglm", "glm", "glm4"},
    "deepseek2": {"deepseek_v2"},
    "gemma": {"gemma"},
    "gemma2": {"gemma2"},
    "grok": {"grok"},
    "internlm2": {"internlm2"},
    "llama2": {"llama", "aquila", "internlm", "internlm3", "mistral", "qwen2"},
    "minicpm": {"minicpm"},
    "minicpm-moe": {"minicpm"},
    "mixtral": {"mixtral"},
    "qwen": {"qwen"},
}


def target_type(options: ConvertConfig) -> str:
    """The format to write."""
    return options.save_model_type or ("mg" if options.saver else "hf")


def check_options(options: ConvertConfig) -> Iterator[Problem]:
    """What options contradict by themselves."""
    if is_url(options.save_dir):
        fix = "give a local directory, and copy it there"
        yield Problem("--save-dir", options.save_dir, "a conversion writes no URL", fix)
    if Path(options.load_dir).resolve() == Path(options.save_dir).resolve():
        why = "it is the directory that is read"
        yield Problem("--save-dir", options.save_dir, why, "give another directory")
    if options.model_type != "GPT":
        yield Problem("--model-type", options.model_type, "there are only decoders", "give --model-type GPT")
    if options.vocab_file is not None and options.true_vocab_size is not None:
        yield Problem("--vocab-file", options.vocab_file, "--true-vocab-size says it too", "give one of the two")
    if options.lora_load is None:
        for name in ("lora_r", "lora_alpha", "lora_target_modules"):
            if getattr(options, name) is not None:
                fix = "give it with --lora-load, or leave this out"
                yield Problem(to_flag(name), None, "there is no adapter", fix)
    if options.save_to_legacy and not options.use_mcore_models:
        why = "without --use-mcore-models the legacy format is what there is"
        yield Problem("--save-to-legacy", True, why, "add --use-mcore-models, or leave it out")


def check_format(form: Format, options: ConvertConfig) -> Iterator[Problem]:
    """Options that say what must be there to read, or matter only for a Megatron checkpoint."""
    if options.load_model_type not in (None, form.name):
        why = f"{options.load_dir} is a {form.title}"
        yield Problem("--load-model-type", options.load_model_type, why, "leave it out, or give another directory")
    if form.name == "mg":
        return
    if options.use_mcore_models and target_type(options) not in ("mg", "ascendspeed"):
        why = "neither what is read nor what is written is of Megatron"
        yield Problem("--use-mcore-models", True, why, "leave it out, or give --save-model-type mg")
    for flag, given in (
        ("--model", options.model),
        ("--no-checking", None if options.checking else True),
        ("--load-from-legacy", options.load_from_legacy or None),
        ("--src-tensor-model-parallel-size", options.src_tensor_model_parallel_size),
        ("--src-pipeline-model-parallel-size", options.src_pipeline_model_parallel_size),
        ("--true-vocab-size", options.true_vocab_size),
        ("--vocab-file", options.vocab_file),
    ):
        if given is not None:
            why = f"it has no meaning for a {form.title}"
            yield Problem(flag, given, why, "leave it out, or give a Megatron checkpoint")


def check_dialect(source: MegatronSource, options: ConvertConfig) -> Iterator[Problem]:
    """What options say of the format that is read; --use-mcore-models does where no Megatron checkpoint is written."""
    for flag, given, found in (
        ("--src-tensor-model-parallel-size", options.src_tensor_model_parallel_size, source.layout.tensor),
        ("--src-pipeline-model-parallel-size", options.src_pipeline_model_parallel_size, source.layout.pipeline),
    ):
        if given not in (None, found):
            yield Problem(flag, given, f"{options.load_dir} has {found}", "leave it out")
    legacy, why = source.dialect.nested != (), f"{options.load_dir} is of {source.dialect.title}"
    if options.load_from_legacy and not legacy:
        yield Problem("--load-from-legacy", True, why, "leave it out")
    if options.use_mcore_models and legacy and not options.load_from_legacy and target_type(options) == "hf":
        yield Problem("--use-mcore-models", True, why, "leave it out, or add --load-from-legacy")


def _attention(holds: Callable[[AttentionConfig], bool]) -> Callable[[ModelSpec], bool]:
    def test(spec: ModelSpec) -> bool:
        attentions = [layer.attention for layer in spec.config.layers]
        return any(isinstance(attention, AttentionConfig) and holds(attention) for attention in attentions)

    return test


def _sandwich(layer: LayerConfig) -> bool:
    return layer.norm_placement == "sandwich"


TRAITS: dict[str, Callable[[ModelSpec], bool]] = {
    "add_qkv_bias": _attention(lambda attention: attention.qkv_bias),
    "add_dense_bias": _attention(lambda attention: attention.out_bias),
    "embed_layernorm": lambda spec: spec.config.embedding_norm is not None,
    "post_norm": lambda spec: any(_sandwich(layer) for layer in spec.config.layers),
    "w_pack": lambda spec: any(".W_pack." in name for rule in spec.rules().values() for name in rule.foreign),
}


def check_model(spec: ModelSpec, options: ConvertConfig) -> Iterator[Problem]:
    """What options say of the model that is not so."""
    if (given := options.model_type_hf) is not None:
        known = FAMILIES.get(given)
        if known is None:
            yield Problem("--model-type-hf", given, f"no such name; {nearest(given, FAMILIES)}", "take one of these")
        elif spec.family.name not in known:
            why = f"the model is of family {spec.family.name}"
            yield Problem("--model-type-hf", given, why, "leave it out, or give another model")
    for name, holds in TRAITS.items():
        stated = getattr(options, name)
        if stated is not None and stated != holds(spec):
            why = f"the model does {'not ' if stated else ''}have it"
            yield Problem(to_flag(name), stated, why, "leave it out, or give another model")
