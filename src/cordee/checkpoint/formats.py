"""The formats of weights, recognised by what is on disk.

Owns the table of formats that can be read, a row each: how one is recognised, and its reader. What is written is up to
the job of conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cordee.checkpoint import directory
from cordee.checkpoint.storage import Location, location_of, reached
from cordee.errors import Problem, ProblemError
from cordee.weights import mindformers
from cordee.weights.gguf.header import is_gguf
from cordee.weights.megatron.layout import backend, folder_of, is_distributed, is_megatron, is_partitioned

if TYPE_CHECKING:
    from cordee.weights.codec import Source
    from cordee.weights.megatron.source import Reading


@dataclass(frozen=True)
class Format:
    """One format: its name, whether a directory (or file) holds it, and its reader, which alone imports torch.

    The second argument of `reader` sets how a Megatron checkpoint is read; other formats ignore it. Both functions take
    a path, or, where the format need not be `local`, a location."""

    name: str
    title: str
    holds: Callable[[Any], bool]
    reader: Callable[[Any, Reading | None], Source]
    local: bool = True

    def recognises(self, location: Location) -> bool:
        given = location.local if self.local else location
        return given is not None and self.holds(given)

    def read(self, location: Location, reading: Reading | None = None) -> Source:
        """The weights there, which it recognises. ProblemError with what is wrong with them."""
        return self.reader(location.local if self.local else location, reading)


def _read_hf(path: Path, reading: Reading | None) -> Source:
    from cordee.weights import hf

    return hf.read(path)


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


def _read_mindformers(path: Path, reading: Reading | None) -> Source:
    from cordee.weights import hf

    return hf.read(path, mindformers.renamed)


def _read_checkpoint(location: Location, reading: Reading | None) -> Source:
    from cordee.checkpoint import source

    with reached("model directory", str(location)):
        found = source.read(location)
    if found.base is None:
        return found
    from cordee.checkpoint.adapter import TrainedAdapter
    from cordee.weights.adapter import Merged

    base = location_of(found.base["path"], "base")
    there = base.local is not None and base.local.exists()
    weights = None if not there else source.read(base) if _is_checkpoint(base) else read(base)
    if weights is None or (isinstance(weights, source.CheckpointSource) and weights.base is not None):
        why, fix = "the base it names is not there, at a URL, or has a base itself", "give the base itself to be loaded"
        raise ProblemError.of("base", str(base), why, f"{fix}, and {location} as --lora-load", "base", ("load",))
    return Merged(weights, TrainedAdapter(found, weights))


def _is_checkpoint(location: Location) -> bool:
    return (location / directory.MANIFEST).is_file() or directory.is_root(location)


def _read_distributed(path: Path, reading: Reading | None) -> Source:
    from cordee.checkpoint import dcp

    return dcp.read(path)


def _is_distributed(path: Path) -> bool:
    return _is_hf(path) and ((path / ".metadata").is_file() or any(path.glob("*.distcp")))


def _read_megatron(path: Path, reading: Reading | None) -> Source:
    from cordee.weights.megatron import source

    reading = reading or source.Reading()
    if backend(folder := folder_of(path, reading.iteration)) is None:
        return source.read(path, reading)
    from cordee.checkpoint import torch_dist

    return torch_dist.read(path, folder, reading)


def _read_gguf(path: Path, reading: Reading | None) -> Source:
    from cordee.weights.gguf import codec

    return codec.read(path)


def _refuse_partitions(path: Path, reading: Reading | None) -> Source:
    why = "it is a checkpoint of DeepSpeed's ZeRO stage 3, in which no file has a whole weight"
    fix = "run the zero_to_fp32.py that DeepSpeed saved beside them and give what it writes; training with "
    fix += '"stage3_gather_16bit_weights_on_model_save": true in zero_optimization saves weights'
    raise ProblemError.of("model directory", path, why, fix, "partitioned")


FORMATS = (  # the first that recognises a directory reads it
    Format("mg", "Megatron checkpoint", lambda path: is_megatron(path) or is_distributed(path), _read_megatron),
    Format("cordee", "checkpoint of a run", _is_checkpoint, _read_checkpoint, local=False),
    Format("dcp", "distributed checkpoint with a config.json", _is_distributed, _read_distributed),
    Format("mindformers", "directory with MindFormers' names", mindformers.recognises, _read_mindformers),
    Format("gguf", "file of GGUF", is_gguf, _read_gguf),
    Format("zero", "checkpoint of DeepSpeed's ZeRO", is_partitioned, _refuse_partitions),
    Format("hf", "Hugging Face directory", _is_hf, _read_hf),
)


def find(location: Location) -> Format | None:
    """The format of what is there; None if it is none that is known."""
    return next((form for form in FORMATS if form.recognises(location)), None)


def format_of(given: str | Path | Location) -> Format:
    """The format of what is at `given`. ProblemError if it is none that is known."""
    location = location_of(given, "model directory")
    with reached("model directory", str(location)):
        form = find(location)
    if form is not None:
        return form
    if (path := location.local) is None:
        fix = "give a directory that --save has written, or copy it to a local one"
        raise ProblemError.of("model directory", str(location), "it holds no checkpoint of a run", fix)
    if not path.exists():
        raise ProblemError.of("model directory", path, "there is no such directory", "give one that exists")
    from cordee.weights import peft

    if peft.is_adapter(path):
        why, fix = "it is an adapter of PEFT", "give the model it belongs to, and this as --lora-load"
        raise ProblemError.of("model directory", path, why, fix, "adapter")
    known = ", ".join(form.title for form in FORMATS)
    raise ProblemError.of("model directory", path, f"it is none of {known}", "give a directory with a model")


def read(path: str | Path | Location, reading: Reading | None = None) -> Source:
    """The weights at `path`, whatever their format. ProblemError if there are none or something is wrong with them."""
    form = format_of(path)
    try:
        return form.read(location_of(path), reading)
    except ProblemError as error:
        raise ProblemError([_by_converting(problem) for problem in error.problems], error.everywhere) from error


def _by_converting(problem: Problem) -> Problem:
    """What is read here has not the options that conversion has."""
    if problem.kind != "unclear":
        return problem
    return replace(problem, fix=f"{problem.fix} (options of cordee convert: convert it, and load the result)")
