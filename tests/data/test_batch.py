from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cordee.data.batch import Batch, axes
from cordee.data.gpt_collate import GPTCollate
from cordee.errors import ProblemError
from tests.data import peer
from tests.problems import facts, limits

EOD = 0
flags = st.fixed_dictionaries(
    {"eod_mask_loss": st.booleans(), "reset_position_ids": st.booleans(), "reset_attention_mask": st.booleans()}
)


@given(hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(2, 24)), elements=st.integers(0, 3)), flags)
@settings(max_examples=150, deadline=None)
def test_what_an_eod_does_is_megatrons(samples, flags):
    """Labels, positions and who sees whom, sample by sample."""
    masks = peer.megatron().gpt._get_ltor_masks_and_position_ids
    batch = GPTCollate(vocab_size=4, eod=EOD, **flags)([{"tokens": sample} for sample in samples])
    causal = torch.tril(torch.ones(samples.shape[1] - 1, samples.shape[1] - 1, dtype=torch.bool))
    for row, sample in enumerate(torch.from_numpy(samples)):
        hidden, loss_mask, positions = masks(
            sample[:-1],
            EOD,
            flags["reset_position_ids"],
            flags["reset_attention_mask"],
            flags["eod_mask_loss"],
            create_attention_mask=True,
        )
        assert torch.equal(batch.input_ids[row], sample[:-1])
        assert torch.equal(batch.labels[row] != -100, loss_mask.bool())
        trained = loss_mask.bool()
        assert torch.equal(batch.labels[row][trained], sample[1:][trained])
        ours = torch.arange(len(sample) - 1) if batch.position_ids is None else batch.position_ids[row]
        assert torch.equal(ours, positions)
        seen = causal
        if batch.segments is not None:
            seen = causal & (batch.segments[row][:, None] == batch.segments[row][None, :])
        assert torch.equal(seen, ~hidden[0])
    assert batch.num_trained == int((batch.labels != -100).sum())
    assert (batch.position_ids is None) == (not flags["reset_position_ids"])
    assert (batch.segments is None) == (not flags["reset_attention_mask"])


def test_by_hand():
    batch = GPTCollate(eod=0, eod_mask_loss=True, reset_position_ids=True, reset_attention_mask=True)(
        [{"tokens": np.array([5, 0, 6, 7, 0, 0, 8])}]
    )
    assert batch.input_ids.tolist() == [[5, 0, 6, 7, 0, 0]]
    assert batch.labels.tolist() == [[0, -100, 7, 0, -100, -100]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch.segments.tolist() == [[0, 0, 1, 1, 1, 2]]
    assert batch.num_trained == 3
    assert {t.dtype for t in (batch.input_ids, batch.labels, batch.position_ids, batch.segments)} == {torch.int64}


@pytest.mark.parametrize("token", [7, -1])
def test_a_token_outside_the_vocabulary_is_refused(token):
    with pytest.raises(ProblemError) as caught:
        GPTCollate(vocab_size=7)([{"tokens": np.array([1, last, 0])} for last in (6, token)])
    assert (facts(caught), limits(caught)) == ([("--vocab-size", 7, "range")], [token])


def test_to_moves_every_tensor():
    batch = Batch(torch.zeros(1, 2), torch.zeros(1, 2), segments=torch.zeros(1, 2)).to("meta")
    assert batch.position_ids is None
    assert all(t.device.type == "meta" for t in (batch.input_ids, batch.labels, batch.segments))


@dataclass(frozen=True, eq=False, kw_only=True)
class Weighted(Batch):
    weights: torch.Tensor = axes("sample")
    scores: torch.Tensor = axes("sequence", "token", pad=0.5)


def weighted() -> Weighted:
    """Two samples of two sequences, of three tokens and of one."""
    samples = [
        {
            "input_ids": np.full((2, length), length),
            "labels": np.full((2, length), length),
            "scores": np.arange(2.0 * length, dtype=np.float32).reshape(2, length),
            "weights": np.float32(length),
        }
        for length in (3, 1)
    ]
    return Weighted.of(samples, 4)


def test_samples_become_batches_by_the_axes_of_their_fields():
    batch = weighted()
    assert batch.input_ids.tolist() == [[3, 3, 3, 0], [3, 3, 3, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert batch.labels.tolist() == [[3, 3, 3, -100], [3, 3, 3, -100], [1, -100, -100, -100], [1, -100, -100, -100]]
    assert batch.scores.tolist() == [[0, 1, 2, 0.5], [3, 4, 5, 0.5], [0, 0.5, 0.5, 0.5], [1, 0.5, 0.5, 0.5]]
    assert batch.weights.tolist() == [3.0, 1.0]
    assert (batch.num_tokens, batch.num_trained) == (16, 8)
    assert replace(batch, samples=torch.tensor([7, 9])).sequences.tolist() == [14, 15, 18, 19]


def test_every_field_is_cut_along_its_tokens_and_moved():
    batch = weighted().at("token", torch.tensor([2, 0]))
    assert batch.scores.tolist() == [[2, 0], [5, 3], [0.5, 0], [0.5, 1]]
    assert batch.labels.tolist() == [[3, 3], [3, 3], [-100, 1], [-100, 1]]
    assert batch.weights.tolist() == [3.0, 1.0]
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.input_ids, moved.labels, moved.weights, moved.scores)} == {"meta"}


@dataclass(frozen=True, eq=False, kw_only=True)
class Undeclared(Batch):
    scores: torch.Tensor


def test_a_field_without_axes_is_refused():
    batch = Undeclared(input_ids=torch.zeros(1, 2), labels=torch.zeros(1, 2), scores=torch.zeros(1, 2))
    for change in (lambda: batch.to("meta"), lambda: batch.at("token", torch.tensor([0]))):
        with pytest.raises(AssertionError, match="scores"):
            change()
    sample = {"input_ids": np.zeros((1, 2)), "labels": np.zeros((1, 2)), "margin": np.float32(1)}
    with pytest.raises(AssertionError, match="margin"):
        Batch.of([sample], 2)
    with pytest.raises(AssertionError, match="tokens"):
        GPTCollate()([{"tokens": np.array([1, 2]), "margin": np.float32(1)}])
