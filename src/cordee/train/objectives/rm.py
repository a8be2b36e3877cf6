"""Reward models (Ouyang et al. 2022): a value head in place of that over the vocabulary, trained on pairs, of which the
chosen answer is to have the higher score (Bradley & Terry 1952).

A score is the value of the last token of an answer. Only differences of scores count, unless a term keeps the sum of
both near 0 (Eisenstein et al. 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from cordee.data.tuning_dataset import Form
from cordee.families.registry import ModelSpec
from cordee.train.preference import Preference, of_pairs, row_scores

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.data.tuning_collate import PreferenceBatch
    from cordee.model.head import Head
    from cordee.parallel.execution import LossParts, Reduce


class RewardModel(Preference):
    stage = "rm"
    form: ClassVar[Form] = "pairs"

    def model(self, spec: ModelSpec, notes: list[str]) -> ModelSpec:
        if spec.config.lm_head:
            notes.append("the head over the vocabulary is left out: a reward model has none")
        if not spec.config.score:
            notes.append("the value head is initialised by --seed")
        return spec.with_heads(score=True, lm_head=False)

    def loss(self, head: Head, hidden: Tensor, batch: PreferenceBatch, reduce: Reduce) -> LossParts:
        import torch.nn.functional as F

        from cordee.data.tuning_collate import paired

        better, worse = paired(reduce(row_scores(head, hidden, batch)))
        losses = -F.logsigmoid(better - worse)
        losses = losses + self.options.rm_center_coefficient * (better + worse).square()
        return of_pairs(losses, {"rewards/chosen": better, "rewards/rejected": worse})


OBJECTIVE = RewardModel()
