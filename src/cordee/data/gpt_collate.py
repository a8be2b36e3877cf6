"""Samples of consecutive tokens to micro-batches for next-token training.

Owns what an end-of-document token does to targets, positions and attention. Knows nothing of where samples come from.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cordee.data.batch import Batch, Sample
from cordee.data.messages import IGNORED
from cordee.errors import ProblemError


@dataclass(frozen=True)
class GPTCollate:
    """Samples of `seq + 1` "tokens" to a batch that predicts each next one; what an end-of-document token `eod` does is
    as in Megatron.

    `eod_mask_loss`: the token after an eod is no target. `reset_position_ids`: positions begin anew after an eod.
    `reset_attention_mask`: what follows an eod does not see it, nor anything before it.
    Raises `ProblemError` for a token that `vocab_size` does not hold."""

    vocab_size: int | None = None
    eod: int | None = None
    eod_mask_loss: bool = False
    reset_position_ids: bool = False
    reset_attention_mask: bool = False

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        assert all(sample.keys() == {"tokens"} for sample in samples), "a sample of text is tokens and nothing else"
        tokens = np.stack([sample["tokens"] for sample in samples])  # [batch, seq + 1]
        if self.vocab_size is not None:
            check_tokens(tokens, self.vocab_size)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if not (self.eod_mask_loss or self.reset_position_ids or self.reset_attention_mask):
            return Batch(_tensor(inputs), _tensor(labels))
        assert self.eod is not None, "resets at the end of a document need the token that ends one"
        ends = inputs == self.eod
        begins = np.zeros_like(ends)
        begins[:, 1:] = ends[:, :-1]
        positions = segments = None
        if self.reset_position_ids:
            steps = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
            positions = _tensor(steps - np.maximum.accumulate(np.where(begins, steps, 0), axis=1))
        if self.reset_attention_mask:
            segments = _tensor(np.cumsum(begins, axis=1, dtype=np.int64))
        if self.eod_mask_loss:
            labels = np.where(ends, IGNORED, labels)
        return Batch(_tensor(inputs), _tensor(labels), positions, segments)


def _tensor(array: npt.NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def check_tokens(tokens: npt.NDArray[np.int64], vocab_size: int) -> None:
    """Raises `ProblemError` for a token that is none of so many."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        token = lowest if lowest < 0 else highest
        why = f"the data holds token {token}, but the vocabulary has only tokens 0 to {vocab_size - 1}"
        fix = "take the tokenizer that the data was made with, or preprocess again"
        raise ProblemError.of("--vocab-size", vocab_size, why, fix, "range", limit=token)
