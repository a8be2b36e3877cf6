"""Samples of tuning to micro-batches.

Owns padding, what segments and positions the samples of a row have, the fields that preferences add to a batch, and
which of its rows belong together. Knows nothing of where samples come from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cordee.data.batch import Batch, Sample, axes
from cordee.data.gpt_collate import check_tokens
from cordee.data.messages import IGNORED
from cordee.data.tuning import DESIRABLE, FIELDS, SIDES
from cordee.data.tuning_dataset import MISMATCHED


@dataclass(frozen=True, eq=False, kw_only=True)
class ScoredBatch(Batch):
    """`last` bool [batch, seq] is True at the one token of every row whose value is the score of the row."""

    last: Tensor = axes("sequence", "token")


@dataclass(frozen=True, eq=False, kw_only=True)
class PreferenceBatch(ScoredBatch):
    """Rows are chosen and rejected answers by turns, or of KTO answers and mismatched ones.

    `reference` float32 [batch, seq] adds up, over the tokens of a row, to the log-probability of its answer by the
    reference model, 0 without one."""

    reference: Tensor = axes("sequence", "token")


@dataclass(frozen=True, eq=False, kw_only=True)
class KTOBatch(PreferenceBatch):
    """Of samples, float32 [samples]: `desirable` is 1 or 0, `kl` the divergence of the policy from the reference, the
    same for all of a step, and `factor` that by which a sample counts in a mean over those of its kind."""

    desirable: Tensor = axes("sample")
    kl: Tensor = axes("sample")
    factor: Tensor = axes("sample")


@dataclass(frozen=True, eq=False, kw_only=True)
class RolloutBatch(PreferenceBatch):
    """Rows are prompts and what the policy has written to them, which has the labels.

    Of tokens, float32 [batch, seq]: `advantages`; and, where they are of use, log-probabilities `old` by the policy
    that wrote them, the `values` that it gave them, and `returns`. Of samples: `rewards` [samples, 1 + rewards], the
    sum of weighted ones first, [samples] `share`, by which the loss of a token counts, `lengths` and `truncated`."""

    advantages: Tensor = axes("sequence", "token")
    old: Tensor | None = axes("sequence", "token", default=None)
    values: Tensor | None = axes("sequence", "token", default=None)
    returns: Tensor | None = axes("sequence", "token", default=None)
    rewards: Tensor = axes("sample", "reward")
    share: Tensor = axes("sample")
    lengths: Tensor = axes("sample")
    truncated: Tensor = axes("sample")


def last_tokens(labels: Tensor, counted: Tensor | None = None) -> Tensor:
    """Where the last token of each answer stands, bool [batch, seq]: behind the last label, for labels name the token
    after them; in a row that has none, which was cut down to its prompt, the last one that is no padding.

    labels, counted: as of a `Batch` of whole sequences, in which a label names a token of the row."""
    places = torch.arange(labels.shape[1], device=labels.device)
    ends = torch.where(labels != IGNORED, places + 1, 0).amax(1)
    real = labels.new_ones(labels.shape) if counted is None else counted
    return places == torch.where(ends > 0, ends, (places * real).amax(1))[:, None]


def paired(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the second row of every sample: `[2 * samples, ...]` to twice `[samples, ...]`."""
    return rows[::2], rows[1::2]


@dataclass(frozen=True, kw_only=True)
class TuningCollate:
    """Samples to a batch of `seq_length` tokens, or with `multiple` of as many as the longest has, rounded up to it.

    Samples that are numbered in their attention mask do not see each other, and the first token of each is no target.
    Otherwise `reset_position_ids` and `reset_attention_mask` act behind every `eod`, as in Megatron. Raises
    `ProblemError` for a token that `vocab_size` does not hold. Sides of a sample become rows, one after the other."""

    seq_length: int
    multiple: int | None
    vocab_size: int | None
    eod: int | None
    reset_position_ids: bool
    reset_attention_mask: bool

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        sides = [side for side in (*SIDES, "", MISMATCHED) if f"{side}labels" in samples[0]]
        batch = self._rows([{name: sample[side + name] for name in FIELDS} for sample in samples for side in sides])
        if len(sides) == 1:
            return batch
        reference = torch.zeros(batch.input_ids.shape)
        if "reference" in samples[0]:  # the sum stands at the first token
            reference[:, 0] = torch.from_numpy(np.concatenate([sample["reference"] for sample in samples]))
        fields = {**vars(batch), "reference": reference, "last": last_tokens(batch.labels, batch.counted)}
        if MISMATCHED not in sides:
            return PreferenceBatch(**fields)
        flags = torch.tensor([float(sample[DESIRABLE][0]) for sample in samples])
        return KTOBatch(**fields, desirable=flags, kl=0 * flags, factor=0 * flags)

    def _rows(self, samples: Sequence[Sample]) -> Batch:
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
