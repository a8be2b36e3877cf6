"""An objective of pairs, for tests: of two sequences the first is to become the likelier one.

Everything that next-token training has none of: several sequences a sample, of different lengths, a weight of each
pair, a loss that is not linear in what a sequence's tokens add up to, and a reference model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cordee import sealed
from cordee.config.option import option
from cordee.data.batch import IGNORED, Batch, axes
from cordee.errors import Findings
from cordee.train.objectives import FurtherModel, Objective, Run
from cordee.train.options import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Pairs."""

    num_pairs: int = option(64, "pairs that there are", above=0)


@dataclass(frozen=True, kw_only=True)
class PairConfig(TrainConfig, PairOptions):
    """A run on pairs."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PairBatch(Batch):
    """Chosen and rejected sequences in turns. `pair_weight` float32 [samples]; `reference` float32 [batch, seq] are
    the log-probabilities of the labels by the reference model."""

    pair_weight: Tensor = axes("sample")
    reference: Tensor | None = axes("sequence", "token", default=None)


class Pairs:
    """Pair i, the same wherever it is asked for: a prompt of some tokens, and two answers of different lengths."""

    def __init__(self, config: PairConfig, vocab_size: int):
        self.config = config
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.config.num_pairs

    def __getitem__(self, index: int) -> dict[str, Any]:
        random = np.random.default_rng((self.config.seed, index))
        length = self.config.seq_length
        prompt = int(random.integers(1, length // 2))
        tokens = random.integers(0, self.vocab_size, (2, length + 1))
        labels = tokens[:, 1:].copy()
        labels[:, : prompt - 1] = IGNORED
        for row in labels:
            row[int(random.integers(prompt, length)) :] = IGNORED
        longest = int((labels != IGNORED).any(0).nonzero()[0].max()) + 1
        return {
            "input_ids": tokens[:, :longest],
            "labels": labels[:, :longest],
            "pair_weight": np.float32(random.uniform(0.1, 2.0)),
        }


@dataclass(frozen=True)
class PairData:
    config: PairConfig
    vocab_size: int

    @property
    def identity(self) -> dict[str, Any]:
        return {"pairs": self.config.num_pairs, "seed": self.config.seed}

    def resumed(self, then: Mapping[str, Any], found: Findings) -> PairData:
        assert then == self.identity
        return self

    def open(self, *, verified: bool) -> dict[str, Pairs]:
        pairs = Pairs(self.config, self.vocab_size)
        return {"train": pairs, "validation": pairs} if self.config.eval_iters else {"train": pairs}

    def collate(self):
        return lambda samples: PairBatch.of(samples, self.config.seq_length)


class Preference(Objective[PairBatch]):
    stage = "pairs"
    loss_name = "pair loss"
    reduces = True

    def identity_form(self) -> sealed.Form:
        return sealed.record({"pairs": sealed.count(1), "seed": sealed.count()})

    def data(self, run: Run, found: Findings) -> PairData:
        assert isinstance(run.config, PairConfig) and run.vocab_size is not None
        return PairData(run.config, run.vocab_size)

    def models(self, run: Run) -> dict[str, FurtherModel]:
        assert run.spec is not None
        return {"reference": FurtherModel(spec=run.spec)}

    def prepare(self, batches, models):
        found = models["reference"].forward(batches, lambda head, x, batch: head.token_logprobs(x, batch.labels))
        return [replace(batch, reference=logprobs) for batch, logprobs in zip(batches, found, strict=True)]

    def weight(self, batch: PairBatch) -> float:
        return float(batch.pair_weight.double().sum())

    def loss(self, head, hidden, batch: PairBatch, reduce):
        gained = reduce((head.token_logprobs(hidden, batch.labels) - batch.reference).sum(1))
        chosen, rejected = gained.unflatten(0, (-1, 2)).unbind(1)
        margin = 0.5 * (chosen - rejected)
        right = ((margin > 0) * batch.pair_weight).sum().detach()
        return (-F.logsigmoid(margin) * batch.pair_weight).sum(), {"right": right}


def plain_loss(model: torch.nn.Module, reference: torch.nn.Module, samples: list[dict[str, Any]]) -> Tensor:
    """The mean loss of pairs, one unpadded sequence at a time, from whole logits."""

    def gained(ids: np.ndarray, labels: np.ndarray) -> Tensor:
        inputs = torch.from_numpy(ids)[None]
        counted = [place for place, label in enumerate(labels) if label != IGNORED]
        logits, anchor = model(inputs)[0], reference(inputs)[0].detach()
        terms = [logits[n].log_softmax(-1)[labels[n]] - anchor[n].log_softmax(-1)[labels[n]] for n in counted]
        return torch.stack(terms).sum()

    total, weight = torch.zeros(()), 0.0
    for sample in samples:
        (chosen, rejected), (first, second) = sample["input_ids"], sample["labels"]
        margin = 0.5 * (gained(chosen, first) - gained(rejected, second))
        total = total + torch.log1p(torch.exp(-margin)) * float(sample["pair_weight"])
        weight += float(sample["pair_weight"])
    return total / weight
