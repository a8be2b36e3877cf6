"""`cordee convert`: weights of any format to any other.

Owns the loop from a source to a sink over canonical names, and what goes before and after it: which model it is, what
would be written, whether it was written right. Needs no device and no other process; memory is about twice the largest
tensor, whatever the model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from cordee.checkpoint.formats import Format, format_of
from cordee.checkpoint.storage import location_of
from cordee.config import laws
from cordee.convert.check import check_dialect, check_format, check_model, check_options, target_type
from cordee.convert.options import ConvertConfig
from cordee.errors import Findings, Problem, ProblemError, raise_all
from cordee.files import read_json
from cordee.log import console, counted, logger, progress_bar

if TYPE_CHECKING:
    from cordee.convert.targets import Prepared
    from cordee.families.registry import ModelSpec
    from cordee.weights.codec import Sink, Source

ORIGINAL = "mg2hf"  # where in the directory of the original model the way back from Megatron ends


def run(options: ConvertConfig) -> int:
    """Convert what is at `load_dir` to `save_dir`.

    ProblemError before anything is written, or if `verify` finds that it was written wrong."""
    for ignored in laws.ignored_options(options):
        logger.warning("%s", ignored)
    source, prepared, output = _prepare(options)
    if options.dry_run:
        _show(source, prepared, output, options)
        return 0
    with prepared.open() as sink:
        copy(source, sink)
    for note in source.notes:
        logger.info(note)
    logger.info("%s written to %s", counted(len(source.names()), "tensor"), output)
    if options.verify:
        from cordee.convert.verify import verify, verify_tokenizer

        written = format_of(output).read(location_of(output))
        for note in verify(prepared.expected or source, written, prepared.dtypes):
            logger.info(note)
        if (compare := prepared.compare_tokenizers) is not None:
            for note in verify_tokenizer(source.assets, written.assets, compare):
                logger.info(note)
    return 0


def check_run(options: ConvertConfig) -> list[Problem]:
    """Everything that would stop the job, as far as it can be known without reading values."""
    found = Findings()
    found.attempt(lambda: _prepare(options))
    return found.problems


def _prepare(options: ConvertConfig) -> tuple[Source, Prepared, Path]:
    """What is read, what will be written, and where. ProblemError with everything that stands against it."""
    from cordee.convert import targets

    found = Findings([*check_options(options)])
    form = found.attempt(lambda: format_of(options.load_dir))
    if form is None:
        found.attempt(lambda: targets.check_output(Path(options.save_dir).absolute(), overwrite=options.overwrite))
        raise_all(found.problems)
    assert form is not None
    found.problems += check_format(form, options)
    output = _output(form, options)
    source = found.attempt(lambda: _source(form, options))
    prepared = None
    if source is not None:
        found.problems += check_model(source.spec, options)
        prepared = found.attempt(lambda: targets.prepare(source, output, options))
    raise_all(found.problems)
    assert source is not None and prepared is not None
    return source, prepared, output


def _source(form: Format, options: ConvertConfig) -> Source:
    """What is read, with the adapter that is to be merged into it."""
    if target_type(options) == "peft" and form.name == "cordee":
        from cordee.checkpoint import source

        return source.read(location_of(options.load_dir, "--load-dir"))
    source = _read(form, _model(form, options), options)
    if (path := options.only_adapter()) is None:
        return source
    from cordee.checkpoint import adapter
    from cordee.weights.adapter import Merged

    raise_all(check_model(source.spec, options))
    return Merged(source, adapter.adapter_of(source, path, options))


def _output(form: Format, options: ConvertConfig) -> Path:
    """Where to write. MindSpeed-LLM's converter wants the original model for the way back, and writes inside it."""
    path = Path(options.save_dir)
    back = form.name == "mg" and target_type(options) == "hf"
    return path / ORIGINAL if back and (path / "config.json").is_file() else path


def _model(form: Format, options: ConvertConfig) -> ModelSpec | None:
    """The model that options give for a Megatron checkpoint; None if its own settings define it."""
    from cordee.families.registry import spec_from_directory, spec_named

    if form.name != "mg":
        return None
    if options.model is not None:
        return spec_named(options.model)
    if _output(form, options) != Path(options.save_dir):
        return spec_from_directory(options.save_dir)
    return None


def _read(form: Format, model: ModelSpec | None, options: ConvertConfig) -> Source:
    if form.name != "mg":
        return form.read(location_of(options.load_dir, "--load-dir"))
    from cordee.weights.megatron.source import MegatronSource, Reading

    vocab_size = options.true_vocab_size or _count_tokens(options.vocab_file)
    reading = Reading(spec=model, vocab_size=vocab_size, strict=options.checking)
    source = form.read(location_of(options.load_dir, "--load-dir"), reading)
    assert isinstance(source, MegatronSource)
    raise_all(check_dialect(source, options))
    if model is not None and (original := Path(options.model or options.save_dir)).is_dir():
        source.assets = original
    return source


def _count_tokens(file: str | None) -> int | None:
    if file is None:
        return None
    try:
        return len(read_json(Path(file)))
    except (OSError, ValueError, TypeError) as error:
        raise ProblemError.of("--vocab-file", file, f"it cannot be read: {error}", "give a vocab.json") from error


def _show(source: Source, prepared: Prepared, output: Path, options: ConvertConfig) -> None:
    """Print which files would be written, and the memory that takes."""
    from rich.table import Table

    from cordee.weights.codec import SLICE
    from cordee.weights.staged_sink import SLICES_HELD

    table = Table("file", "bytes", title=f"{source.spec.family.name} to {output}")
    table.columns[1].justify = "right"
    for file in prepared.files:
        table.add_row(file.path, f"{file.nbytes:,}")
    table.add_row("sum", f"{sum(file.nbytes for file in prepared.files):,}")
    largest = max(math.prod(source.shape(name)) * dtype.itemsize for name, dtype in prepared.dtypes.items())
    memory = (1 + options.workers) * min(largest, SLICES_HELD * SLICE)
    console().print(table)
    print(f"memory: about {-(-memory // 2**20):,} MiB beside the program; nothing is written (--dry-run)")


def copy(source: Source, sink: Sink) -> None:
    """Put every parameter of `source` into `sink`, one after the other, in the slices that the sink asks for."""
    sizes = {name: math.prod(source.shape(name)) * source.dtype(name).itemsize for name in source.names()}
    done = 0
    with progress_bar("converting", sum(sizes.values()), nbytes=True) as show:
        for name, size in sizes.items():
            sink.take(name, source.view(name))
            done += size
            show(done)
