"""Files of GGUF: values by key, and tensors.

Owns unpacking and writing, through the `gguf` library, which is there only if its extra is installed; the header of
what is read is in `header`. Tensors that are stored in blocks of few bits are read as float32, and nothing is read
before it is asked for. Knows no key and no model."""

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cordee.errors import Problem, ProblemError, raise_all
from cordee.tensors.views import Index, Shape
from cordee.weights.files import Stored, opened
from cordee.weights.gguf.header import read_header
from cordee.weights.regions import contiguous

CHUNK = 2**20  # elements that are unpacked at a time: unpacking takes several times their memory
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
NAMES_OF_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}  # of those to write


def library() -> ModuleType:
    """The `gguf` library. ProblemError if it is not installed."""
    try:
        import gguf
    except ImportError as error:
        why, fix = f"files of GGUF need this package: {error}", "pip install 'cordee[gguf]'"
        raise ProblemError.of("gguf", None, why, fix, "requires") from error
    return gguf


class GGUFFile:
    """An open file. ProblemError if it is none, is cut off, or has tensors of a type that cannot be unpacked."""

    def __init__(self, path: Path):
        self.path = path
        sizes = library().GGML_QUANT_SIZES
        header = opened(path, lambda path: read_header(path, sizes))
        self.values = header.values
        if (parts := self.values.get("split.count", 1)) not in (0, 1):
            why, fix = f"it is one of {parts} parts", "join them with llama.cpp's llama-gguf-split --merge"
            raise ProblemError.of(str(path), None, why, fix, "part", limit=parts)
        self._entries = header.entries
        self._kinds = {name: library().GGMLQuantizationType(entry.kind) for name, entry in header.entries.items()}
        types = {name: _PLAIN.get(kind.name, torch.float32) for name, kind in self._kinds.items()}
        self.tensors = {name: Stored(entry.shape, types[name]) for name, entry in header.entries.items()}
        raise_all(self._unknown_types())

    def _unknown_types(self) -> list[Problem]:
        """Types without a way to unpack them: integers, and what the library does not know."""
        gguf = library()
        by_kind: dict[Any, list[str]] = {}
        for name, kind in self._kinds.items():
            if kind.name not in _PLAIN:
                by_kind.setdefault(kind, []).append(name)
        problems = []
        for kind, names in by_kind.items():
            try:
                gguf.dequantize(np.zeros(gguf.GGML_QUANT_SIZES[kind][1], np.uint8), kind)
            except NotImplementedError:
                why = f"its type {kind.name} cannot be unpacked; {len(names)} tensors have it"
                fix = "take a file of another type"
                problems.append(Problem(f"{self.path}: {names[0]}", None, why, fix, "dtype", limit=kind.name))
        return problems

    def read(self, name: str, index: Index) -> Tensor:
        """A slice of a tensor, sharing memory with the file where it is not packed."""
        entry, kind = self._entries[name], self._kinds[name]
        if kind.name in _PLAIN:
            return contiguous(entry.offset, entry.shape, _PLAIN[kind.name]).read(self.path, index)
        *outer, size = entry.shape
        inner = math.prod(outer[1:])  # rows of `size` elements for each place along the first dim
        first, last = (index[0].start * inner, index[0].stop * inner) if outer else (0, 1)
        shape = (index[0].stop - index[0].start, *outer[1:], size) if outer else (size,)
        cuts = (slice(None), *index[1:]) if outer else index
        return self._unpacked(entry.offset, kind, first, last, size).view(shape)[cuts]

    def _unpacked(self, offset: int, kind: Any, first: int, last: int, size: int) -> Tensor:
        """Rows `first` to `last` of `size` elements each, float32 `[rows, size]`."""
        gguf, step = library(), max(1, CHUNK // size)
        block, nbytes = gguf.GGML_QUANT_SIZES[kind]
        nbytes *= size // block
        out = torch.empty(last - first, size)
        with self.path.open("rb") as file:
            for start in range(first, last, step):
                rows = min(step, last - start)
                file.seek(offset + start * nbytes)
                data = np.fromfile(file, np.uint8, rows * nbytes).reshape(rows, nbytes)
                out[start - first : start - first + rows] = torch.from_numpy(gguf.dequantize(data, kind))
        return out


def create(path: Path, values: Mapping[str, Any], tensors: Mapping[str, tuple[Shape, torch.dtype]]) -> dict[str, int]:
    """Make a file with these values and room for these tensors; where each begins, in bytes. OSError if that fails."""
    gguf = library()
    writer = gguf.GGUFWriter(path, values["general.architecture"])
    for key, value in values.items():
        if key != "general.architecture":  # which the library writes first
            _add(writer, key, value)
    offsets, end = {}, 0
    for name, (shape, dtype) in tensors.items():
        kind, nbytes = gguf.GGMLQuantizationType[NAMES_OF_TYPES[dtype]], math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(name, shape, np.dtype(f"u{dtype.itemsize}"), nbytes, raw_dtype=kind)
        offsets[name] = end
        end += writer.ggml_pad(nbytes, writer.data_alignment)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    start = writer.ggml_pad(path.stat().st_size, writer.data_alignment)
    with path.open("r+b") as file:
        file.truncate(start + end)
    return {name: start + offset for name, offset in offsets.items()}


def _add(writer: Any, key: str, value: Any) -> None:
    """A value as llama.cpp wants its type: numbers are 32 bits wide, and without sign."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
