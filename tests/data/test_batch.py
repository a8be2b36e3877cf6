from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cordee.data.batch import Batch
from cordee.data.gpt_collate import GPTCollate
from cordee.errors import ProblemError
from tests.data import peer

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


@pytest.mark.parametrize(("token", "said"), [(7, "token 7"), (-1, "token -1")])
def test_a_token_outside_the_vocabulary_is_refused(token, said):
    with pytest.raises(ProblemError, match=f"{said}, but the vocabulary has only tokens 0 to 6"):
        GPTCollate(vocab_size=7)([{"tokens": np.array([1, last, 0])} for last in (6, token)])


def test_to_moves_every_tensor():
    batch = Batch(torch.zeros(1, 2), torch.zeros(1, 2), segments=torch.zeros(1, 2)).to("meta")
    assert batch.position_ids is None
    assert all(t.device.type == "meta" for t in (batch.input_ids, batch.labels, batch.segments))
