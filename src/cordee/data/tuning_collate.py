"""Samples of tuning to micro-batches.

Owns padding, and what segments and positions the samples of a row have. Knows nothing of where samples come from.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cordee.data.batch import Batch, Sample
from cordee.data.gpt_collate import check_tokens
from cordee.data.messages import IGNORED


@dataclass(frozen=True, kw_only=True)
class TuningCollate:
    """Samples to a batch of `seq_length` tokens, or with `multiple` of as many as the longest has, rounded up to it.

    Samples that are numbered in their attention mask do not see each other, and the first token of each is no target.
    Otherwise `reset_position_ids` and `reset_attention_mask` act behind every `eod`, as in Megatron. Raises
    `ProblemError` for a token that `vocab_size` does not hold.
    """

    seq_length: int
    multiple: int | None
    vocab_size: int | None
    eod: int | None
    reset_position_ids: bool
    reset_attention_mask: bool

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        length = self.seq_length
        if self.multiple is not None:
            length = math.ceil(max(len(sample["labels"]) for sample in samples) / self.multiple) * self.multiple
        numbered = any((sample["attention_mask"] != 1).any() for sample in samples)
        segmented, positioned = (numbered or flag for flag in (self.reset_attention_mask, self.reset_position_ids))
        found = [self._fields(sample, numbered, segmented, positioned) for sample in samples]
        if all(len(sample["labels"]) == length and (sample["attention_mask"] != 0).all() for sample in samples):
            for fields in found:
                del fields["counted"]  # there is no padding
        return Batch.of(found, length)

    def _fields(self, sample: Sample, numbered: bool, segmented: bool, positioned: bool) -> dict[str, npt.NDArray[Any]]:
        ids, mask = sample["input_ids"], sample["attention_mask"]
        if self.vocab_size is not None:
            check_tokens(ids, self.vocab_size)
        starts = np.zeros(len(ids), bool)
        if numbered:
            starts[1:] = mask[1:] != mask[:-1]
        elif self.eod is not None:
            starts[1:] = ids[:-1] == self.eod
        labels = np.full_like(ids, IGNORED)
        labels[:-1] = np.where(starts[1:] & numbered, IGNORED, sample["labels"][1:])
        fields = {"input_ids": ids, "labels": labels, "counted": mask != 0}
        if positioned:
            steps = np.arange(len(ids))
            fields["position_ids"] = steps - np.maximum.accumulate(np.where(starts, steps, 0))
        if segmented:
            fields["segments"] = np.where(mask == 0, -1, np.cumsum(starts))
        return {name: value[None] for name, value in fields.items()}
