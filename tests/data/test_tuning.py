"""Samples of dialogues: how they are cut, packed and made batches."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cordee.data.encode import column_of
from cordee.data.indexed import IndexedDataset, IndexedDatasetBuilder
from cordee.data.messages import IGNORED
from cordee.data.order import Order
from cordee.data.tuning import FIELDS, Packer, field_names, kept_of, kept_of_sides, knapsacks
from cordee.data.tuning_collate import PreferenceBatch, TuningCollate, paired
from cordee.data.tuning_dataset import MismatchedDataset, TuningDataset, document, sibling_problems
from cordee.errors import ProblemError
from cordee.model.gpt import GPTModel
from cordee.model.init import initialise
from cordee.train.plan import plan_run
from tests.train import tiny

Samples = list[tuple[list[int], list[int]]]


def make_samples(count: int, longest: int, vocab: int = 61, seed: int = 0) -> Samples:
    """Ids and labels: an untrained source, a target, and for every third sample a second turn."""
    random = np.random.default_rng(seed)
    samples = []
    for number in range(count):
        labels: list[int] = []
        ids: list[int] = []
        for _ in range(1 + (number % 3 == 0)):
            source, target = random.integers(1, max(2, longest // 4), 2).tolist()
            new = random.integers(vocab, size=source + target).tolist()
            ids += new
            labels += [IGNORED] * source + new[source:]
        samples.append((ids[:longest], labels[:longest]))
    return samples


def columns_of(samples: Samples) -> dict:
    ids, labels = zip(*samples, strict=True)
    masks = [[1] * len(each) for each in ids]
    return dict(zip(field_names(False), map(column_of, (ids, masks, labels)), strict=True))


def write(prefix: Path, columns: dict) -> str:
    for name, column in columns.items():
        with IndexedDatasetBuilder(f"{prefix}_{name}_document") as builder:
            builder.add_documents(column.tokens, column.lengths)
    return str(prefix)


# ---- length ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "length", "expected"),
    [
        (3, 2, 8, (3, 2)),
        (20, 3, 10, (7, 3)),  # twice the target fits: the source is cut
        (3, 20, 10, (3, 7)),  # twice the source fits: the target is cut
        (20, 20, 10, (5, 5)),  # both are long: in proportion
        (30, 10, 8, (6, 2)),
    ],
)
def test_source_and_target_are_cut_in_proportion(source, target, length, expected):
    labels = np.array([IGNORED] * source + list(range(target)))
    kept = np.arange(len(labels))[kept_of(labels, length)].tolist()
    assert kept == [*range(expected[0]), *range(source, source + expected[1])]


def test_turns_are_cut_one_after_another():
    """The second turn has what the first leaves, and nothing of a third remains."""
    turn = [IGNORED] * 2 + [7] * 2
    labels = np.array(turn * 3)
    assert np.arange(12)[kept_of(labels, 4)].tolist() == [0, 1, 2, 3]
    assert np.arange(12)[kept_of(labels, 6)].tolist() == [0, 1, 2, 3, 4, 6]
    trained_from_the_first = np.array([5, 5, IGNORED, IGNORED, 6, 6])
    assert np.arange(6)[kept_of(trained_from_the_first, 2)].tolist() == [0, 1]


@pytest.mark.parametrize("length", [1, 2, 5, 8, 13])
def test_the_sides_of_a_pair_are_cut_alike_but_for_their_answers(length: int):
    """One prompt for both, and of neither answer nothing, whatever the lengths."""
    for source, chosen, rejected in product((0, 1, 3, 9, 40), (1, 2, 7, 30), (1, 2, 7, 30)):
        sides = [np.array([IGNORED] * source + [7] * answer) for answer in (chosen, rejected)]
        kept = [np.arange(len(labels))[own] for labels, own in zip(sides, kept_of_sides(sides, length), strict=True)]
        prompts = [own[own < source].tolist() for own in kept]
        answers = [own[own >= source].tolist() for own in kept]
        assert prompts[0] == prompts[1] == list(range(len(prompts[0])))
        assert all(len(own) <= length for own in kept) and all(answers)
        assert all(answer == list(range(source, source + len(answer))) for answer in answers)
        room = max(map(len, answers))
        assert [len(answer) for answer in answers] == [min(room, chosen), min(room, rejected)]
        if max(source + chosen, source + rejected) <= length:
            assert [len(own) for own in kept] == [source + chosen, source + rejected]


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_the_largest_that_fits_is_taken_again_and_again():
    assert list(knapsacks([5, 3, 7], 8)) == [[2], [0, 1]]
    assert list(knapsacks([9, 1], 8)) == [[1], [0]]
    assert list(knapsacks([], 8)) == []


@pytest.mark.parametrize("numbered", [False, True])
def test_rows_hold_every_sample_once(numbered: bool):
    samples = make_samples(200, 30)
    packer = Packer(32, pad=60, numbered=numbered)
    parts = [packer.add(columns_of(samples[:90])), packer.add(columns_of(samples[90:])), packer.flush()]
    ids, masks, labels = (
        np.concatenate([part[name].tokens for part in parts]).reshape(-1, 32) for name in field_names(False)
    )
    left = sorted(samples)
    for row in range(len(ids)):
        ends = []
        if numbered:
            ends = [int((masks[row] == number).sum()) for number in range(1, masks[row].max() + 1)]
            assert masks[row].tolist() == [n for n, size in enumerate(ends, 1) for _ in range(size)] + [0] * (
                32 - sum(ends)
            )
            begin = 0
            for size in ends:
                left.remove((ids[row, begin : begin + size].tolist(), labels[row, begin : begin + size].tolist()))
                begin += size
            assert (labels[row, begin:] == IGNORED).all() and (ids[row, begin:] == 60).all()
        else:
            assert (masks[row] == 1).all()
    assert not numbered or not left
    assert packer.tokens == sum(len(each) for each, _ in samples) and packer.rows == len(ids)
    assert (labels != IGNORED).sum() == sum(label != IGNORED for _, each in samples for label in each)


# ---- the dataset -----------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> tuple[Samples, IndexedDataset]:
    samples = make_samples(20, 12)
    return samples, IndexedDataset(document(write(tmp_path / "data", columns_of(samples))))


def test_every_pass_has_each_sample_once_in_an_order_of_its_own(written):
    samples, indexed = written
    dataset = TuningDataset(indexed, 2, 18, Order.of_sequences(16, 40), seq_length=16, seed=5)
    assert len(dataset) == 48
    passes = [[dataset[16 * number + place] for place in range(16)] for number in range(3)]
    found = [[(s["input_ids"].tolist(), s["labels"].tolist()) for s in each] for each in passes]
    assert all(sorted(each) == sorted(samples[2:18]) for each in found)
    assert found[0] != found[1] != found[2]
    expected = np.random.RandomState(5).permutation(16)  # MindSpeed-LLM's first pass
    assert found[0] == [samples[2 + place] for place in expected]
    again = TuningDataset(indexed, 2, 18, Order.of_sequences(16, 4000), seq_length=16, seed=5)
    assert again[40]["input_ids"].tolist() == found[2][8][0]


def test_longer_samples_are_cut(written):
    samples, indexed = written
    dataset = TuningDataset(indexed, 0, 20, Order.of_sequences(20, 20), seq_length=5, seed=5)
    for place, sequence in enumerate(np.random.RandomState(5).permutation(20)):
        kept = kept_of(np.array(samples[sequence][1]), 5)
        assert dataset[place]["input_ids"].tolist() == np.array(samples[sequence][0])[kept].tolist()
        assert len(dataset[place]["labels"]) <= 5


def test_files_that_do_not_belong_together_are_problems(written, tmp_path: Path):
    samples, indexed = written
    assert list(sibling_problems(indexed)) == []
    short = columns_of([(ids[:-1], labels[:-1]) for ids, labels in samples])
    write(tmp_path / "data", {field_names(False)[2]: short[field_names(False)[2]]})
    assert [problem.kind for problem in sibling_problems(indexed)] == ["differs"]
    for path in tmp_path.glob("*labels*"):
        path.unlink()
    assert [problem.kind for problem in sibling_problems(indexed)] == ["unreadable"]


# ---- batches ---------------------------------------------------------------------------------------------------------


def sample_of(ids: list[int], labels: list[int], mask: list[int] | None = None) -> dict[str, np.ndarray]:
    values = (ids, mask or [1] * len(ids), labels)
    return {name: np.array(value, np.int64) for name, value in zip(FIELDS, values, strict=True)}


def collate_of(length: int, **options) -> TuningCollate:
    defaults = {"multiple": None, "vocab_size": None, "eod": None}
    flags = dict.fromkeys(("reset_position_ids", "reset_attention_mask"), False)
    return TuningCollate(seq_length=length, **{**defaults, **flags, **options})


def test_labels_are_those_of_the_next_token():
    batch = collate_of(6)([sample_of([1, 2, 3, 4], [IGNORED, IGNORED, 3, 9])])
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, 3, 9, IGNORED, IGNORED, IGNORED]]
    assert batch.counted.tolist() == [[True] * 4 + [False] * 2]
    assert batch.segments is None and batch.position_ids is None
    full = collate_of(4)([sample_of([1, 2, 3, 4], [IGNORED, IGNORED, 3, 9])])
    assert full.counted is None


def test_length_of_the_longest():
    samples = [sample_of([1] * length, [IGNORED] + [1] * (length - 1)) for length in (3, 9)]
    assert collate_of(32, multiple=8)(samples).input_ids.shape == (2, 16)
    assert collate_of(32)(samples).input_ids.shape == (2, 32)


def test_samples_of_a_row_are_apart():
    """The first token of a sample is no target, whatever label it has."""
    row = sample_of([1, 2, 3, 4, 5, 0], [1, 2, 3, 4, 5, IGNORED], [1, 1, 2, 2, 2, 0])
    batch = collate_of(6)([row])
    assert batch.labels.tolist() == [[2, IGNORED, 4, 5, IGNORED, IGNORED]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, -1]]
    assert batch.position_ids.tolist()[0][:5] == [0, 1, 0, 1, 2]
    assert batch.counted.tolist() == [[True] * 5 + [False]]


def test_resets_act_behind_the_end_of_a_document():
    row = sample_of([1, 9, 3, 4], [IGNORED, 9, IGNORED, 4])
    batch = collate_of(4, eod=9, reset_position_ids=True, reset_attention_mask=True)([row])
    assert batch.position_ids.tolist() == [[0, 1, 0, 1]]
    assert batch.segments.tolist() == [[0, 0, 1, 1]]
    assert batch.labels.tolist() == [[9, IGNORED, 4, IGNORED]]


def test_unknown_token_is_a_problem():
    with pytest.raises(ProblemError):
        collate_of(4, vocab_size=3)([sample_of([1, 3], [IGNORED, 3])])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model": "baichuan2-13b", "num_query_groups": 4, "position_embedding_type": "alibi"},
        {"model": "mixtral-8x7b", "num_experts": 4, "moe_router_topk": 2},
    ],
    ids=["rope", "alibi", "moe"],
)
def test_packed_samples_train_as_alone(tmp_path: Path, changes: dict):
    """The sum of losses and the gradients, against every sample alone through torch's own cross entropy."""
    spec = plan_run(tiny.config(tmp_path, save=None, save_interval=None, **changes), 1).spec
    samples = make_samples(12, 14)
    packer = Packer(16, pad=0, numbered=True)
    packer.add(columns_of(samples))
    rows = packer.flush()
    arrays = [np.split(rows[name].tokens, packer.rows) for name in field_names(False)]
    packed = collate_of(16)(
        [sample_of(*(each.tolist() for each in (i, y, m))) for i, m, y in zip(*arrays, strict=True)]
    )
    models = [GPTModel(spec.config).train() for _ in range(2)]
    for model in models:
        initialise(model, 1)
    one, alone = models
    logits = one(packed.input_ids, position_ids=packed.position_ids, segments=packed.segments)
    total = F.cross_entropy(logits.flatten(0, 1), packed.labels.flatten(), ignore_index=IGNORED, reduction="sum")
    total.backward()
    expected = torch.zeros(())
    for ids, labels in samples:
        target = torch.tensor(labels[1:])
        expected = expected + F.cross_entropy(
            alone(torch.tensor([ids]))[0, :-1], target, ignore_index=IGNORED, reduction="sum"
        )
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)
    for (name, ours), theirs in zip(one.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


# ---- preferences -----------------------------------------------------------------------------------------------------


def kto_data(folder: Path, prompts: list[list[int]]) -> IndexedDataset:
    """Samples whose answers are 50 and the number of the sample."""
    ids = [[*prompt, 50, number] for number, prompt in enumerate(prompts)]
    labels = [[IGNORED] * len(prompt) + [50, number] for number, prompt in enumerate(prompts)]
    flags = [[number % 2] for number in range(len(prompts))]
    columns = map(column_of, (ids, [[1] * len(each) for each in ids], labels, flags))
    return IndexedDataset(document(write(folder / "kto", dict(zip(field_names(False, True), columns, strict=True)))))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_no_prompt_keeps_its_own_answer(tmp_path: Path, count: int):
    indexed = kto_data(tmp_path, [[10 + number] * (number + 1) for number in range(count)])
    dataset = MismatchedDataset(indexed, 0, count, Order.of_sequences(count, count), 16, None)
    assert list(sibling_problems(indexed)) == []
    for number in range(count):
        sample = dataset[number]
        other = int(sample["mismatched_labels"][-1])
        assert other in {*range(count)} - {number}
        assert sample["mismatched_input_ids"].tolist() == [*[10 + number] * (number + 1), 50, other]
        assert sample["mismatched_labels"].tolist() == [*[IGNORED] * (number + 1), 50, other]
        assert int(dataset[number]["mismatched_labels"][-1]) == other  # whenever it is read


def test_an_answer_to_the_same_prompt_is_no_mismatched_one(tmp_path: Path):
    prompts = [[1], [1], [2, 2], [2, 2], [1], *([[3]] * 20)]
    dataset = MismatchedDataset(kto_data(tmp_path, prompts), 0, 25, Order.of_sequences(25, 25), 16, None)
    others = [int(dataset[number]["mismatched_labels"][-1]) for number in range(25)]
    assert all(prompts[other] != prompt for other, prompt in zip(others, prompts, strict=True))


def test_mismatched_answers_of_pairs_are_of_both_kinds(tmp_path: Path):
    """Pairs are a chosen and a rejected answer by turns: the baseline would lean to whatever kind was taken more."""
    indexed = kto_data(tmp_path, [[10 + number // 2] for number in range(200)])
    dataset = MismatchedDataset(indexed, 0, 200, Order.of_sequences(200, 200), 16, None)
    kinds = [int(dataset[number]["mismatched_labels"][-1]) % 2 for number in range(200)]
    assert 70 < sum(kinds) < 130


def test_one_sample_has_no_mismatched_answer(tmp_path: Path):
    (problem,) = sibling_problems(kto_data(tmp_path, [[1]]))
    assert problem.kind == "at least"


def test_the_sides_of_a_sample_are_rows_one_after_the_other():
    def side(name: str, ids: list[int], source: int) -> dict[str, np.ndarray]:
        labels = np.array([IGNORED] * source + ids[source:])
        return {
            f"{name}_input_ids": np.array(ids),
            f"{name}_attention_mask": np.ones(len(ids)),
            f"{name}_labels": labels,
        }

    samples = [
        {**side("chosen", [1, 2, 3], 1), **side("rejected", [1, 4], 1), "reference": np.array([-1.5, -2.5])},
        {**side("chosen", [5, 6], 1), **side("rejected", [5, 7, 8, 9], 1), "reference": np.array([-3.5, -4.5])},
    ]
    options = {"vocab_size": 61, "eod": None, "reset_position_ids": False, "reset_attention_mask": False}
    batch = TuningCollate(seq_length=8, multiple=4, **options)(samples)
    assert isinstance(batch, PreferenceBatch)
    chosen, rejected = paired(batch.input_ids)
    assert chosen.tolist() == [[1, 2, 3, 0], [5, 6, 0, 0]] and rejected.tolist() == [[1, 4, 0, 0], [5, 7, 8, 9]]
    assert paired(batch.labels)[1].tolist() == [[4, *[IGNORED] * 3], [7, 8, 9, IGNORED]]
    assert batch.reference.sum(1).tolist() == [-1.5, -2.5, -3.5, -4.5]
