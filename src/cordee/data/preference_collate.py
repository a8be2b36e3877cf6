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
    reference model, 0 without one.
    """

    reference: Tensor = axes("sequence", "token")


@dataclass(frozen=True, eq=False, kw_only=True)
class KTOBatch(PreferenceBatch):
    """Of samples, float32 [samples]: `desirable` is 1 or 0, `kl` the divergence of the policy from the reference, the
    same for all of a step, and `factor` that by which a sample counts in a mean over those of its kind."""

    desirable: Tensor = axes("sample")
    kl: Tensor = axes("sample")
    factor: Tensor = axes("sample")


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
        batch = self.rows(rows)
        reference = torch.zeros(batch.input_ids.shape)
        if "reference" in samples[0]:  # the sum stands at the first token
            reference[:, 0] = torch.from_numpy(np.concatenate([sample["reference"] for sample in samples]))
        if DESIRABLE not in samples[0]:
            return PreferenceBatch(**vars(batch), reference=reference)
        flags = torch.tensor([float(sample[DESIRABLE][0]) for sample in samples])
        return KTOBatch(**vars(batch), reference=reference, desirable=flags, kl=0 * flags, factor=0 * flags)
