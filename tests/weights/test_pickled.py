"""Pickles read as data: as Python reads them where they hold data alone, and without running anything where not."""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import pickle
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.checkpoint.files import read_metadata
from cordee.checkpoint.storage import location_of
from cordee.weights.pickled import Call, Mapped, Name, load
from cordee.weights.torch_file import UNREADABLE, TorchFile, resolve, tensor_in
from tests.weights import gadgets

ROOT = Path(__file__).resolve().parents[2]


def in_a_process(mode: str, folder: Path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.weights.gadgets", mode, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_gadget_runs_where_python_reads_it(tmp_path):
    assert in_a_process("control", tmp_path) == dict.fromkeys(gadgets.gadgets(""), True)


@pytest.mark.slow
def test_no_reader_runs_any_gadget(tmp_path):
    seen = in_a_process("read", tmp_path)
    assert len(seen) == len(gadgets.gadgets("")) * len(gadgets.READERS)
    assert [entry for entry in seen if entry[3] or entry[4]] == []
    said = {(what, reader): said for what, reader, said, *_ in seen}
    assert all(said[what, reader] for what, reader in said if reader not in ("archive", "stream"))


def nested(leaves):
    numbers = st.integers(-(2**63), 2**63 - 1)
    keys = st.text() | numbers | st.tuples(numbers, st.text())
    containers = lambda inner: st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple)  # noqa: E731
    return st.recursive(leaves, containers)


simple = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
# Sets are data from protocol 4 on, bytes from 3.
sets = st.frozensets(st.integers(-(2**63), 2**63 - 1)) | st.sets(st.text())
cases = st.tuples(nested(simple), st.just(2)) | st.tuples(nested(simple | st.binary()), st.just(3))
cases |= st.tuples(nested(simple | st.binary() | sets), st.sampled_from([4, 5]))


@settings(max_examples=150, deadline=None)
@given(cases)
def test_plain_data_is_what_python_reads(case):
    content, protocol = case
    shared = [content, {"again": content}, "x" * 300, [content] * 3]
    data = pickle.dumps(shared, protocol)
    assert load(data) == (pickle.loads(data), len(data))
    assert load(b"before" + data + b"behind", 6) == (shared, 6 + len(data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_pickles(data):
    """Cut or changed at any byte they are read as something, or refused by one kind of error."""
    whole = pickle.dumps({"a": [1, (2.5, "x"), b"y"], "n": argparse.Namespace(b={3})}, data.draw(st.integers(2, 5)))
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = data.draw(
        st.sampled_from([whole[:at], whole[:at] + data.draw(st.binary(min_size=1, max_size=4)) + whole[at + 1 :]])
    )
    with suppress(ValueError):
        load(damaged)


def test_objects_are_calls_that_are_never_made():
    content, _ = load(pickle.dumps({"p": Path("x"), "n": argparse.Namespace(a=1)}, 2))
    (path, settings_) = content["p"], content["n"]
    assert isinstance(path, Call) and path.function == Name("pathlib", "PosixPath") and path.args == ("x",)
    assert isinstance(settings_, Call) and settings_.state == {"a": 1} and repr(settings_) == "(not read)"


DEEP = b")" + b"\x85" * 200_000  # tuples in tuples: Python hashes them by a recursion that ends the process


@pytest.mark.parametrize(
    "pickled",
    [
        b"}" + DEEP + b"Ns.",
        b"}(" + DEEP + b"Nu.",
        b"\x8f(" + DEEP + b"\x90.",
        b"(" + DEEP + b"\x91.",
        b"Nr\xff\xff\xff\xff0X\xff\xff\xff\xff.",  # a memo, and a text, of 4 GB
        b"\x8d" + struct.pack("<Q", 2**63) + b"x.",
        b"\x96" + struct.pack("<Q", 2**62) + b"x.",
        b"\x8b" + struct.pack("<I", 2**31) + b"x.",
        b"\x95" + struct.pack("<Q", 2**63) + b".",
        b"(" * 100_000 + b".",
        b"I1\n.",
        b"]q\x00}h\x00h\x00s.",
    ],
    ids=[
        "key",
        "keys",
        "set",
        "frozen set",
        "memo",
        "text",
        "bytes",
        "integer",
        "frame",
        "marks",
        "old",
        "list as key",
    ],
)
def test_shapes_that_harm(pickled):
    with pytest.raises(ValueError, match=r"pickle|keys"):
        load(pickled)


@pytest.mark.parametrize(
    "pickled",
    [b"X\xff\xff\xff\xff", b"\x8e" + struct.pack("<Q", 2**40), b"\x96" + struct.pack("<Q", 2**40), b"cnamed"],
    ids=["text", "bytes", "byte array", "name"],
)
@pytest.mark.parametrize("start", [b"", b"\x95" + struct.pack("<Q", 2**27)], ids=["", "framed"])
def test_memory_of_a_pickle_in_a_large_file(tmp_path, start, pickled):
    """128 MiB, of which a damaged pickle says that all of it, or more, is its own."""
    with (tmp_path / "x").open("w+b") as file:
        file.write(start + pickled)
        file.truncate(2**27)
        with Mapped(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tracemalloc.start()
            with pytest.raises(ValueError, match="ends before"):
                load(data)
            assert tracemalloc.get_traced_memory()[1] < 2**20
            tracemalloc.stop()


def saved(content: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def rewritten(data: bytes, changes: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", compression) as new:
        for entry in old.infolist():
            base = entry.filename.partition("/")[2]
            new.writestr(entry.filename, changes.get(base, old.read(entry)))
    return out.getvalue()


def with_numbers(first: int, shape: list[int], strides: list[int]) -> bytes:
    """An archive of four float32 values, of which the pickle makes a tensor with these numbers."""
    numbers = [pickle.dumps(part, 2)[2:-1] for part in (first, tuple(shape), tuple(strides))]
    storage = b"(" + gadgets.text("storage") + gadgets.name("torch", "FloatStorage") + gadgets.text("0")
    storage += gadgets.text("cpu") + b"K\x04tQ"
    args = b"(" + storage + b"".join(numbers) + b"\x89" + b"}" + b"t"
    tensor = gadgets.name("torch._utils", "_rebuild_tensor_v2") + args + b"R"
    return gadgets.archive(b"}" + gadgets.text("w") + tensor + b"s.")


@pytest.mark.parametrize(
    "numbers",
    [
        (1, [4], [1]),
        (0, [5], [1]),
        (0, [2, 2], [3, 1]),
        (-1, [1], [1]),
        (0, [-1], [1]),
        (3, [2], [-1]),
        (0, [2], [2**62]),
        (2**62, [1], [1]),
        (0, [2, 2], [1]),
        (0, [0, 2**63], [1, 1]),
        (True, [1], [1]),
    ],
)
def test_tensors_outside_of_their_bytes(tmp_path, numbers):
    path = tmp_path / "x.pt"
    path.write_bytes(with_numbers(*numbers))
    with pytest.raises(UNREADABLE):
        TorchFile(path)


def test_tensors_inside_of_their_bytes(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(with_numbers(1, [3], [1]))
    assert torch.equal(TorchFile(path).read(("w",), ()), torch.zeros(3))


def alike(depth: int) -> dict[str, object]:
    """Dicts that hold the next twice: as many ways through them as 2 to the `depth`."""
    content: dict[str, object] = {"w": torch.ones(1)}
    for _ in range(depth):
        content = {"a": content, "b": content}
    return content


def deep(depth: int) -> dict[str, object]:
    content: dict[str, object] = {"w": torch.ones(1)}
    for _ in range(depth):
        content = {"a": content}
    return content


def circle() -> dict[str, object]:
    content: dict[str, object] = {"w": torch.ones(1)}
    content["again"] = content
    return content


BOMB = {"w": torch.zeros(2**22)}


@pytest.mark.parametrize(
    "content",
    [
        lambda: rewritten(saved(BOMB), {}, zipfile.ZIP_DEFLATED),  # 16 MiB in 16 KiB
        lambda: saved(alike(30)),
        lambda: saved(deep(100)),
        lambda: saved(circle()),
        lambda: saved(circle(), zipped=False),
        lambda: rewritten(saved({"w": torch.ones(9)}), {"data/0": b"short"}),
        lambda: rewritten(
            saved({"w": torch.ones(9)}), {"byteorder": b"big" if sys.byteorder == "little" else b"little"}
        ),
        lambda: saved({"w": torch.ones(9)}, zipped=False)[:-4],
        lambda: saved({"w": torch.ones(9)}, zipped=False)[:-40],
        lambda: b"PK\x05\x06" + bytes(18),
    ],
    ids=[
        "deflated",
        "alike",
        "deep",
        "circle",
        "old circle",
        "short",
        "byte order",
        "cut",
        "cut numbers",
        "no entries",
    ],
)
def test_files_that_harm(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content())
    with pytest.raises(UNREADABLE):
        TorchFile(path)


def test_a_tensor_among_others(tmp_path):
    path, tensors = tmp_path / "x", [torch.randn(3, 4), torch.arange(7), torch.tensor(2.5, dtype=torch.bfloat16)]
    start = 0
    with path.open("wb") as file:
        places = []
        for tensor in tensors:
            data = saved(tensor)
            places.append((start, len(data)))
            file.write(data)
            start += len(data)
    for tensor, (start, size) in zip(tensors, places, strict=True):
        assert torch.equal(tensor_in(path, start, size).read(path), tensor)
    with pytest.raises(UNREADABLE):
        tensor_in(path, places[0][0], places[0][1] - 1)
    with pytest.raises(UNREADABLE):
        tensor_in(path, places[1][0] + 1, places[1][1])
    os.truncate(path, places[2][0] + 10)
    with pytest.raises(UNREADABLE):
        tensor_in(path, *places[2])


def test_tensors_that_an_npu_has_saved(tmp_path):
    """torch_npu names a builder of its own, for tensors that lie in the file as any other."""
    path, tensor = tmp_path / "x.pt", torch.randn(3, 4)
    old, new = b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n"
    data = saved({"w": tensor.t()})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        pickled = archive.read(name)
    path.write_bytes(rewritten(data, {"data.pkl": pickled.replace(old, new)}))
    file = TorchFile(path)
    assert file.not_read == [] and torch.equal(file.read(("w",), ()), tensor.t())


def nested(depth: int) -> bytes:
    return b"]" * depth + b"a" * (depth - 1)


@pytest.mark.parametrize(
    "pickled",
    [
        gadgets.name("torch", "Size") + b"]q\x00(" + b"K\x01" * 1000 + b"e\x85R.",  # sizes that are a list
        gadgets.name("torch", "Size") + b"(" + b"K\x01" * 1000 + b"t\x85R.",
        gadgets.name("argparse", "Namespace") + b")\x81}(" + gadgets.text("self") + nested(5000) + b"ub.",
        nested(200_000) + b".",
        b"}"
        + gadgets.text("args")
        + gadgets.name("argparse", "Namespace")
        + b")\x81}("
        + gadgets.text("self")
        + b"K\x01"
        + gadgets.text("__class__")
        + b"K\x02ub"
        + b"s.",
    ],
    ids=["list of sizes", "many sizes", "deep state", "deep list", "names of settings"],
)
def test_content_that_harms_where_it_is_used(tmp_path, pickled):
    """It is read as something, or refused: nothing is shown, copied or called by its own names."""
    (tmp_path / "x.pt").write_bytes(gadgets.archive(pickled))
    with suppress(*UNREADABLE):
        TorchFile(tmp_path / "x.pt")
    (tmp_path / ".metadata").write_bytes(pickled)
    with pytest.raises(ValueError):
        read_metadata(location_of(tmp_path))


def test_memory_of_sizes_that_are_made_of_one_another(tmp_path):
    """One list of 10^5 numbers, of which 10^4 tuples would be made: 8 GB of a pickle of 300 kB."""
    many = b"]q\x00(" + b"K\x01" * 100_000 + b"e0" + gadgets.name("torch", "Size") + b"q\x010"
    pickled = many + b"](" + b"h\x01h\x00\x85R" * 10_000 + b"e."
    with pytest.raises(ValueError):
        load(pickled, resolve=resolve)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.float64, torch.complex64, torch.bool])
def test_types(tmp_path, dtype):
    tensor = torch.arange(6).reshape(2, 3).to(torch.float32).to(dtype)
    torch.save({"w": torch.nn.Parameter(tensor, requires_grad=False), "b": tensor.t()}, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    for name, expected in (("w", tensor), ("b", tensor.t())):
        assert torch.equal(
            file.read((name,), ()).view(torch.uint8 if dtype.itemsize == 1 else dtype),
            expected.view(torch.uint8 if dtype.itemsize == 1 else dtype),
        )


def test_values_that_torch_would_change_when_it_reads_them(tmp_path):
    """The imaginary part of a conjugate: its bytes are those of what it is the negative of."""
    values = torch.randn(3)
    torch.save({"w": torch.complex(torch.zeros(3), -values).conj().imag}, tmp_path / "x.bin")
    assert torch.equal(torch.load(tmp_path / "x.bin", weights_only=True)["w"], values)
    with pytest.raises(UNREADABLE):
        TorchFile(tmp_path / "x.bin")


@pytest.mark.parametrize(
    "pickled",
    [
        b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(8, 5000)) + b"u.",
        b"}" + gadgets.text("x" * 1000) + b"q\x00(" + b"h\x00" * 1000 + b"tNs.",
    ],
    ids=["numbers of one hash", "a long tuple"],
)
def test_keys_that_harm(tmp_path, pickled):
    (tmp_path / "x.bin").write_bytes(gadgets.archive(pickled))
    with suppress(*UNREADABLE):
        assert not TorchFile(tmp_path / "x.bin").tensors
