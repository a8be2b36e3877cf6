"""Slices of tensors in files: read or mapped, they are the same."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.weights import regions
from cordee.weights.regions import Region, contiguous

START = 6  # bytes before the tensor


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("regions") / "bytes"
    file.write_bytes(bytes(START) + torch.arange(4 * 5 * 6, dtype=torch.int16).numpy().tobytes())
    return file


def bounds(size: int):
    return st.tuples(st.integers(0, size), st.integers(0, size)).map(lambda pair: slice(min(pair), max(pair)))


@settings(max_examples=60, deadline=None)
@given(index=st.tuples(bounds(4), bounds(5), bounds(6)), dims=st.integers(0, 3))
def test_slices(path, index, dims):
    region = contiguous(START, (4, 5, 6), torch.int16)
    expected = torch.arange(4 * 5 * 6, dtype=torch.int16).view(4, 5, 6)[index[:dims]]
    assert torch.equal(region.read(path, index[:dims]), expected)


@pytest.mark.parametrize(
    ("index", "in_one_piece"),
    [
        ((slice(1, 3),), True),
        ((slice(2, 3), slice(1, 4)), True),
        ((slice(2, 3), slice(1, 2), slice(2, 5)), True),
        ((slice(0, 4), slice(0, 5), slice(0, 6)), False),  # the whole
        ((slice(1, 3), slice(1, 4)), False),
        ((slice(0, 4), slice(0, 5), slice(0, 3)), False),
    ],
)
def test_what_is_in_one_piece_is_copied(path, monkeypatch, index, in_one_piece):
    region = contiguous(START, (4, 5, 6), torch.int16)
    mapped = []
    monkeypatch.setattr(Region, "_map", lambda self, path: mapped.append(self) or torch.zeros(self.shape))
    region.read(path, index)
    assert bool(mapped) != in_one_piece
    monkeypatch.setattr(regions, "COPIED", 1)
    mapped.clear()
    region.read(path, index)
    assert mapped  # what is large is mapped


def test_a_transposed_tensor_is_mapped(path):
    region = Region(START, (6, 5, 4), torch.int16, (1, 6, 30))
    expected = torch.arange(4 * 5 * 6, dtype=torch.int16).view(4, 5, 6).permute(2, 1, 0)
    assert torch.equal(region.read(path, (slice(1, 2), slice(0, 5), slice(0, 4))), expected[1:2])


def test_a_file_that_has_become_shorter(tmp_path, path):
    short = tmp_path / "short"
    short.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(OSError, match="has become shorter"):
        contiguous(START, (4, 5, 6), torch.int16).read(short, (slice(3, 4),))
