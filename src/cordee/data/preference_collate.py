"""Samples of preferences to micro-batches: a sample has two sequences, one after the other.

Owns the fields that preferences add to a batch, and which rows belong together. Padding is `tuning_collate.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cordee.data.batch import Batch, Sample, axes
from cordee.data.tuning import DESIRABLE, FIELDS, SIDES
from cordee.data.tuning_collate import TuningCollate
from cordee.data.tuning_dataset import MISMATCHED


@dataclass(frozen=True, eq=False, kw_only=True)
class PreferenceBatch(Batch):
    """Rows are chosen and rejected answers by turns, or of KTO answers and mismatched ones.

    `reference` float32 [batch, seq] adds up, over the tokens of a row, to the log-probability of its answer by the
    reference model. Of KTO, float32 [samples]: `desirable` is 1 or 0, `baseline` the divergence from the reference
    that rewards are held against, and `factor` that by which a sample counts in a mean over those of its kind.
    """

    reference: Tensor | None = axes("sequence", "token", default=None)
    desirable: Tensor | None = axes("sample", default=None)
    baseline: Tensor | None = axes("sample", default=None)
    factor: Tensor | None = axes("sample", default=None)


def paired(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second row of every sample: `[2 * samples, ...]` to twice `[samples, ...]`."""
    first, second = rows.unflatten(0, (-1, 2)).unbind(1)
    return first, second


@dataclass(frozen=True, kw_only=True)
class PreferenceCollate:
    """Samples to a batch, whose rows `rows` makes."""

    rows: TuningCollate

    def __call__(self, samples: Sequence[Sample]) -> PreferenceBatch:
        sides = ("", MISMATCHED) if DESIRABLE in samples[0] else SIDES
        rows = [{name: sample[side + name] for name in FIELDS} for sample in samples for side in sides]
        batch = PreferenceBatch(**vars(self.rows(rows)))
        found = dict(vars(batch))
        if "reference" in samples[0]:  # the sum stands at the first token
            found["reference"] = torch.zeros(batch.input_ids.shape)
            found["reference"][:, 0] = torch.from_numpy(np.concatenate([sample["reference"] for sample in samples]))
        if DESIRABLE in samples[0]:
            found[DESIRABLE] = torch.tensor([float(sample[DESIRABLE][0]) for sample in samples])
        return PreferenceBatch(**found)
