"""What `cordee convert` writes: from its options to a format, a layout and files.

Owns the table of formats that are written, and the meaning of the options of MindSpeed-LLM's and AscendSpeed's
converters. The formats themselves are codecs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cordee.checkpoint import dcp
from cordee.checkpoint.source import CheckpointSource
from cordee.config.values import whole_numbers
from cordee.convert.check import not_default, target_type
from cordee.convert.options import ConvertConfig
from cordee.errors import Problem, ProblemError, Problems, excludes, raise_all, requires
from cordee.weights import hf, mindformers, peft_parameters
from cordee.weights.adapter import check_whole
from cordee.weights.codec import PlannedFile, Sink, Source
from cordee.weights.gguf import codec as gguf
from cordee.weights.gguf.vocabulary import compare_tokenizers
from cordee.weights.megatron import core, legacy
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.layout import Wanted
from cordee.weights.megatron.sink import MegatronSink, Target, plan
from cordee.weights.staged_sink import Output
from cordee.weights.staging import check_output


@dataclass(frozen=True)
class Prepared:
    """Output that is laid out and not begun: its files, and the sink to be opened.

    dtypes: by canonical name, what is written.
    expected: what has to be read back, where that is not to the bit what there was; None: the source itself.
    compare_tokenizers: how the tokenizer that is read back differs from that of the source, None if it does not; where
        the format does not copy it as it is."""

    files: list[PlannedFile]
    dtypes: Mapping[str, torch.dtype]
    open: Callable[[], Sink]
    expected: Source | None = None
    compare_tokenizers: Callable[[Path, Path], str | None] | None = None


Dtypes = dict[str, torch.dtype]  # of canonical parameters, as they are written


def prepare(source: Source, path: Path, options: ConvertConfig) -> Prepared:
    """Lay the output out. ProblemError with everything that stands against it."""
    check_output(path.absolute(), overwrite=options.overwrite)
    target, kind = TARGETS[target_type(options)], target_type(options)
    if source.spec.config.lm_head and kind != "peft":
        source.drop_values("--load-dir")
    wanted = getattr(torch, options.params_dtype) if options.params_dtype else None
    dtypes = {name: wanted or source.dtype(name) for name in source.names()}
    output = Output(path, source.assets, options.workers, options.overwrite)
    if source.spec.config.score and kind not in ("hf", "dcp", "peft"):
        why, fix = "it has no place for the value head of a reward model", "give --save-model-type hf"
        raise ProblemError.of("--save-model-type", kind, why, fix, "reward model", ("load_dir",))
    if target is not _prepare_peft:
        raise_all(check_whole(source.spec.config))
    if target is not _prepare_megatron:
        raise_all(_misplaced(options))
    return target(source, output, dtypes, options)


def _prepare_unsplit(source: Source, output: Output, dtypes: Dtypes, options: ConvertConfig) -> Prepared:
    kind = target_type(options)
    raise_all(hf.check_heads(source.spec))
    if kind == "dcp":
        sink = partial(dcp.DistributedSink, output, source.spec, dtypes)
        return Prepared(dcp.planned_files(source.spec, dtypes), dtypes, sink)
    if kind == "mindformers":
        mindformers.check(source.spec)
    rename = mindformers.renamed if kind == "mindformers" else str
    sink = partial(hf.HFSink, output, source.spec, dtypes, rename=rename)
    return Prepared(hf.planned_files(source.spec, dtypes), dtypes, sink)


_SPLITTING = (
    "target_tensor_parallel_size",
    "target_pipeline_parallel_size",
    "target_expert_parallel_size",
    "num_layer_list",
    "num_layers_per_virtual_pipeline_stage",
    "make_vocab_size_divisible_by",
    "moe_grouped_gemm",
    "save_to_legacy",
    "tokenizer_model",
    "transformer_impl",
)


def _misplaced(options: ConvertConfig) -> Problems:
    """Options that mean nothing for files that are not split."""
    for flag, value in not_default(options, *_SPLITTING).items():
        why = f"{target_type(options)} is not split"
        yield from requires(flag, value, "--save-model-type mg", why, "save_model_type")


def _prepare_peft(source: Source, output: Output, dtypes: Dtypes, options: ConvertConfig) -> Prepared:
    if not isinstance(source, CheckpointSource) or source.base is None:
        why, fix = "what is read are no adapters of a run", "give what training with --lora-target-modules has saved"
        raise ProblemError.of("--save-model-type", "peft", why, fix, "whole", ("load_dir",))
    tensors, settings = peft_parameters.to_peft(source.spec, source.tensor)
    tensors = {name: tensor.to(next(iter(dtypes.values()))) for name, tensor in tensors.items()}
    files = [PlannedFile(peft_parameters.TENSORS, sum(tensor.nbytes for tensor in tensors.values()))]
    settings |= {"base_model_name_or_path": source.base["path"]}
    return Prepared(files, dtypes, partial(peft_parameters.PeftSink, output, tensors, settings))


def _prepare_gguf(source: Source, output: Output, dtypes: Dtypes, options: ConvertConfig) -> Prepared:
    laid_out = gguf.plan(source.spec, dtypes, source.assets)
    sink, expected = partial(gguf.GGUFSink, output, laid_out), gguf.Held(laid_out, source)
    return Prepared(laid_out.files(), laid_out.dtypes, sink, expected, compare_tokenizers)


def _prepare_megatron(source: Source, output: Output, dtypes: Dtypes, options: ConvertConfig) -> Prepared:
    laid_out = plan(source.spec, dtypes, megatron_target(options))
    return Prepared(laid_out.files(), dtypes, partial(MegatronSink, output, laid_out))


def megatron_target(options: ConvertConfig) -> Target:
    """The checkpoint that options ask for. ProblemError if they contradict each other."""
    raise_all(_contradictions(options))
    wanted = Wanted(
        tensor=options.target_tensor_parallel_size,
        pipeline=options.target_pipeline_parallel_size,
        expert=options.target_expert_parallel_size,
        layer_list=None if (layers := options.num_layer_list) is None else whole_numbers(layers),
        layers_per_chunk=options.num_layers_per_virtual_pipeline_stage,
    )
    if target_type(options) == "ascendspeed":
        return Target(
            dialect=legacy.ASCENDSPEED_MERGED if options.merge_mlp else legacy.ASCENDSPEED,
            wanted=wanted,
            vocab_multiple=options.make_vocab_size_divisible_by or legacy.ASCENDSPEED_VOCAB_MULTIPLE,
            form="deepspeed" if options.deepspeed else "release",
        )
    multiple, settings = options.make_vocab_size_divisible_by or 1, _settings(options)
    return Target(dialect=_dialect(options), wanted=wanted, vocab_multiple=multiple, settings=settings)


def _contradictions(options: ConvertConfig) -> Problems:
    if (layers := options.num_layer_list) is not None and whole_numbers(layers) is None:
        yield Problem("--num-layer-list", layers, "it is no list of numbers", "give it as 7,8,8,9", "form")
    if target_type(options) == "ascendspeed":
        names = ("tokenizer_model", "use_mcore_models", "transformer_impl", "moe_grouped_gemm")
        for flag, value in not_default(options, *names).items():
            why = "AscendSpeed's format has no such thing"
            yield from excludes(flag, value, "--save-model-type", "ascendspeed", why)
    elif not _to_core(options):
        for flag, value in not_default(options, "transformer_impl", "moe_grouped_gemm").items():
            why = "the legacy format has no such thing"
            yield from requires(flag, value, "--use-mcore-models", why, "use_mcore_models", "save_to_legacy")


def _to_core(options: ConvertConfig) -> bool:
    return options.use_mcore_models and not options.save_to_legacy


def _dialect(options: ConvertConfig) -> Dialect:
    if not _to_core(options):
        return legacy.LEGACY
    if options.transformer_impl == "transformer_engine":
        return core.transformer_engine("numbered" if options.moe_grouped_gemm else "sequential")
    make = core.mindspeed if options.transformer_impl == "mindspeed" else core.local
    return make("grouped" if options.moe_grouped_gemm else "sequential")


def _settings(options: ConvertConfig) -> dict[str, Any]:
    to_core = _to_core(options)
    impl = "transformer_engine" if options.transformer_impl == "transformer_engine" else "local"
    tokenizer = options.tokenizer_model if options.tokenizer_model != "None" else None  # as scripts write it
    return {
        "use_mcore_models": to_core,
        "use_legacy_models": not to_core,
        "transformer_impl": impl,
        "moe_grouped_gemm": options.moe_grouped_gemm,
        "tokenizer_model": tokenizer,
    }


TARGETS: Mapping[str, Callable[[Source, Output, Dtypes, ConvertConfig], Prepared]] = {
    "hf": _prepare_unsplit,
    "mindformers": _prepare_unsplit,
    "dcp": _prepare_unsplit,
    "gguf": _prepare_gguf,
    "peft": _prepare_peft,
    "mg": _prepare_megatron,
    "ascendspeed": _prepare_megatron,
}
