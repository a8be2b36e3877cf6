from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cordee
from cordee.data import indexed
from cordee.data.indexed import DTYPES, IndexedDataset, IndexedDatasetBuilder
from cordee.errors import ProblemError
from tests.data import peer
from tests.problems import facts, limits


def write(prefix: Path, documents: list[list[list[int]]], dtype=np.int32) -> IndexedDataset:
    """Documents are lists of sequences."""
    with IndexedDatasetBuilder(prefix, dtype) as builder:
        for document in documents:
            for sequence in document:
                builder.add_sequence(sequence)
            builder.end_document()
    return IndexedDataset(prefix)


def test_every_byte_of_a_small_pair(tmp_path):
    write(tmp_path / "x", [[[5, 6, 7]]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<3i", 5, 6, 7)
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 1, 2) + struct.pack("<iqqq", 3, 0, 0, 1)
    assert (tmp_path / "x.idx").read_bytes() == expected
    assert len(expected) == 62


documents = st.lists(st.lists(st.lists(st.integers(0, 100), max_size=6), max_size=3), max_size=8)


@given(documents, st.sampled_from(sorted(DTYPES)), st.sampled_from([1, 2, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(tmp_path_factory, documents, code, block):
    prefix = tmp_path_factory.mktemp("pair") / "x"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(indexed, "_BLOCK", block)
        dataset = write(prefix, documents, DTYPES[code])
        assert dataset.problems() == []
    sequences = [sequence for document in documents for sequence in document]
    assert dataset.dtype == DTYPES[code]
    assert [sequence.tolist() for sequence in dataset[:]] == sequences
    assert dataset.sequence_lengths.tolist() == [len(sequence) for sequence in sequences]
    assert dataset.document_indices.tolist() == [0, *np.cumsum([len(document) for document in documents]).tolist()]
    assert dataset.num_tokens == sum(map(len, sequences)) and dataset.num_documents == len(documents)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_bytes_as_megatron_and_read_by_it(tmp_path, dtype):
    m = peer.megatron()
    documents = [[[1, 2, 3], [4]], [[5, 6]], [], [[7]]]
    write(tmp_path / "ours", documents, dtype)
    theirs = m.indexed.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in documents:
        theirs.add_document([token for sequence in document for token in sequence], [len(s) for s in document])
    theirs.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()
    read = m.indexed.IndexedDataset(str(tmp_path / "ours"))
    ours = IndexedDataset(tmp_path / "theirs")
    for i in range(4):
        np.testing.assert_array_equal(read[i], ours[i])
    np.testing.assert_array_equal(read.get(0, offset=1, length=2), ours.get(0, offset=1, length=2))


def test_get_takes_a_slice_that_never_leaves_the_sequence(tmp_path):
    dataset = write(tmp_path / "x", [[[1, 2, 3, 4]], [[5, 6]]])
    assert dataset.get(0, 1, 2).tolist() == [2, 3]
    assert dataset.get(0, 2).tolist() == [3, 4]
    assert dataset.get(0, 2, 99).tolist() == [3, 4]
    assert dataset[-1].tolist() == [5, 6]
    assert [s.tolist() for s in dataset[1:]] == [[5, 6]]
    with pytest.raises(IndexError):
        dataset[2]


def test_public_name_and_pickle(tmp_path):
    write(tmp_path / "x", [[[1, 2]]])
    dataset = cordee.IndexedDataset(tmp_path / "x")
    assert pickle.loads(pickle.dumps(dataset))[0].tolist() == [1, 2]


def test_tokens_cannot_be_written_through_the_map(tmp_path):
    dataset = write(tmp_path / "x", [[[1, 2]]])
    with pytest.raises(ValueError, match="read-only"):
        dataset[0][0] = 7


def test_add_index_is_concatenation(tmp_path, monkeypatch):
    first, second = [[[1, 2], [3]], []], [[[4]], [[5, 6]]]
    write(tmp_path / "a", first)
    write(tmp_path / "b", second)
    write(tmp_path / "whole", first + second)
    monkeypatch.setattr(indexed, "_BLOCK", 2)
    with IndexedDatasetBuilder(tmp_path / "joined") as builder:
        builder.add_index(tmp_path / "a")
        builder.add_index(tmp_path / "b")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"joined.{suffix}").read_bytes() == (tmp_path / f"whole.{suffix}").read_bytes()


def test_add_index_of_another_type_is_refused(tmp_path):
    write(tmp_path / "a", [[[1]]], np.uint16)
    with pytest.raises(ProblemError) as caught, IndexedDatasetBuilder(tmp_path / "joined") as builder:
        builder.add_index(tmp_path / "a")
    assert (facts(caught), limits(caught)) == ([("dataset", tmp_path / "a", "type")], [np.int32])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.idx"]


def test_documents_in_bulk_are_those_one_by_one(tmp_path):
    write(tmp_path / "a", [[[1, 2]], [[3]], [[4, 5, 6]]])
    with IndexedDatasetBuilder(tmp_path / "b") as builder:
        builder.add_documents(np.array([1, 2, 3], np.int32), [2, 1])
        builder.add_documents([], [])
        builder.add_documents([4, 5, 6], np.array([3], np.int32))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_a_failure_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), IndexedDatasetBuilder(tmp_path / "x") as builder:
        builder.add_sequence([1, 2])
        assert not (tmp_path / "x.bin").exists()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_an_old_pair_stands_until_the_new_one_is_complete(tmp_path):
    write(tmp_path / "x", [[[1, 2]]])
    builder = IndexedDatasetBuilder(tmp_path / "x")
    builder.add_documents([3, 4, 5], [3])
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [1, 2]
    builder.finalize()
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [3, 4, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize(("dtype", "tokens"), [(np.uint16, [65536]), (np.uint16, [-1]), (np.uint8, [256])])
def test_a_token_that_does_not_fit_is_refused(tmp_path, dtype, tokens):
    builder = IndexedDatasetBuilder(tmp_path / "x", dtype)
    with pytest.raises(ValueError, match="do not fit"):
        builder.add_sequence(tokens)
    builder.abort()


# ---- damage ----------------------------------------------------------------------------------------------------------


def patch(path: Path, offset: int, data: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "missing .bin": (lambda b, i: b.unlink(), ("x", ("x.bin",))),
    "missing .idx": (lambda b, i: i.unlink(), ("x", ("x.idx",))),
    "missing both": (lambda b, i: (b.unlink(), i.unlink()), ("x", ("x.bin", "x.idx"))),
    "header cut off": (lambda b, i: cut(i, 20), ("x.idx", 34)),
    "empty index": (lambda b, i: cut(i, 0), ("x.idx", 34)),
    "wrong magic": (lambda b, i: patch(i, 0, b"PK\x03\x04"), ("x.idx", b"MMIDIDX\x00\x00")),
    "wrong version": (lambda b, i: patch(i, 9, struct.pack("<Q", 2)), ("x.idx", 1)),
    "unknown type": (lambda b, i: patch(i, 17, b"\x63"), ("x.idx", [1, 2, 3, 4, 5, 6, 7, 8])),
    "index cut off": (lambda b, i: cut(i, i.stat().st_size - 1), ("x.idx", 82)),
    "index too long": (lambda b, i: i.write_bytes(i.read_bytes() + b"123456789"), ("x.idx", 82)),
    "tokens cut off": (lambda b, i: cut(b, 8), ("x.bin", 12)),
    "tokens of another index": (lambda b, i: b.write_bytes(b.read_bytes() * 2), ("x.bin", 12)),
    "last boundary": (lambda b, i: patch(i, 34 + 2 * 12 + 16, struct.pack("<q", 5)), ("x.idx", (0, 2))),
    "first boundary": (lambda b, i: patch(i, 34 + 2 * 12, struct.pack("<q", 1)), ("x.idx", (0, 2))),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_at_opening(tmp_path, name):
    write(tmp_path / "x", [[[1, 2]], [[3]]])
    damage, expected = DAMAGE[name]
    damage(tmp_path / "x.bin", tmp_path / "x.idx")
    with pytest.raises(ProblemError) as error:
        IndexedDataset(tmp_path / "x")
    [problem] = error.value.problems
    assert (problem.option, Path(problem.value).name, problem.limit) == ("dataset", *expected)


INNER_DAMAGE = {
    "negative length": ((34, struct.pack("<i", -2)), (0, 0)),
    "offset": ((34 + 3 * 4 + 8, struct.pack("<q", 4)), (1, 8)),
    "boundaries": ((34 + 3 * 12 + 8, struct.pack("<qq", 2, 1)), "ascending boundaries"),
}


@pytest.mark.parametrize("name", INNER_DAMAGE)
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_damage_inside_is_found_by_the_full_check(tmp_path, name, block, monkeypatch):
    monkeypatch.setattr(indexed, "_BLOCK", block)
    write(tmp_path / "x", [[[1, 2]], [[3]], [[4]]])
    (offset, data), expected = INNER_DAMAGE[name]
    patch(tmp_path / "x.idx", offset, data)
    [problem] = IndexedDataset(tmp_path / "x").problems()
    assert (problem.option, problem.value, problem.limit) == ("dataset", tmp_path / "x.idx", expected)


def test_a_file_name_instead_of_a_prefix_gets_a_hint(tmp_path):
    write(tmp_path / "x", [[[1]]])
    with pytest.raises(ProblemError) as caught:
        IndexedDataset(tmp_path / "x.bin")
    assert caught.value.problems[0].fix.endswith(f" {tmp_path / 'x'}")


def test_a_multimodal_index_is_read(tmp_path):
    write(tmp_path / "x", [[[1]], [[2]]])
    path = tmp_path / "x.idx"
    path.write_bytes(path.read_bytes() + b"\x00\x01")
    assert IndexedDataset(tmp_path / "x")[1].tolist() == [2]
