"""Sample order against Megatron's own: every index array, every token of every sample."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.config.schema import TrainConfig
from cordee.data.build import build_datasets, plan_parts
from cordee.data.gpt_dataset import BlendedDataset, Epochs, GPTDataset, blend_sizes, build_blend, normalise
from cordee.data.indexed import IndexedDataset
from cordee.log import logger
from tests.data import peer


def config(**values) -> TrainConfig:
    return TrainConfig(**{"seq_length": 8, "lr": 1e-3, "train_iters": 1} | values)


def assert_same_dataset(ours: GPTDataset, theirs) -> None:
    for name in ("document_index", "sample_index", "shuffle_index"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        assert mine.dtype == other.dtype, name
        np.testing.assert_array_equal(mine, other, err_msg=name)
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        text, _ = theirs._query_document_sample_shuffle_indices(i)
        np.testing.assert_array_equal(ours[i], text)
        assert ours[i].dtype == np.int64


def assert_same_samples(ours, theirs, count: int) -> None:
    for i in range(count):
        sample = theirs[i]
        np.testing.assert_array_equal(ours[i][:-1], sample["tokens"].numpy())
        np.testing.assert_array_equal(ours[i][1:], sample["labels"].numpy())


shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 40), min_size=3, max_size=30).filter(lambda x: min(sum(x[:1]), x[-1]) > 1),
        "seq_length": st.integers(1, 25),
        "samples": st.tuples(st.integers(0, 60), st.integers(0, 20), st.integers(0, 5)),
        "seed": st.integers(0, 2**32 - 1),
        "split": st.sampled_from(["969, 30, 1", "98,2", "1", "1,1,1", "0,0,1", "0.5,0.25,0.25", "100,0,0"]),
    }
)


@given(shapes)
@settings(max_examples=80, deadline=None)
def test_one_dataset_is_megatrons(tmp_path_factory, shape):
    folder = tmp_path_factory.mktemp("one")
    prefix = str(peer.write_pair(folder / "x", shape["lengths"], seed=shape["seed"]))
    options = config(data_path=(prefix,), split=shape["split"], seq_length=shape["seq_length"], seed=shape["seed"])
    indexed = IndexedDataset(prefix)
    parts = plan_parts(options)
    for part in parts.values():
        first, last = part.sequences(indexed)
        if indexed.sequence_lengths[first:last].sum() < 2:
            return  # Megatron does not end on these
    theirs = peer.datasets(
        shape["samples"],
        seq_length=shape["seq_length"],
        seed=shape["seed"],
        blend=([prefix], None),
        split=shape["split"],
    )
    ours = build_datasets(options, *shape["samples"])
    for i, name in enumerate(("train", "valid", "test")):
        if name not in parts or not shape["samples"][i]:
            assert ours[i] is None
            assert (theirs[i] is None) == (name not in parts)
        else:
            assert_same_dataset(ours[i], theirs[i])


@pytest.mark.parametrize("samples", [1, 10, 11, 12, 17, 18, 19, 20, 21, 40, 200])
def test_around_the_ends_of_epochs(tmp_path, samples):
    """One epoch has 10 samples and some tokens more; the last epoch is shuffled apart below 80 % of them."""
    prefix = str(peer.write_pair(tmp_path / "x", [7, 20, 3, 1, 30, 25]))
    theirs = peer.datasets((samples, 0, 0), seq_length=8, seed=5, blend=([prefix], None), split="1")[0]
    assert_same_dataset(GPTDataset(IndexedDataset(prefix), 0, 6, samples, 8, 5), theirs)


def test_one_epoch_if_no_number_is_asked_for(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [7, 20, 3, 1, 30, 25]))
    theirs = peer.datasets((None, None, None), seq_length=8, seed=5, blend=([prefix], None), split="1")[0]
    assert_same_dataset(GPTDataset(IndexedDataset(prefix), 0, 6, None, 8, 5), theirs)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_samples_follow_each_other_and_share_a_token(tmp_path, dtype):
    """The definition, without Megatron: unshuffled, sample j is tokens [8 j, 8 j + 8] of the documents in order."""
    prefix = peer.write_pair(tmp_path / "x", [5, 0, 9, 1, 30, 4], dtype=dtype)
    dataset = GPTDataset(IndexedDataset(prefix), 0, 6, 15, 8, 1)
    stream = np.concatenate([dataset.indexed[i] for i in dataset.document_index])
    for i in range(len(dataset)):
        begin = int(dataset.shuffle_index[i]) * 8
        np.testing.assert_array_equal(dataset[i], stream[begin : begin + 9])
    assert sorted(dataset.shuffle_index.tolist()) == list(range(len(dataset)))


@given(st.integers(2, 500), st.integers(1, 400), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_epochs_are_the_fewest_that_hold_the_samples(tokens, samples, seq_length):
    plan = Epochs.plan(tokens, samples, seq_length)
    assert plan.epochs * tokens >= samples * seq_length + 1
    assert plan.epochs == 1 or (plan.epochs - 1) * tokens < samples * seq_length + 1
    assert plan.samples >= samples


# ---- blends ----------------------------------------------------------------------------------------------------------


def megatron_blend(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    dataset, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    peer.megatron().helpers.build_blending_indices(dataset, sample, weights, len(weights), size, False)
    return dataset, sample


@given(
    st.lists(st.one_of(st.integers(1, 10), st.floats(1e-4, 1.0)), min_size=1, max_size=9),
    st.integers(1, 1500),
)
@settings(max_examples=150, deadline=None)
def test_blend_is_megatrons(weights, size):
    normalised = normalise(normalise(weights))
    for ours, theirs in zip(build_blend(normalised, size), megatron_blend(normalised, size), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("datasets", [2, 7, 64])
def test_large_blend_is_megatrons(datasets):
    weights = normalise(normalise(np.random.default_rng(datasets).random(datasets) ** 6 + 1e-6))
    for ours, theirs in zip(build_blend(weights, 200_000), megatron_blend(weights, 200_000), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_blend_of_the_reference():
    dataset, sample = build_blend(normalise([0.3, 0.7]), 10)
    assert dataset.tolist() == [1, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    assert sample.tolist() == [0, 0, 1, 2, 1, 3, 4, 2, 5, 6]


def test_ties_go_to_the_first():
    assert build_blend(normalise([1, 1, 1]), 7)[0].tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_blend_sizes_have_half_a_percent_more():
    assert blend_sizes([30, 70], 1000) == ([302, 704], 1000)
    assert blend_sizes([1, 2], 100) == ([35, 68], 101)  # shares of 34 and 67


@pytest.mark.parametrize(
    ("weights", "split", "samples"),
    [
        ((0.3, 0.7), "80,10,10", (40, 8, 4)),
        ((1.0, 1.0, 5.0), "90,5,5", (200, 0, 0)),
        ((0.05, 0.9, 0.05), "50,50", (7, 90, 0)),
        ((2.0,), "1,1,1", (12, 12, 12)),
    ],
)
def test_a_blend_of_one_path_option_is_megatrons(tmp_path, weights, split, samples):
    random = np.random.default_rng(3)
    prefixes = [
        str(peer.write_pair(tmp_path / f"x{i}", random.integers(2, 40, 30).tolist(), seed=i))
        for i in range(len(weights))
    ]
    theirs = peer.datasets(samples, seq_length=8, seed=11, blend=(prefixes, list(weights)), split=split)
    pairs = [text for pair in zip(map(str, weights), prefixes, strict=True) for text in pair]
    ours = build_datasets(config(data_path=tuple(pairs), split=split, seed=11), *samples)
    for mine, other, count in zip(ours, theirs, samples, strict=True):
        assert (mine is None) == (not count)
        if mine is not None:
            assert len(mine) >= count
            np.testing.assert_array_equal(mine.dataset_index, other.dataset_index)
            np.testing.assert_array_equal(mine.dataset_sample_index, other.dataset_sample_index)
            assert_same_samples(mine, other, count)


def test_own_paths_for_each_part_are_megatrons(tmp_path):
    random = np.random.default_rng(3)
    a, b, c = (
        str(peer.write_pair(tmp_path / name, random.integers(2, 40, 20).tolist(), seed=i))
        for i, name in enumerate("abc")
    )
    samples = (60, 10, 0)
    theirs = peer.datasets(samples, seq_length=8, seed=7, blend_per_split=[([a, b], [0.25, 0.75]), ([c], None), None])
    options = config(train_data_path=("0.25", a, "0.75", b), valid_data_path=(c,), seed=7)
    ours = build_datasets(options, *samples)
    assert_same_samples(ours.train, theirs[0], 60)
    assert_same_dataset(ours.valid, theirs[1])
    assert ours.test is None


class Numbers:
    def __init__(self, value: int, length: int):
        self.value, self.length = value, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> np.ndarray:
        return np.array([self.value, index])


def test_a_blend_takes_each_datasets_samples_in_order():
    blend = BlendedDataset([Numbers(0, 10), Numbers(1, 10)], [1, 3], 12)
    drawn = [blend[i].tolist() for i in range(len(blend))]
    assert [index for value, index in drawn if value == 0] == [0, 1, 2]
    assert [index for value, index in drawn if value == 1] == list(range(9))


# ---- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    return lines


def build(tmp_path: Path, **values) -> GPTDataset:
    prefix = tmp_path / "x"
    if not (tmp_path / "x.idx").exists():
        peer.write_pair(prefix, [7, 20, 3, 1, 30, 25])
    arguments = {"num_samples": 30, "seq_length": 8, "seed": 5, "cache_dir": tmp_path / "cache"} | values
    return GPTDataset(IndexedDataset(prefix), 0, 6, **arguments)


def cached(tmp_path: Path) -> dict[str, float]:
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_a_second_start_reads_the_order(tmp_path, said):
    first = build(tmp_path)
    before = cached(tmp_path)
    assert len(before) == 3
    second = build(tmp_path)
    assert cached(tmp_path) == before and not said
    assert all((first[i] == second[i]).all() for i in range(len(first)))


@pytest.mark.parametrize("change", [{"seed": 6}, {"seq_length": 9}, {"num_samples": 80}])
def test_another_order_is_another_entry(tmp_path, change):
    build(tmp_path)
    build(tmp_path, **change)
    assert len(cached(tmp_path)) == 6


def test_other_data_under_the_same_name_is_another_entry(tmp_path):
    build(tmp_path)
    peer.write_pair(tmp_path / "x", [7, 20, 3, 2, 30, 24])
    build(tmp_path)
    assert len(cached(tmp_path)) == 6


@pytest.mark.parametrize("damage", ["cut", "empty", "nonsense", "other shape"])
@pytest.mark.parametrize("which", ["documents", "samples", "shuffle"])
def test_a_damaged_order_is_built_again(tmp_path, said, damage, which):
    first = list(build(tmp_path))
    path = next((tmp_path / "cache").glob(f"*-{which}.npy"))
    content = path.read_bytes()
    if damage == "other shape":
        np.save(path, np.zeros((3, 3), np.int32))
    else:
        path.write_bytes({"cut": content[:-4], "empty": b"", "nonsense": b"x" * len(content)}[damage])
    again = build(tmp_path)
    assert len(said) == 1 and "damaged" in said[0]
    assert path.read_bytes() == content
    np.testing.assert_array_equal(first, list(again))


def test_where_nothing_can_be_written_the_order_stays_in_memory(tmp_path, said):
    (tmp_path / "cache").write_text("in the way")
    dataset = build(tmp_path)
    assert len(said) == 1 and "cannot be kept" in said[0]
    np.testing.assert_array_equal(dataset[0], build(tmp_path, cache_dir=None)[0])


def test_the_cache_lies_where_the_option_says(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [30, 30]))
    build_datasets(config(data_path=(prefix,), split="1", data_cache_path=str(tmp_path / "elsewhere")), 3, 0, 0)
    assert len(os.listdir(tmp_path / "elsewhere")) == 3
    assert not (tmp_path / "cordee-cache").exists()
    build_datasets(config(data_path=(prefix,), split="1"), 3, 0, 0)
    assert len(os.listdir(tmp_path / "cordee-cache")) == 3
