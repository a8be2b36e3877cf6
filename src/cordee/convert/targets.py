"""What `cordee convert` writes: from its options to a format, a layout and files.

Owns the table of formats that are written, and the meaning of the options of MindSpeed-LLM's and AscendSpeed's
converters. The formats themselves are codecs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cordee.config.option import to_flag
from cordee.config.schema import ConvertConfig
from cordee.config.values import whole_numbers
from cordee.convert.check import target_type
from cordee.convert.distributed_sink import DistributedSink, planned_files
from cordee.errors import Problem, ProblemError, Problems, raise_all, requires
from cordee.weights import ascendspeed, hf, megatron_core, megatron_legacy, mindformers
from cordee.weights.codec import PlannedFile, Sink, Source
from cordee.weights.gguf import codec as gguf
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.layout import Wanted
from cordee.weights.megatron.sink import MegatronSink, Target, plan
from cordee.weights.staging import Staging, check_output


@dataclass(frozen=True)
class Prepared:
    """Output that is laid out and not begun: its files, the bytes of its largest tensor, and the sink to be opened.

    dtypes: by canonical name, what is written.
    expected: what has to be read back, where that is not to the bit what there was; None: the source itself.
    tokenizer: directory of the tokenizer that has to be read back, where it is not copied as it is.
    """

    files: list[PlannedFile]
    largest: int
    dtypes: Mapping[str, torch.dtype]
    open: Callable[[], Sink]
    expected: Source | None = None
    tokenizer: Path | None = None


def prepare(source: Source, path: Path, options: ConvertConfig) -> Prepared:
    """Lay the output out. ProblemError with everything that stands against it."""
    check_output(path.absolute(), overwrite=options.overwrite)
    wanted = _wanted(options)
    dtypes = {name: wanted or source.dtype(name) for name in source.names()}
    target = TARGETS[target_type(options)]
    if target is not _prepare_megatron:
        raise_all(_misplaced(options))
    return target(source, path, dtypes, options)


def _wanted(options: ConvertConfig) -> torch.dtype | None:
    """The type to write; None: as stored."""
    return getattr(torch, options.params_dtype) if options.params_dtype else None


# ---- Hugging Face, MindFormers, torch's distributed checkpoints ------------------------------------------------------


def _prepare_unsplit(source: Source, path: Path, dtypes: dict[str, torch.dtype], options: ConvertConfig) -> Prepared:
    rename: hf.Rename = str
    wanted = _wanted(options)
    if target_type(options) == "mindformers":
        mindformers.check(source.spec)
        rename = mindformers.renamed

    def open_sink() -> Sink:
        if target_type(options) == "dcp":
            staging = Staging(path, overwrite=options.overwrite)
            return DistributedSink(staging, source.spec, wanted, source.companions, options.workers)
        return hf.write(
            path,
            source.spec,
            dtype=wanted,
            companions=source.companions,
            overwrite=options.overwrite,
            rename=rename,
            workers=options.workers,
        )

    rules = source.spec.rules()
    largest = max(
        torch.Size(shape).numel() * dtypes[name].itemsize
        for name, rule in rules.items()
        for shape in rule.foreign_shapes(source.shape(name))
    )
    planned = planned_files if target_type(options) == "dcp" else hf.planned_files
    return Prepared(planned(source.spec, dtypes), largest, dtypes, open_sink)


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
    for name in _SPLITTING:
        if (value := getattr(options, name)) not in (None, False, 1, "local"):
            why = f"{target_type(options)} is not split"
            yield from requires(to_flag(name), value, "--save-model-type mg", why, "save_model_type")


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def _prepare_gguf(source: Source, path: Path, dtypes: dict[str, torch.dtype], options: ConvertConfig) -> Prepared:
    laid_out = gguf.plan(source.spec, dtypes, source.companions)

    def open_sink() -> Sink:
        return gguf.GGUFSink(Staging(path, overwrite=options.overwrite), laid_out, source.companions, options.workers)

    expected = gguf.Held(laid_out, source)
    return Prepared(laid_out.files(), max(laid_out.sizes), laid_out.dtypes, open_sink, expected, source.companions)


# ---- Megatron and AscendSpeed ----------------------------------------------------------------------------------------


def _prepare_megatron(source: Source, path: Path, dtypes: dict[str, torch.dtype], options: ConvertConfig) -> Prepared:
    laid_out = plan(source.spec, dtypes, megatron_target(options))
    largest = max(
        torch.Size(shape).numel() * dtypes[name].itemsize
        for name, placement in laid_out.placements.items()
        for shape in placement.part_shapes
    )

    def open_sink() -> Sink:
        staging = Staging(path, overwrite=options.overwrite)
        return MegatronSink(staging, laid_out, source.companions, workers=options.workers)

    return Prepared(laid_out.files(), largest, dtypes, open_sink)


def megatron_target(options: ConvertConfig) -> Target:
    """The checkpoint that options ask for. ProblemError if they contradict each other."""
    raise_all(_contradictions(options))
    wanted = Wanted(
        tensor=options.target_tensor_parallel_size,
        pipeline=options.target_pipeline_parallel_size,
        expert=options.target_expert_parallel_size,
        layer_list=_layer_list(options.num_layer_list),
        layers_per_chunk=options.num_layers_per_virtual_pipeline_stage,
    )
    if target_type(options) == "ascendspeed":
        return Target(
            dialect=ascendspeed.MERGED if options.merge_mlp else ascendspeed.ASCENDSPEED,
            wanted=wanted,
            vocab_multiple=options.make_vocab_size_divisible_by or ascendspeed.VOCAB_MULTIPLE,
            form="deepspeed" if options.deepspeed else "release",
        )
    return Target(
        dialect=_dialect(options),
        wanted=wanted,
        vocab_multiple=options.make_vocab_size_divisible_by or 1,
        settings=_settings(options),
    )


def _contradictions(options: ConvertConfig) -> Problems:
    ascend = target_type(options) == "ascendspeed"
    if ascend and options.tokenizer_model is not None:
        why = "AscendSpeed's format has no settings to note it in"
        yield Problem("--tokenizer-model", options.tokenizer_model, why, "leave it out")
    if ascend and (options.use_mcore_models or options.transformer_impl != "local"):
        flag = "--use-mcore-models" if options.use_mcore_models else "--transformer-impl"
        yield Problem(flag, None, "AscendSpeed's format is not Megatron-Core's", "leave it out")
    elif not _to_core(options):
        for name in ("moe_grouped_gemm", "transformer_impl"):
            if (value := getattr(options, name)) not in (False, "local"):
                why = "the legacy format has no such thing"
                yield from requires(
                    to_flag(name), value, "--use-mcore-models", why, "use_mcore_models", "save_to_legacy"
                )


def _to_core(options: ConvertConfig) -> bool:
    return options.use_mcore_models and not options.save_to_legacy


def _dialect(options: ConvertConfig) -> Dialect:
    if not _to_core(options):
        return megatron_legacy.LEGACY
    if options.transformer_impl == "transformer_engine":
        return megatron_core.transformer_engine("numbered" if options.moe_grouped_gemm else "sequential")
    make = megatron_core.mindspeed if options.transformer_impl == "mindspeed" else megatron_core.local
    return make("grouped" if options.moe_grouped_gemm else "sequential")


def _settings(options: ConvertConfig) -> dict[str, Any]:
    core = _to_core(options)
    impl = "transformer_engine" if options.transformer_impl == "transformer_engine" else "local"
    tokenizer = options.tokenizer_model if options.tokenizer_model != "None" else None  # as scripts write it
    return {
        "use_mcore_models": core,
        "use_legacy_models": not core,
        "transformer_impl": impl,
        "moe_grouped_gemm": options.moe_grouped_gemm,
        "tokenizer_model": tokenizer,
    }


def _layer_list(text: str | None) -> tuple[int, ...] | None:
    """The numbers of `--num-layer-list`. ProblemError if it is no list of numbers."""
    if text is None:
        return None
    if (numbers := whole_numbers(text)) is None:
        raise ProblemError([Problem("--num-layer-list", text, "it is no list of numbers", "give it as 7,8,8,9")])
    return numbers


TARGETS: Mapping[str, Callable[[Source, Path, dict[str, torch.dtype], ConvertConfig], Prepared]] = {
    "hf": _prepare_unsplit,
    "mindformers": _prepare_unsplit,
    "dcp": _prepare_unsplit,
    "gguf": _prepare_gguf,
    "mg": _prepare_megatron,
    "ascendspeed": _prepare_megatron,
}
