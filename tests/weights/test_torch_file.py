"""Files of `torch.save`, read by slices and written in place."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import zipfile

import pytest
import torch

from cordee.weights.regions import Destination
from cordee.weights.torch_file import UNREADABLE, TorchFile, append, create


def whole(shape):
    return tuple(slice(0, size) for size in shape)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_what_torch_saves_is_read(tmp_path, zipped):
    base = torch.arange(24.0)
    content = {
        "plain": torch.randn(3, 4),
        "part": base[5:17].view(3, 4),
        "transposed": base.view(4, 6).t(),
        "nested": {"half": torch.ones(2, dtype=torch.bfloat16), "empty": torch.ones(0, 3), "scalar": torch.tensor(3)},
        "args": argparse.Namespace(x=1, dtype=torch.float16),
        "nothing": None,
    }
    path = tmp_path / "x.pt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    file = TorchFile(path)
    assert file.content["args"] == content["args"]
    names = {("plain",), ("part",), ("transposed",), ("nested", "half"), ("nested", "empty"), ("nested", "scalar")}
    assert file.tensors.keys() == names
    for keys, region in file.tensors.items():
        expected = content
        for key in keys:
            expected = expected[key]
        assert region.shape == tuple(expected.shape) and region.dtype == expected.dtype
        assert torch.equal(file.read(keys, whole(expected.shape)), expected)
    assert torch.equal(file.read(("transposed",), (slice(1, 3), slice(2, 3))), content["transposed"][1:3, 2:3])


def test_a_file_is_filled_after_it_is_made(tmp_path):
    path = tmp_path / "x.pt"
    shapes = {"a": (3, 4), "b": (5,), "c": (2, 2, 2)}
    content = {"model": {name: torch.empty(shape, dtype=torch.float16) for name, shape in shapes.items()}, "n": 3}
    regions = create(path, content)
    values = {name: torch.randn(shape).half() for name, shape in shapes.items()}
    descriptor = os.open(path, os.O_WRONLY)
    regions["model", "c"].write(descriptor, values["c"])
    regions["model", "a"].write(descriptor, values["a"][2:], first_row=2)  # in any order, and by rows
    regions["model", "a"].write(descriptor, values["a"].t().contiguous().t()[:2])
    regions["model", "b"].write(descriptor, values["b"])
    os.close(descriptor)
    for mmap in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mmap)
        assert loaded["n"] == 3
        assert all(torch.equal(loaded["model"][name], value) for name, value in values.items())


def test_making_a_file_takes_no_disk(tmp_path):
    create(tmp_path / "x.pt", {"big": torch.empty(2**31, dtype=torch.float16)})
    status = (tmp_path / "x.pt").stat()
    assert status.st_size > 2**32 and status.st_blocks * 512 < 2**20


class Foreign:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Settings(argparse.Namespace):
    """Of a module that is none of those known to be harmless."""


def test_archives_one_after_the_other(tmp_path):
    """The first and the last are of one size, so that what the last says of places in it is also true of the first."""
    shapes, path = [(64, 32), (5,), (64, 32)], tmp_path / "x"
    ends, regions = [0], []
    with path.open("w+b") as file:
        for shape in shapes:
            regions.append(append(file, torch.empty(shape)))
            ends.append(file.seek(0, os.SEEK_END))
    tensors = [torch.randn(shape) for shape in shapes]
    for region, tensor in zip(regions, tensors, strict=True):
        Destination(path, region).write(tensor)
    content = path.read_bytes()
    for tensor, (start, stop) in zip(tensors, itertools.pairwise(ends), strict=True):
        assert torch.equal(torch.load(io.BytesIO(content[start:stop]), weights_only=True), tensor)


@pytest.mark.parametrize("foreign", ["call", "class"])
def test_foreign_code_is_not_run(tmp_path, foreign):
    content = {"w": torch.ones(2), "x": Foreign(tmp_path / "made") if foreign == "call" else Settings(a=1)}
    torch.save(content, tmp_path / "x.pt")
    file = TorchFile(tmp_path / "x.pt")
    assert file.not_read == ["posix.mkdir" if foreign == "call" else f"{__name__}.Settings"]
    assert file.tensors.keys() == {("w",)} and torch.equal(file.read(("w",), ()), torch.ones(2))
    assert not (tmp_path / "made").exists()


def test_objects_of_training_are_neither_made_nor_missed(tmp_path):
    """An enum of a package that is not installed, as it lies in the settings of every training checkpoint."""
    path = tmp_path / "x.pt"
    torch.save({"args": argparse.Namespace(model_type=Settings(), seed=7), "w": torch.ones(2)}, path)
    renamed = tmp_path / "y.pt"
    module = Settings.__module__.encode()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(renamed, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            new.writestr(item, data.replace(b"c" + module + b"\n", b"cmegatron.core.enums\n"))
    file = TorchFile(renamed)
    assert file.not_read == ["megatron.core.enums.Settings"]
    assert file.content["args"].seed == 7 and repr(file.content["args"].model_type) == "(not read)"


def test_damaged_files(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(1000)}, path)
    for size in (path.stat().st_size // 2, 10, 0):
        os.truncate(path, size)
        with pytest.raises(UNREADABLE):
            TorchFile(path)
    path.write_text("no such thing")
    with pytest.raises(UNREADABLE):
        TorchFile(path)
