"""From hidden states to vocabulary: logits when asked for, the loss without them; and to values of positions.

Owns both heads, of which a reward model has the value head alone."""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from cordee.model.config import ModelConfig
from cordee.model.low_rank import Projection
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import Placement, View, unchanged
from cordee.model.specs import score, table
from cordee.ops.cross_entropy import IGNORED, VocabularyPart, adjusted, chunked_cross_entropy
from cordee.ops.gemm import linear


@dataclass(eq=False, kw_only=True)
class HeadPlacement(Placement):
    """`enter` as of a block; `vocabulary` is the part of the vocabulary whose rows are here, None: all."""

    enter: View = unchanged
    vocabulary: VocabularyPart | None = None


class Head(Projection[HeadPlacement]):
    """Rows of `weight` `[vocab, embed]` score the tokens. A tied head is given the embedding's parameter.

    What the config asks for beyond products, scale, softcap and rows of length one, is part of both logits and loss.
    A reward model has no such rows, and asking for either is an AssertionError. `values`: the model's value head."""

    def __init__(self, config: ModelConfig, values: View | None = None, **factory):
        specs = table(config, "vocab", config.vocab_size) if config.lm_head else {}
        super().__init__(HeadPlacement(), specs, **factory)
        self._values = values  # no part of this module: its parameter has a name of its own
        self.scale = config.logit_scale
        self.softcap = config.logit_softcap
        self.normalised = config.norm_head

    def logits(self, hidden: Tensor) -> Tensor:
        """`[batch, seq, embed]` to `[batch, seq, vocab]`."""
        logits = adjusted(linear(self.placement.enter(hidden), self._rows()), self.scale, self.softcap)
        part = self.placement.vocabulary
        return logits if part is None else part.join(logits)

    def scores(self, hidden: Tensor) -> Tensor:
        """The value of every position, float32 `[batch, seq]`, of hidden states `[batch, seq, embed]`. AssertionError
        for a model without a value head."""
        assert self._values is not None, "the model has no value head"
        return self._values(hidden)

    def loss(self, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the cross entropy over tokens and how many tokens that is (float32 and int64 scalars).

        hidden `[batch, seq, embed]`; labels int64 `[batch, seq]`: the token that follows each position, -100 where none
        counts. The logits of the whole batch never exist together."""
        return self._cross_entropy(hidden, labels, "sum"), (labels != IGNORED).sum()

    def token_logprobs(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """log softmax(logits)[label] of every token, float32 `[batch, seq]`, 0 where the label is -100.

        hidden and labels as of `loss`; differentiable once. The logits of the whole batch never exist together."""
        return -self._cross_entropy(hidden, labels, "none").view_as(labels)

    def _cross_entropy(self, hidden: Tensor, labels: Tensor, reduction: Literal["sum", "none"]) -> Tensor:
        hidden, labels = self.placement.enter(hidden).flatten(0, 1), labels.flatten()
        rows = _rows_that_count(labels)
        found = chunked_cross_entropy(
            hidden[rows],
            self._rows(),
            labels[rows],
            reduction=reduction,
            scale=self.scale,
            softcap=self.softcap,
            part=self.placement.vocabulary,
        )
        if reduction == "sum" or isinstance(rows, slice):
            return found
        return found.new_zeros(labels.shape).index_put((rows,), found)

    def _rows(self) -> Tensor:
        weight = self.local("weight")
        assert weight is not None, "the model has no head over the vocabulary"
        return self.merged(F.normalize(weight, dim=-1) if self.normalised else weight)


def _rows_that_count(labels: Tensor) -> Tensor | slice:
    """The places of labels that count, or all where they have no choice or an accelerator would be waited for."""
    rows = (labels != IGNORED).nonzero()[:, 0] if labels.device.type == "cpu" else labels
    return rows if 0 < len(rows) < len(labels) else slice(None)


@dataclass(eq=False, kw_only=True)
class ValuePlacement(Placement):
    """`exit` of the values `[batch, seq]`."""

    exit: View = unchanged


class ValueHead(SpecifiedModule[ValuePlacement]):
    """The product of every hidden state with `weight` `[1, embed]`, in float32.

    Outside of the blocks that tensor parallelism shards: ranks compute the same, or of their own tokens."""

    def __init__(self, config: ModelConfig, **factory):
        super().__init__(ValuePlacement())
        self.declare(score(config), "weight", **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, seq, embed]` to float32 `[batch, seq]`."""
        return self.placement.exit(linear(hidden.float(), self.local("weight").float())[..., 0])
