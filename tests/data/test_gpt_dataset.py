"""Sample order against Megatron's own: every index array, every token of every sample."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee import device, lock
from cordee.data import gpt_check as data_check
from cordee.data import gpt_dataset as gpt
from cordee.data import order_cache
from cordee.data.build import build_datasets, plan_parts
from cordee.data.gpt_dataset import BlendedDataset, GPTDataset, build_blend
from cordee.data.indexed import IndexedDataset, IndexedDatasetBuilder
from cordee.data.order import Epochs, Order, blend_period, blend_sizes, normalise, periodic_sizes
from cordee.data.order_cache import cached_arrays
from cordee.errors import ProblemError
from cordee.log import logger
from cordee.train.options import TrainConfig
from tests.data import peer


def config(**values) -> TrainConfig:
    return TrainConfig(**{"seq_length": 8, "lr": 1e-3, "train_iters": 1} | values)


def gpt_dataset(prefix, num_samples: int | None, seq_length: int, seed: int, cache_dir=None, verified=False):
    indexed = IndexedDataset(prefix)
    tokens = int(indexed.sequence_lengths.sum(dtype=np.int64))
    order = Order.plan(len(indexed), tokens, num_samples, seq_length)
    return GPTDataset(indexed, 0, len(indexed), order, seq_length, seed, cache_dir, verified)


def assert_same_block(ours: GPTDataset, block: int, theirs) -> None:
    for name, mine in zip(("document_index", "sample_index", "shuffle_index"), ours.indexes(block), strict=True):
        other = getattr(theirs, name)
        assert mine.dtype == other.dtype, name
        np.testing.assert_array_equal(mine, other, err_msg=name)
    assert ours.order.block.samples == len(theirs)


def assert_same_dataset(ours: GPTDataset, theirs) -> None:
    assert ours.order.blocks == 1
    assert_same_block(ours, 0, theirs)
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        text, _ = theirs._query_document_sample_shuffle_indices(i)
        np.testing.assert_array_equal(ours[i]["tokens"], text)
        assert ours[i]["tokens"].dtype == np.int64


def assert_same_samples(ours, theirs, count: int) -> None:
    for i in range(count):
        sample = theirs[i]
        np.testing.assert_array_equal(ours[i]["tokens"][:-1], sample["tokens"].numpy())
        np.testing.assert_array_equal(ours[i]["tokens"][1:], sample["labels"].numpy())


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
    assert_same_dataset(gpt_dataset(prefix, samples, 8, 5), theirs)


def test_one_epoch_if_no_number_is_asked_for(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [7, 20, 3, 1, 30, 25]))
    theirs = peer.datasets((None, None, None), seq_length=8, seed=5, blend=([prefix], None), split="1")[0]
    assert_same_dataset(gpt_dataset(prefix, None, 8, 5), theirs)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_samples_follow_each_other_and_share_a_token(tmp_path, dtype):
    """The definition, without Megatron: unshuffled, sample j is tokens [8 j, 8 j + 8] of the documents in order."""
    prefix = peer.write_pair(tmp_path / "x", [5, 0, 9, 1, 30, 4], dtype=dtype)
    dataset = gpt_dataset(prefix, 15, 8, 1)
    documents, _, shuffle = dataset.indexes(0)
    stream = np.concatenate([dataset.indexed[i] for i in documents])
    for i in range(len(dataset)):
        begin = int(shuffle[i]) * 8
        np.testing.assert_array_equal(dataset[i]["tokens"], stream[begin : begin + 9])
    assert sorted(shuffle.tolist()) == list(range(len(dataset)))


@given(st.integers(2, 500), st.integers(1, 400), st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_epochs_are_the_fewest_that_hold_the_samples(tokens, samples, seq_length):
    plan = Epochs.plan(tokens, samples, seq_length)
    assert plan.epochs * tokens >= samples * seq_length + 1
    assert plan.epochs == 1 or (plan.epochs - 1) * tokens < samples * seq_length + 1
    assert plan.samples >= samples


# ---- orders in blocks ------------------------------------------------------------------------------------------------


def seed_of(seed: int, block: int) -> int:
    return int(np.random.SeedSequence((seed, block)).generate_state(1)[0]) if block else seed


@pytest.mark.parametrize(
    ("lengths", "seq_length", "epochs"),
    [
        ([7, 20, 3, 1, 30, 25], 8, 2**20 // (6 + 86 // 8)),
        ([2, 0, 3], 250, 2**20 // 3),  # less than a sample an epoch
    ],
)
def test_each_block_is_megatrons_order_of_its_samples(tmp_path, lengths, seq_length, epochs):
    prefix = str(peer.write_pair(tmp_path / "x", lengths))
    ours = gpt_dataset(prefix, 10**9 * 4096, seq_length, 5)
    samples = (epochs * sum(lengths) - 1) // seq_length
    assert ours.order.block.samples == samples and len(ours) == -(-(10**9 * 4096) // samples) * samples
    for block in (0, 3, ours.order.blocks - 1):
        sizes, seed = (samples, 0, 0), seed_of(5, block)
        theirs = peer.datasets(sizes, seq_length=seq_length, seed=seed, blend=([prefix], None), split="1")[0]
        assert_same_block(ours, block, theirs)
        for place in {0, samples // 2, samples - 1}:
            text, _ = theirs._query_document_sample_shuffle_indices(place)
            np.testing.assert_array_equal(ours[block * samples + place]["tokens"], text)
    with pytest.raises(IndexError):
        ours[len(ours)]


def test_a_run_that_has_become_longer_goes_on_in_blocks_like_its_first(tmp_path):
    """Twelve samples took two epochs, the second shuffled apart; so do the twenty of each block, all that are in it."""
    prefix = str(peer.write_pair(tmp_path / "x", [7, 20, 3, 1, 30, 25]))
    indexed = IndexedDataset(prefix)
    first = Order.plan(6, 86, 12, 8)
    order = Order.of_blocks(6, 86, 10**6, 8, first.block.epochs, first.block.last_apart)
    ours = GPTDataset(indexed, 0, 6, order, 8, 5)
    assert len(ours) >= 10**6
    for block in (0, 1, 4000):
        theirs = peer.datasets((12, 0, 0), seq_length=8, seed=seed_of(5, block), blend=([prefix], None), split="1")[0]
        assert_same_block(ours, block, theirs)


def test_a_sample_is_the_same_wherever_a_run_begins(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [7, 20, 3, 1, 30, 25]))
    read = gpt_dataset(prefix, 10**15, 8, 5)
    size = read.order.block.samples
    places = [0, 1, size - 1, size, 2 * size + 5, 10**12, 3, size + 1, 10**15 - 1]
    for place, sample in [(place, read[place]) for place in places]:
        np.testing.assert_array_equal(gpt_dataset(prefix, 10**15, 8, 5)[place]["tokens"], sample["tokens"])


@pytest.mark.parametrize(
    ("documents", "samples", "blocks"),
    [
        (10**6, 64 * 10**6 - 1, 1),  # 64 epochs, whatever their size
        (10**6, 64 * 10**6, 65),  # their last token is in the 65th, and 2^20 entries hold no second epoch
        (10, 2**25 - 10, 1),  # 10 documents and 10 samples an epoch: five entries less than 2^26
        (10, 2**25 + 10, -(-(2**25 + 10) // (2**20 // 20 * 10 - 1))),
    ],
)
def test_megatrons_order_is_kept_up_to_many_epochs_and_entries(documents, samples, blocks):
    assert Order.plan(documents, 8 * documents, samples, 8).blocks == blocks


@given(st.integers(2, 10), st.integers(2, 400), st.integers(1, 60), st.integers(26, 90))
@settings(max_examples=100, deadline=None)
def test_a_longer_order_begins_with_the_shorter_one(documents, tokens, seq_length, exponent):
    short, long = (
        Order.plan(documents, tokens, samples, seq_length) for samples in (2**exponent, 2**exponent * 1000 + 1)
    )
    assert short.block == long.block and short.samples >= 2**exponent and long.samples > 2**exponent * 1000


def test_a_block_holds_a_whole_epoch_and_a_sample():
    """Four million documents of three tokens altogether: no whole epoch is small, and seven tokens take three."""
    assert Order.plan(2**22, 3, 1000, 7).block == Epochs.of(3, 3, False, 7)


@pytest.mark.parametrize(("documents", "samples"), [(300_000, 10_000), (10, 300_000), (50_000, 100_000)])
def test_memory_of_an_order_is_known_before(tmp_path, documents, samples):
    prefix = tmp_path / "x"
    with IndexedDatasetBuilder(prefix, np.uint16) as builder:
        builder.add_documents(np.zeros(2 * documents, np.uint16), np.full(documents, 2))
    tracemalloc.start()
    try:
        dataset = gpt_dataset(prefix, samples, 8, 5)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 0.5 * dataset.order.bytes_to_build < peak < dataset.order.bytes_to_build + 5e6


def test_a_run_of_a_billion_steps_is_opened_in_little_memory(tmp_path):
    """In a process of its own, whose memory is bounded: an order as long as the run takes a hundred times as much."""
    names = [str(peer.write_pair(tmp_path / name, [7, 20, 3, 1, 30, 25])) for name in "ab"]
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from cordee.train.options import TrainConfig
from cordee.data.build import build_datasets
a, b = {names!r}
blend = ("0.3", a, "0.7", b)
options = TrainConfig(seq_length=8, lr=1.0, train_data_path=blend, valid_data_path=(a,), test_data_path=(b,))
for dataset in build_datasets(options, 10**9 * 4096, 10**12, 10**12):
    assert len(dataset) >= 10**12 and len(dataset[10**12 - 1]["tokens"]) == 9
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- blends ----------------------------------------------------------------------------------------------------------


def megatron_blend(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    dataset, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    peer.megatron().helpers.build_blending_indices(dataset, sample, weights, len(weights), size, False)
    return dataset, sample


@given(st.lists(st.one_of(st.integers(1, 10), st.floats(1e-4, 1.0)), min_size=1, max_size=9), st.integers(1, 1500))
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


def test_a_blend_draws_no_more_than_there_is(tmp_path):
    """Ten shares rounded up make 18 samples of the 10 asked for; Megatron raises an IndexError there."""
    prefixes = [str(peer.write_pair(tmp_path / f"x{i}", [90 if i == 0 else 30])) for i in range(10)]
    weights = [0.91] + [0.01] * 9
    with pytest.raises(IndexError, match="oversamples"):
        peer.datasets((10, 0, 0), seq_length=8, seed=1, blend=(prefixes, weights), split="1")
    pairs = [text for pair in zip(map(str, weights), prefixes, strict=True) for text in pair]
    with pytest.raises(ProblemError) as raised:
        build_datasets(config(data_path=tuple(pairs), split="1"), 10, 0, 0)
    (problem,) = raised.value.problems
    assert (problem.option, problem.value, problem.limit) == ("blend", 17, 11)


@pytest.mark.parametrize("weights", [[1, 3], [0.5, 0.3, 0.2], [1, 1e-4, 1e-7]])
def test_a_blend_with_a_period_repeats_megatrons_choice(weights):
    """Each dataset's own samples go on from period to period, none left out and none twice."""
    period, size = 1000, 10**15
    normalised = normalise(normalise(weights))
    chosen, own = megatron_blend(normalised, period)
    sizes = periodic_sizes(weights, size, period)
    blend = BlendedDataset([Numbers(i, count) for i, count in enumerate(sizes)], weights, size, period=period)
    drawn = np.bincount(chosen, minlength=len(weights))
    for turn in (0, 1, 7, size // period - 1):
        for place in (0, 1, 500, 999):
            expected = [chosen[place], turn * drawn[chosen[place]] + own[place]]
            assert blend[turn * period + place].tolist() == expected
    first = [blend[i].tolist() for i in range(3 * period)]
    for number in range(len(weights)):
        assert [i for dataset, i in first if dataset == number] == list(range(3 * drawn[number]))


def test_a_blend_repeats_itself_only_beside_an_order_in_blocks():
    short, long = (Order.plan(10, 80, samples, 8) for samples in (1000, 10**9))
    assert blend_period(2**26, [short, long]) == 2**26
    assert blend_period(10**10, [short, short]) == 10**10
    assert blend_period(2**26 + 1, [short, long]) == 2**20


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
    return gpt_dataset(prefix, **arguments)


def texts(dataset: GPTDataset) -> list[np.ndarray]:
    return [sample["tokens"] for sample in dataset]


def cached(tmp_path: Path) -> dict[str, float]:
    return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


def test_a_second_start_reads_the_order(tmp_path, said):
    first = build(tmp_path)
    before = cached(tmp_path)
    assert len(before) == 3
    second = build(tmp_path)
    assert cached(tmp_path) == before and not said
    assert all((first[i]["tokens"] == second[i]["tokens"]).all() for i in range(len(first)))


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


@pytest.mark.parametrize("damage", ["cut", "empty", "nonsense", "other shape", "one bit", "other order", "no checksum"])
@pytest.mark.parametrize("which", ["documents", "samples", "shuffle"])
def test_a_damaged_order_is_built_again(tmp_path, said, damage, which):
    first = texts(build(tmp_path))
    path = next((tmp_path / "cache").glob(f"*-{which}.npy"))
    content = path.read_bytes()
    if damage == "other shape":
        np.save(path, np.zeros((3, 3), np.int32))
    elif damage == "no checksum":  # the right shape, other samples
        np.save(path, np.load(path)[::-1])
    elif damage == "one bit":
        path.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
    elif damage == "other order":
        build(tmp_path, seed=6)
        (other,) = set((tmp_path / "cache").glob(f"*-{which}.npy")) - {path}
        path.write_bytes(other.read_bytes())
    else:
        path.write_bytes({"cut": content[:-4], "empty": b"", "nonsense": b"x" * len(content)}[damage])
    again = build(tmp_path)
    assert len(said) == 1 and "damaged" in said[0]
    assert path.read_bytes() == content
    np.testing.assert_array_equal(first, texts(again))


def test_every_byte_of_a_kept_order_counts(tmp_path, said):
    def keep(value: int = 7) -> list[int]:
        return cached_arrays(tmp_path, "key", {"a": (4,)}, lambda: {"a": np.arange(4) * value})["a"].tolist()

    keep()
    content = (tmp_path / "key-a.npy").read_bytes()
    for place in range(len(content)):
        number = int.from_bytes(content, "little") ^ (1 << 8 * place + place % 8)
        (tmp_path / "key-a.npy").write_bytes(number.to_bytes(len(content), "little"))
        assert keep() == [0, 7, 14, 21]
    assert len(said) == len(content)
    assert keep(8) == [0, 7, 14, 21] and len(said) == len(content)  # what is kept is read, not built


def test_what_was_just_verified_is_opened_without_reading_it(tmp_path, said):
    def keep(**verified) -> list[int]:
        return cached_arrays(tmp_path, "key", {"a": (4,)}, lambda: {"a": np.arange(4)}, **verified)["a"].tolist()

    assert keep(verified=True) == [0, 1, 2, 3]  # it is not there yet
    path = tmp_path / "key-a.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes(4))
    assert keep(verified=True) == [0, 1, 2, 3] and not said and path.read_bytes() != content
    assert keep() == [0, 1, 2, 3] and len(said) == 1 and path.read_bytes() == content


def test_only_an_order_in_one_block_counts_as_verified(tmp_path, monkeypatch):
    verified = []
    monkeypatch.setattr(gpt, "cached_arrays", lambda *given: verified.append(given[-1]) or cached_arrays(*given))
    build(tmp_path, verified=True)
    large = Order(6, Epochs.of(86, 2**17, False, 8), 2)
    GPTDataset(IndexedDataset(tmp_path / "x"), 0, 6, large, 8, 5, tmp_path / "cache", verified=True)[0]
    assert verified == [True, False]


def test_tokens_are_counted_by_where_sequences_lie(tmp_path):
    dataset = IndexedDataset(peer.write_pair(tmp_path / "x", [7, 0, 20, 3, 1, 30, 25, 0]))
    for first in range(9):
        for last in range(first, 9):
            assert dataset.tokens_between(first, last) == dataset.sequence_lengths[first:last].sum()


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_an_order_is_refused_where_it_is_built_not_where_it_is_read(tmp_path, monkeypatch):
    """64 epochs of 40 documents and 640 samples of 8 tokens: 2,560 entries of 16 bytes and 40,959 of 12."""
    prefix = str(peer.write_pair(tmp_path / "x", [128] * 40))
    bytes_needed = 64 * 40 * 16 + (64 * 640 - 1) * 12
    options = config(data_path=(prefix,), split="1")

    def left(available: int) -> None:
        monkeypatch.setattr(device, "available_memory", lambda: available)

    left(bytes_needed - 1)
    assert data_check.check(options, train_samples=64 * 640 - 1) == []
    with pytest.raises(ProblemError) as caught:
        build_datasets(options, 64 * 640 - 1, 0, 0)
    (problem,) = caught.value.problems
    assert (problem.option, problem.value) == ("dataset", prefix) and not list((tmp_path / "cordee-cache").glob("*"))
    left(bytes_needed)
    build_datasets(options, 64 * 640 - 1, 0, 0)
    left(0)  # nothing is built
    build_datasets(options, 64 * 640 - 1, 0, 0)
    left(2**20 * 16)  # a thousand million times as long, the order is in blocks, each of no more than 2^20 entries
    build_datasets(options, 10**15, 10**15, 0).train[10**14]


def test_a_blend_is_refused_where_it_is_built(tmp_path, monkeypatch):
    """Ten bytes a sample; each dataset's order is there already."""
    prefix = str(peer.write_pair(tmp_path / "x", [20000]))
    options = config(data_path=("1", prefix, "1", prefix), split="1")
    build_datasets(options, 4000, 0, 0)
    for path in (tmp_path / "cordee-cache").glob("*-dataset.npy"):
        path.unlink()
    monkeypatch.setattr(device, "available_memory", lambda: 39_999)
    with pytest.raises(ProblemError) as caught:
        build_datasets(options, 4000, 0, 0)
    assert [problem.option for problem in caught.value.problems] == ["blend"]
    monkeypatch.setattr(device, "available_memory", lambda: 40_000)
    build_datasets(options, 4000, 0, 0)


def test_a_damaged_blend_is_built_again(tmp_path, said):
    datasets = [Numbers(0, 100), Numbers(1, 100)]
    BlendedDataset(datasets, [1, 3], 100, tmp_path)
    path = next(tmp_path.glob("*-dataset.npy"))
    content = path.read_bytes()
    path.write_bytes(content[:-6] + bytes([content[-6] ^ 1]) + content[-5:])
    again = BlendedDataset(datasets, [1, 3], 100, tmp_path)
    np.testing.assert_array_equal(again.dataset_index, megatron_blend(normalise([1, 3]), 100)[0])
    assert len(said) == 1 and path.read_bytes() == content


def test_a_planted_link_is_not_written_through(tmp_path):
    first = build(tmp_path)
    (tmp_path / "victim").write_text("mine")
    for path in list((tmp_path / "cache").iterdir()):
        path.with_name(f".{path.name}.new").symlink_to(tmp_path / "victim")
        path.unlink()
    np.testing.assert_array_equal(texts(first), texts(build(tmp_path)))
    assert (tmp_path / "victim").read_text() == "mine" and len(cached(tmp_path)) == 3


@pytest.fixture
def waits(monkeypatch) -> list[str]:
    """Log lines about waiting; nobody does in earnest."""
    lines: list[str] = []
    monkeypatch.setattr(logger, "info", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr(order_cache, "_POLL", 0.01)
    return lines


def keep(directory: Path, built: list[int], names: str = "a") -> dict[str, int]:
    def build():
        built.append(1)
        return {name: np.full(4, len(built)) for name in names}

    return {
        name: int(array[0])
        for name, array in cached_arrays(directory, "key", dict.fromkeys(names, (4,)), build).items()
    }


def test_who_finds_another_process_building_waits_for_it(tmp_path, said, waits, monkeypatch):
    """A builder that fails is followed, one that succeeds is read from, and the waiting is logged once."""
    first, built, tries = lock.acquire(tmp_path / ".key.lock"), [], []
    acquire = lock.acquire
    monkeypatch.setattr(lock, "acquire", lambda *given, **values: tries.append(1) or acquire(*given, **values))
    waiting = threading.Thread(target=lambda: keep(tmp_path, built))
    waiting.start()
    while waiting.is_alive() and len(tries) < 3:
        time.sleep(0.01)
    assert str(os.getpid()) in waits[0] and not built
    first.release()
    waiting.join()
    assert built == [1] and len(waits) == 1 and not said
    with acquire(tmp_path / ".key.lock"):
        assert keep(tmp_path, built) == {"a": 1}
    assert built == [1]


def test_a_builder_that_hangs_is_not_waited_for_without_end(tmp_path, said, waits, monkeypatch):
    monkeypatch.setattr(order_cache, "PATIENCE", 0.05)
    built: list[int] = []
    with lock.acquire(tmp_path / ".key.lock"):
        assert keep(tmp_path, built) == {"a": 1}
        assert not (tmp_path / "key-a.npy").exists()
    assert len(said) == 1


def test_where_nothing_can_be_kept_nobody_waits(tmp_path, said, waits, monkeypatch):
    """Two processes, both in the middle of building; else the barrier breaks."""

    def refuse(*arguments, **values):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock, "acquire", refuse)
    barrier = threading.Barrier(2)

    def build():
        barrier.wait(60)
        return {"a": np.zeros(4)}

    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(cached_arrays, tmp_path, "key", {"a": (4,)}, build) for _ in range(2)]
    assert [one.result()["a"].tolist() for one in both] == [[0] * 4] * 2
    assert not waits


def test_a_file_that_is_right_is_not_replaced(tmp_path, said):
    built: list[int] = []
    keep(tmp_path, built, "ab")
    right = (tmp_path / "key-a.npy").stat()
    (tmp_path / "key-b.npy").unlink()
    assert keep(tmp_path, built, "ab") == {"a": 1, "b": 2}
    assert os.path.samestat((tmp_path / "key-a.npy").stat(), right)


def test_open_blocks_are_freed_with_their_dataset(tmp_path):
    dataset = build(tmp_path, num_samples=10**12)
    dataset[0]
    gone = weakref.ref(dataset)
    gc.disable()
    try:
        del dataset
        assert gone() is None
    finally:
        gc.enable()


def test_small_blocks_are_not_kept_and_large_ones_are(tmp_path):
    dataset = build(tmp_path, num_samples=10**12)
    dataset[10**11]
    assert not (tmp_path / "cache").exists()
    large = Order(6, Epochs.of(86, 2**17, False, 8), 2)
    kept = GPTDataset(dataset.indexed, 0, 6, large, 8, 5, tmp_path / "cache")
    last = GPTDataset(dataset.indexed, 0, 6, large, 8, 5)[len(kept) - 1]
    np.testing.assert_array_equal(kept[len(kept) - 1]["tokens"], last["tokens"])
    assert len(cached(tmp_path)) == 3


def test_where_nothing_can_be_written_the_order_stays_in_memory(tmp_path, said):
    (tmp_path / "cache").write_text("in the way")
    dataset = build(tmp_path)
    assert len(said) == 1 and "cannot be kept" in said[0]
    np.testing.assert_array_equal(dataset[0]["tokens"], build(tmp_path, cache_dir=None)[0]["tokens"])


def test_the_cache_lies_where_the_option_says(tmp_path):
    prefix = str(peer.write_pair(tmp_path / "x", [30, 30]))
    build_datasets(config(data_path=(prefix,), split="1", data_cache_path=str(tmp_path / "elsewhere")), 3, 0, 0)
    assert len(os.listdir(tmp_path / "elsewhere")) == 3
    assert not (tmp_path / "cordee-cache").exists()
    build_datasets(config(data_path=(prefix,), split="1"), 3, 0, 0)
    assert len(os.listdir(tmp_path / "cordee-cache")) == 3
