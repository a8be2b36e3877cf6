"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024): answers that are desirable or not, each on its own.

A reward, beta times what the log-probability of an answer has gained over the reference model's, is held against how
far the policy is from the reference at all: the mean gain of mismatched answers, those to another prompt, over all
samples of a step, at least 0 and without gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from cordee.data.tuning_dataset import Form, MismatchedDataset, TuningDataset
from cordee.train.objectives import POLICY
from cordee.train.objectives.sft import TuningData
from cordee.train.preference import Preference

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.data.tuning_collate import KTOBatch
    from cordee.model.head import Head
    from cordee.parallel.execution import Frozen, LossParts, Reduce


class KTOData(TuningData):
    sequences: ClassVar[type[TuningDataset] | None] = MismatchedDataset


class KTO(Preference):
    stage = "kto"
    plan = KTOData
    form: ClassVar[Form] = "kto"
    refers = True

    def prepare(self, batches: list[Any], models: Mapping[str, Frozen]) -> list[Any]:
        import torch

        from cordee.parallel import collectives

        batches, policy = super().prepare(batches, models), models[POLICY]
        rows = [torch.arange(len(batch.input_ids)) for batch in batches]
        own, other = ([x.at("sequence", i[side::2]) for x, i in zip(batches, rows, strict=True)] for side in (0, 1))
        layout, flags = policy.layout, torch.cat([batch.desirable for batch in own])
        gains = [float(gain) for gain in policy.forward(other, self._gain) if gain is not None]
        counts = [len(flags), float(flags.sum())] if layout.speaks_for_samples else [0, 0]
        gain, count, desirable = collectives.sum_numbers([sum(gains) / layout.degrees.tp, *counts], layout)
        factors = torch.tensor([count / max(count - desirable, 1), count / max(desirable, 1)])
        more = ((batch.desirable.long(), torch.full_like(batch.desirable, max(0.0, gain / count))) for batch in own)
        return [replace(batch, kl=kl, factor=factors[flag]) for batch, (flag, kl) in zip(own, more, strict=True)]

    def loss(self, head: Head, hidden: Tensor, batch: KTOBatch, reduce: Reduce) -> LossParts:
        import torch

        answers, options, is_desirable = self.answers(head, hidden, batch, reduce), self.options, batch.desirable > 0
        rewards, sign = options.kto_beta * answers.gained, torch.where(is_desirable, 1.0, -1.0)
        weights = torch.where(is_desirable, options.kto_desirable_weight, options.kto_undesirable_weight)
        losses = weights * (1 - torch.sigmoid(sign * (rewards - options.kto_beta * batch.kl)))
        metrics = {"kl": batch.kl, "rewards/margins": sign * rewards * batch.factor}
        for name, which in (("chosen", is_desirable), ("rejected", ~is_desirable)):
            share = batch.factor * which
            metrics |= {f"rewards/{name}": rewards * share, f"logps/{name}": answers.logps * share}
        return losses.sum(), {name: values.detach().sum() for name, values in metrics.items()}

    def _gain(self, head: Head, hidden: Tensor, batch: Any) -> Tensor:
        """By how much the log-probability of all answers is above that by the reference model."""
        return (self.token_logps(head, hidden, batch) - batch.reference).double().sum()


OBJECTIVE = KTO()
