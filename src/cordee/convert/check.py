"""Checks of the options of `cordee convert`.

Owns what options mean for each other, for the files to read and for their model; options of older converters that only
restate files or model are compared with them here."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cordee.checkpoint.formats import Format
from cordee.checkpoint.storage import is_url, local_path
from cordee.config import laws
from cordee.config.option import to_flag
from cordee.config.spelling import unknown
from cordee.convert.options import ConvertConfig
from cordee.errors import Problem, Problems, requires
from cordee.files import is_within
from cordee.model.config import AttentionConfig

if TYPE_CHECKING:
    from cordee.families.registry import ModelSpec
    from cordee.weights.megatron.source import MegatronSource

_ALIKE = "aquila baichuan bloom gemma gemma2 grok internlm2 minicpm mixtral qwen".split()
FAMILIES = {name: {name} for name in _ALIKE} | {  # of --model-type-hf
    "baichuan2": {"baichuan"},
    "chatglm3": {"chatglm", "glm", "glm4"},
    "deepseek2": {"deepseek_v2"},
    "llama2": {"llama", "aquila", "internlm", "internlm3", "mistral", "qwen2"},
    "minicpm-moe": {"minicpm"},
}


def target_type(options: ConvertConfig) -> str:
    """The format to write."""
    return options.save_model_type or ("mg" if options.saver else "hf")


def not_default(options: ConvertConfig, *names: str) -> dict[str, object]:
    """The values of the options of these names, by flag, that are not the defaults."""
    changed = laws.changed_options(options)
    return {to_flag(name): getattr(options, name) for name in names if name in changed}


def check_options(options: ConvertConfig) -> Problems:
    """What options contradict by themselves."""
    if is_url(options.save_dir):
        fix = "give a local directory, and copy it there"
        yield Problem("--save-dir", options.save_dir, "a conversion writes no URL", fix)
    yield from laws.problems(options)
    read = local_path(options.load_dir)
    if read is not None and is_within(options.save_dir, read):
        why, fix = "it is the directory that is read, or in it", "give another directory"
        yield Problem("--save-dir", options.save_dir, why, fix, "excludes", ("load_dir",))
    if (file := options.tokenizer_model) not in (None, "None") and not os.path.exists(file):  # as scripts write it
        yield Problem("--tokenizer-model", file, "there is no such file", "check the path", "missing")
    yield from stated(options, {"model_type": "GPT"}, "every model here")


def stated(options: ConvertConfig, found: Mapping[str, object], what: str) -> Problems:
    """Options, by name, that only state what is `found` of `what`, and state something else."""
    for name, value in found.items():
        given = getattr(options, name)
        if given not in (None, value):
            has = f"does {'' if value else 'not '}have it" if isinstance(value, bool) else f"has {value}"
            why, fix = f"{what} {has}", "leave it out, or give another model"
            yield Problem(to_flag(name), given, why, fix, "stated", ("load_dir", "model"), value)


_OF_MEGATRON = (  # options that matter only where a Megatron checkpoint is read
    "model",
    "load_from_legacy",
    "src_tensor_model_parallel_size",
    "src_pipeline_model_parallel_size",
    "true_vocab_size",
    "vocab_file",
)


def check_format(form: Format, options: ConvertConfig) -> Problems:
    """Options that say what must be there to read, or matter only for a Megatron checkpoint."""
    yield from stated(options, {"load_model_type": form.name}, f"{options.load_dir}, a {form.title},")
    if form.name == "mg":
        return
    if options.use_mcore_models and target_type(options) not in ("mg", "ascendspeed"):
        why = "neither what is read nor what is written is of Megatron"
        yield from requires("--use-mcore-models", True, "--save-model-type mg", why, "save_model_type", "load_dir")
    for flag, value in {**not_default(options, *_OF_MEGATRON), "--no-checking": not options.checking}.items():
        yield from requires(flag, value, "a Megatron checkpoint", f"what is read is a {form.title}", "load_dir")


def check_dialect(source: "MegatronSource", options: ConvertConfig) -> Problems:
    """What options say of the format that is read; --use-mcore-models does where no Megatron checkpoint is written."""
    layout, legacy = source.layout, source.dialect.nested != ()
    ranks = {"src_tensor_model_parallel_size": layout.tensor, "src_pipeline_model_parallel_size": layout.pipeline}
    yield from stated(options, ranks, options.load_dir)
    why = f"{options.load_dir} is of {source.dialect.title}"
    if options.load_from_legacy and not legacy:
        yield Problem("--load-from-legacy", True, why, "leave it out", "stated", ("load_dir",))
    if options.use_mcore_models and legacy and not options.load_from_legacy and target_type(options) == "hf":
        fix = "leave it out, or add --load-from-legacy"
        yield Problem("--use-mcore-models", True, why, fix, "stated", ("load_dir", "load_from_legacy"))


def _traits(spec: "ModelSpec") -> dict[str, object]:
    """What options state of a model, by their names."""
    layers = spec.config.layers
    attentions = [layer.attention for layer in layers if isinstance(layer.attention, AttentionConfig)]
    return {
        "add_qkv_bias": any(attention.qkv_bias for attention in attentions),
        "add_dense_bias": any(attention.out_bias for attention in attentions),
        "embed_layernorm": spec.config.embedding_norm is not None,
        "post_norm": any(layer.norm_placement == "sandwich" for layer in layers),
        "w_pack": any(".W_pack." in name for rule in spec.rules().values() for name in rule.foreign),
    }


def check_model(spec: "ModelSpec", options: ConvertConfig) -> Problems:
    """What options say of the model that is not so."""
    if (given := options.model_type_hf) is not None:
        known = FAMILIES.get(given)
        if known is None:
            yield unknown("--model-type-hf", given, FAMILIES, "no such name")
        elif spec.family.name not in known:
            why = f"the model is of family {spec.family.name}"
            yield Problem("--model-type-hf", given, why, "leave it out, or give another model", "stated")
    yield from stated(options, _traits(spec), "the model")
