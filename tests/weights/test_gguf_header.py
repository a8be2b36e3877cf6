"""Headers of GGUF files: those that the `gguf` library writes, and what hostile hands make of them.

Where a field of a header lies in a file is asked of the library's own reader.
"""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from cordee.convert import job
from cordee.convert.options import ConvertConfig
from cordee.errors import ProblemError
from cordee.weights.gguf import codec
from cordee.weights.gguf.file import GGUFFile
from cordee.weights.gguf.header import read_header
from tests.problems import facts
from tests.weights.test_gguf import MODELS, save
from tests.weights.test_gguf_vocabulary import CUTS, byte_level

TYPES = gguf.GGUFValueType
HUGE = 2**60


# ---- what the library writes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_a_file_of_the_library(alignment, tmp_path):
    """Every type of value alone and in an array, and tensors whose sizes leave gaps."""
    values = {
        **{f"int.{kind.name}": (3, kind) for kind in TYPES if "INT" in kind.name},
        **{f"float.{kind.name}": (1.5, kind) for kind in TYPES if "FLOAT" in kind.name},
        "bool": (True, TYPES.BOOL),
        "text": ("größer 今天", TYPES.STRING),
    }
    arrays = {"ints": [1, -2, 2**30], "floats": [0.5, -1.5], "bools": [True, False], "texts": ["", "a", "é" * 300]}
    rng = np.random.default_rng(0)
    shapes = ((), (3,), (5, 7), (2, 3, 5), (1, 2, 3, 4))
    tensors = {f"t{shape}": rng.random(shape, np.float32) for shape in shapes if shape}
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for key, (value, kind) in values.items():
        writer.add_key_value(key, value, kind)
    for key, items in arrays.items():
        writer.add_array(key, items)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file, reader = GGUFFile(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert file.values.keys() == theirs.keys()
    for key, value in theirs.items():
        ours = file.values[key]
        assert (list(ours) if isinstance(value, list) else ours) == value, key
    for tensor in reader.tensors:
        expected = torch.from_numpy(tensors[tensor.name])
        assert torch.equal(file.read(tensor.name, tuple(slice(0, size) for size in expected.shape)), expected)
        np.testing.assert_array_equal(tensor.data, expected)  # and so the library reads it


# ---- hostile headers -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A file of a small model with all that a header may have."""
    path = tmp_path_factory.mktemp("gguf")
    save(path / "a", {**MODELS["llama 3.1"], "vocab_size": 400})
    byte_level(path / "a", CUTS[2].patterns, chat_template="{{ messages }}")
    job.run(ConvertConfig(load_dir=str(path / "a"), save_dir=str(path / "b"), save_model_type="gguf"))
    return path / "b" / "model.gguf"


@pytest.fixture(scope="module")
def expected(exported) -> dict[str, torch.Tensor]:
    source = codec.read(exported)
    return {name: source.tensor(name).clone() for name in source.names()}


def place(reader: gguf.GGUFReader, part: np.ndarray) -> int:
    """Where in the file a part of a field is."""
    return part.__array_interface__["data"][0] - reader.data.__array_interface__["data"][0]


def spots(path: Path) -> Iterator[tuple[str, int, int]]:
    """The numbers and texts of a header: name, first byte, bytes."""
    reader = gguf.GGUFReader(path)
    fields = [(field.name, field.parts[:12]) for field in reader.fields.values()]
    fields += [(tensor.name, tensor.field.parts) for tensor in reader.tensors]
    for name, parts in fields:
        for number, part in enumerate(parts):
            text = part.itemsize == 1 and part.size > 1
            width = min(part.size, 4) if text else part.itemsize
            for i in range(1 if text else min(part.size, 4)):
                yield f"{name} {number}", place(reader, part) + i * width, width


def hostile(old: int, width: int) -> set[int]:
    top = 2 ** (8 * width)
    values = (0, 1, 2, 3, 5, 8, 9, 10, 31, 32, 64, top - 1, top // 2, top // 2 - 1, HUGE, 2**40)
    moves = (old + 1, old - 1, old + 32, old - 32, old + 3, old - 4096, old * 2, old // 2, old ^ 1)
    return {value % top for value in values + moves} - {old}


def mutations(path: Path) -> Iterator[tuple[str, int, bytes]]:
    content = path.read_bytes()
    for name, start, width in spots(path):
        for value in sorted(hostile(int.from_bytes(content[start : start + width], "little"), width)):
            yield f"{name} = {value}", start, value.to_bytes(width, "little")


def differs(path: Path, expected: dict[str, torch.Tensor]) -> bool:
    """Whether a file is read as other weights; a problem is none. Whatever else is raised is a failure."""
    try:
        source = codec.read(path)
    except ProblemError:
        return False
    if source.names() != list(expected):
        return True
    return any(not torch.equal(source.tensor(name), tensor) for name, tensor in expected.items())


def refused(path: Path) -> None:
    with pytest.raises(ProblemError) as caught:
        codec.read(path)
    assert facts(caught) == [(str(path), None, "unreadable")]


def _survives(cases: list[tuple[str, int, bytes]], exported, expected, tmp_path) -> None:
    content = exported.read_bytes()
    for label, start, value in cases:
        (tmp_path / "x.gguf").write_bytes(content[:start] + value + content[start + len(value) :])
        assert not differs(tmp_path / "x.gguf", expected), label


def test_a_changed_field_is_a_problem_or_changes_no_weight(exported, expected, tmp_path):
    _survives(random.Random(0).sample(list(mutations(exported)), 300), exported, expected, tmp_path)


@pytest.mark.exhaustive
def test_all_changes_of_all_fields(exported, expected, tmp_path):
    _survives(list(mutations(exported)), exported, expected, tmp_path)


@pytest.mark.parametrize("move", [-4096, 3, 32, -32, 2**63])
@pytest.mark.parametrize("which", [0, 1, 7, -1])
def test_a_tensor_that_is_moved(which, move, exported, tmp_path):
    reader = gguf.GGUFReader(exported)
    tensor = reader.tensors[which]
    part = tensor.field.parts[5]
    content = bytearray(exported.read_bytes())
    struct.pack_into("<Q", content, place(reader, part), (int(part[0]) + move) % 2**64)
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf")


def test_tensors_that_change_places(exported, tmp_path):
    """Of one shape, so that only the order tells."""
    reader = gguf.GGUFReader(exported)
    first, second = (t.field.parts[5] for t in reader.tensors if t.name.endswith("ffn_up.weight"))
    content = bytearray(exported.read_bytes())
    struct.pack_into("<Q", content, place(reader, first), int(second[0]))
    struct.pack_into("<Q", content, place(reader, second), int(first[0]))
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf")


@pytest.mark.parametrize("count", [1, 31, 32, 4096])
def test_bytes_behind_the_last_tensor(count, exported, tmp_path):
    """By the type that its header gives, a tensor is shorter than it is: a damaged file must not be read as another."""
    (tmp_path / "x.gguf").write_bytes(exported.read_bytes() + bytes(count))
    refused(tmp_path / "x.gguf")


def test_a_last_tensor_of_a_smaller_type(exported, tmp_path):
    reader = gguf.GGUFReader(exported)
    part, content = reader.tensors[-1].field.parts[4], bytearray(exported.read_bytes())
    assert int(part[0]) == gguf.GGMLQuantizationType.F32
    struct.pack_into("<I", content, place(reader, part), gguf.GGMLQuantizationType.F16)
    (tmp_path / "x.gguf").write_bytes(content)
    refused(tmp_path / "x.gguf")


# ---- headers made by hand --------------------------------------------------------------------------------------------


def text(content: str) -> bytes:
    return struct.pack("<Q", len(content.encode())) + content.encode()


def file_of(values: bytes = b"", num_values: int = 0, tensors: bytes = b"", num_tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_values) + values + tensors


def value(kind: int, content: bytes) -> bytes:
    return text("key") + struct.pack("<I", kind) + content


def tensor(name: str = "t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARRAY_OF = struct.Struct("<IQ")
ATTACKS = {
    "values": file_of(num_values=HUGE),
    "tensors": file_of(num_tensors=HUGE),
    "a key": file_of(struct.pack("<Q", 2**63), 1),
    "a text": file_of(value(8, struct.pack("<Q", 2**63)), 1),
    "an array of texts": file_of(value(9, ARRAY_OF.pack(8, HUGE)), 1),
    "an array of numbers": file_of(value(9, ARRAY_OF.pack(12, HUGE)), 1),
    "an array of 8 EiB, which is 0 in 64 bits": file_of(value(9, ARRAY_OF.pack(12, 2**61)), 1),
    "arrays of arrays": file_of(value(9, ARRAY_OF.pack(9, 1) * 10**6), 1),
    "zeros": file_of(bytes(10**6), 10**4),
    "a tensor's name": file_of(tensors=struct.pack("<Q", 2**63), num_tensors=1),
    "dims": file_of(tensors=text("t") + struct.pack("<I", 2**32 - 1), num_tensors=1),
    "five dims": file_of(tensors=tensor(dims=(1,) * 5) + bytes(64), num_tensors=1),
    "no elements": file_of(tensors=tensor(dims=(8, 0)) + bytes(64), num_tensors=1),
    "a product that is 0 in 64 bits": file_of(tensors=tensor(dims=(2**32, 2**32)) + bytes(64), num_tensors=1),
    "a size that is 0 in 64 bits": file_of(tensors=tensor(dims=(2**62,)) + bytes(64), num_tensors=1),
    "part of a block": file_of(tensors=tensor(dims=(8, 4), kind=2) + bytes(64), num_tensors=1),
    "a type of tensors": file_of(tensors=tensor(kind=999) + bytes(64), num_tensors=1),
    "a type of values": file_of(value(13, bytes(64)), 1),
    "two keys": file_of(value(0, b"\1") * 2, 2),
    "two tensors": file_of(tensors=tensor() + tensor(offset=32) + bytes(128), num_tensors=2),
    "a text that is none": file_of(value(8, struct.pack("<Q", 2) + b"\xff\xff"), 1),
    **{
        f"alignment {number}": file_of(
            text("general.alignment") + struct.pack("<II", 4, number), 1, tensor() + bytes(99), 1
        )
        for number in (0, 3, 24, 2**31)
    },
    "alignment of another type": file_of(text("general.alignment") + struct.pack("<IB", 7, 1), 1),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_cannot_be_is_refused_at_once(name, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(ATTACKS[name])
    refused(path)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read_header(path, gguf.GGML_QUANT_SIZES)
        assert tracemalloc.get_traced_memory()[1] < 2**22 + 2 * len(ATTACKS[name])
    finally:
        tracemalloc.stop()


def test_many_tokens_take_memory_in_proportion(tmp_path):
    count = 10**5
    values = value(9, ARRAY_OF.pack(8, count) + b"".join(text(f"{i:06}") for i in range(count)))
    values += text("other") + struct.pack("<I", 9) + ARRAY_OF.pack(0, 10**6) + bytes(10**6)
    content = file_of(values, 2)
    (tmp_path / "x.gguf").write_bytes(content)
    tracemalloc.start()
    try:
        header = read_header(tmp_path / "x.gguf", {})
        assert tracemalloc.get_traced_memory()[1] < 2**22 + 8 * len(content)
    finally:
        tracemalloc.stop()
    assert header.values["key"][-1] == f"{count - 1:06}" and len(header.values["other"]) == 10**6


# ---- values of other types -------------------------------------------------------------------------------------------

Put = Callable[[gguf.GGUFWriter, str], object]


def number(content: float, kind: gguf.GGUFValueType) -> Put:
    return lambda writer, key: writer.add_key_value(key, content, kind)


def items(content: list[Any]) -> Put:
    return lambda writer, key: writer.add_array(key, content)


STRANGE: dict[str, Put | None] = {
    "missing": None,
    "-1": number(-1, TYPES.INT32),
    "0": number(0, TYPES.UINT32),
    "2^31": number(2**31, TYPES.UINT32),
    "2^63": number(2**63, TYPES.UINT64),
    "nan": number(float("nan"), TYPES.FLOAT32),
    "1e308": number(1e308, TYPES.FLOAT64),
    "text": lambda writer, key: writer.add_string(key, "x"),
    "bool": lambda writer, key: writer.add_bool(key, True),
    "numbers": items([1, 2, 3]),
    "texts": items(["a", "b"]),
}
FURTHER = (
    "split.count",
    "llama.rope.scaling.type",
    "llama.rope.scaling.factor",
    "llama.attention.sliding_window",
    "tokenizer.ggml.unknown_token_id",
    "tokenizer.ggml.scores",
)


@pytest.mark.parametrize("strange", STRANGE)
def test_values_of_another_type_are_problems_or_change_no_weight(strange, exported, expected, tmp_path):
    reader = gguf.GGUFReader(exported)
    kept = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    for changed in (*kept, *FURTHER):
        if changed == "general.alignment":
            continue
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        writer.kv_data[0].clear()
        for name, field in kept.items():
            if name != changed and field.types[0] == TYPES.ARRAY:
                writer.add_array(name, field.contents())
            elif name != changed:
                writer.add_key_value(name, field.contents(), field.types[0])
        if (put := STRANGE[strange]) is not None:
            put(writer, changed)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        assert not differs(tmp_path / "x.gguf", expected), changed


def test_more_layers_than_tensors(exported, tmp_path):
    reader = gguf.GGUFReader(exported)
    content = bytearray(exported.read_bytes())
    struct.pack_into("<I", content, place(reader, reader.fields["llama.block_count"].parts[3]), 10**9)
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ProblemError) as caught:
        codec.read(tmp_path / "x.gguf")
    assert [(problem.option, problem.value) for problem in caught.value.problems] == [
        ("llama.block_count", "1000000000")
    ]
