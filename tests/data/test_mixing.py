"""Mixing datasets: which samples an epoch has, by strategy, as the `datasets` library has them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cordee.data.build import build_datasets, plan_parts, read_parts
from cordee.data.indexed import IndexedDatasetBuilder
from cordee.data.options import SampleOptions
from cordee.data.tuning_dataset import TuningDataset, document
from cordee.train.objectives import registry
from cordee.train.options import TrainConfig

SIZES = (5, 9, 16)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory) -> tuple[str, ...]:
    """Of datasets of dialogues, whose samples are two tokens: the dataset's number and the sample's."""
    folder, made = tmp_path_factory.mktemp("mixing"), []
    for number, size in enumerate(SIZES):
        made.append(document(str(folder / f"data{number}")))
        for field in ("input_ids", "attention_mask", "labels"):
            with IndexedDatasetBuilder(document(str(folder / f"data{number}"), field), np.int32) as builder:
                for sample in range(size):
                    builder.add_sequence(np.array([number, sample]))
                    builder.end_document()
    return tuple(made)


def options(prefixes: tuple[str, ...], **given) -> SampleOptions:
    return SampleOptions(seq_length=2, train_iters=1, train_data_path=prefixes, **given)


def samples(prefixes: tuple[str, ...], size: int, **given) -> list[tuple[int, int]]:
    train = build_datasets(options(prefixes, **given), size, 0, 0, sequences=TuningDataset).train
    assert train is not None
    return [tuple(train[index]["input_ids"].tolist()) for index in range(size)]


def epoch(prefixes: tuple[str, ...], **given) -> float:
    config = TrainConfig(seq_length=2, lr=1.0, train_iters=1, stage="sft", train_data_path=prefixes, **given)
    size = registry()["sft"].size(config)
    assert size is not None
    return size.epoch


def test_a_concatenation_has_every_sample_once_an_epoch(prefixes):
    everything = {(number, sample) for number, size in enumerate(SIZES) for sample in range(size)}
    found = samples(prefixes, 3 * sum(SIZES), mix_strategy="concat")
    passes = [found[begin : begin + sum(SIZES)] for begin in range(0, len(found), sum(SIZES))]
    assert all(set(each) == everything for each in passes) and len({tuple(each) for each in passes}) == 3
    assert epoch(prefixes, mix_strategy="concat") == sum(SIZES)


def test_a_dataset_that_is_given_twice_is_two(prefixes):
    twice = (prefixes[0], *prefixes)
    sizes = (SIZES[0], *SIZES)
    assert epoch(twice, mix_strategy="concat") == sum(sizes)
    assert epoch(twice, mix_strategy="interleave_under") == 4 * min(sizes)
    assert epoch(twice, mix_strategy="interleave_over") == 4 * max(sizes)


@pytest.mark.parametrize(("strategy", "stops"), [("under", "first_exhausted"), ("over", "all_exhausted")])
def test_interleaved_datasets_take_turns_until_one_or_all_are_exhausted(prefixes, strategy: str, stops: str):
    library = pytest.importorskip("datasets")
    sources = [library.Dataset.from_dict({"of": [number] * size}) for number, size in enumerate(SIZES)]
    theirs = library.interleave_datasets(sources, stopping_strategy=stops)["of"]
    given = {"mix_strategy": f"interleave_{strategy}"}
    assert epoch(prefixes, **given) == len(theirs)
    ours = samples(prefixes, len(theirs), **given)
    assert [number for number, _ in ours] == list(theirs)
    of_all = [len({sample for number, sample in ours if number == each}) for each in range(3)]
    assert of_all == ([5, 5, 5] if strategy == "under" else list(SIZES))


def test_shares_say_how_often_each_is_drawn(prefixes):
    given = {"mix_strategy": "interleave_over", "interleave_probs": (0.5, 0.25, 0.25)}
    assert epoch(prefixes, **given) == 64  # four times the largest
    drawn = [number for number, _ in samples(prefixes, 64, **given)]
    assert [drawn.count(number) for number in range(3)] == [32, 16, 16]
    assert epoch(prefixes, **{**given, "mix_strategy": "interleave_under"}) == 10


def test_text_weighs_by_its_tokens(tmp_path: Path):
    prefixes = []
    for number, tokens in enumerate((400, 1200)):
        prefixes.append(str(tmp_path / f"text{number}"))
        with IndexedDatasetBuilder(prefixes[-1], np.int32) as builder:
            builder.add_sequence(np.full(tokens, number))
            builder.end_document()
    given = replace(options(tuple(prefixes), mix_strategy="concat", data_cache_path=str(tmp_path)), seq_length=4)
    train = build_datasets(given, 396, 0, 0).train
    assert train is not None
    drawn = [int(train[index]["tokens"][0]) for index in range(396)]
    assert drawn.count(1) == 3 * drawn.count(0) == 297


def test_what_does_not_go_together(prefixes):
    first, second, third = prefixes
    weighted = options(("1", first, "2", second), mix_strategy="concat")
    assert [(each.option, each.kind) for each in read_parts(weighted)[1]] == [("--mix-strategy", "excludes")]
    fewer = options(prefixes, mix_strategy="interleave_under", interleave_probs=(1.0, 2.0))
    assert [problem.limit for problem in read_parts(fewer)[1]] == [3]
    (unweighted,) = read_parts(options((first, second, third)))[1]
    assert unweighted.limit == "pairs" and "--mix-strategy" in unweighted.fix
    assert plan_parts(options((first,)))["train"].blend.weights is None
