"""From tokens to the logits of the next one, step after step.

Owns how a model is driven over a batch of growing sequences: with a cache, each token goes through the model once;
without, every step runs over everything. Both give the same logits. Knows nothing of how tokens are chosen, when a
sequence ends, or text."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from cordee.model.bound import Unsupported
from cordee.model.cache import KVCache
from cordee.model.gpt import GPTModel
from cordee.parallel.inference import InferenceStage, last_logits


class Decoder(Protocol):
    """A batch of sequences that grow by one token a step."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Take the prompts, none of them empty; logits `[batch, vocab]` of what follows each."""
        ...

    def extend(self, tokens: Tensor) -> Tensor:
        """Add one token to each sequence, int64 `[batch]`; logits `[batch, vocab]` of what follows."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Continue these sequences only, int64 `[any]` in the order given; one may be taken several times."""
        ...


class CachedDecoder:
    """Keeps keys and values: a step costs one token's arithmetic. Sequences hold at most `max_length` tokens."""

    def __init__(self, model: GPTModel, max_length: int, stage: InferenceStage | None = None):
        self._model = model
        self._stage = stage
        self._run = _run_of(model, stage)
        self._max_length = max_length
        self._cache: KVCache | None = None

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        parameter = next(self._model.parameters())
        self._cache = KVCache(
            self._model.config,
            len(prompts),
            self._max_length,
            parameter.dtype,
            parameter.device,
            spans=self._model.spans,
            tensor_ranks=1 if self._stage is None else self._stage.tensor_ranks,
        )
        return self._run(*padded(prompts, parameter.device), cache=self._cache)

    def extend(self, tokens: Tensor) -> Tensor:
        return self._run(tokens[:, None], cache=self._cache)

    def keep(self, rows: Tensor) -> None:
        assert self._cache is not None, "keep before begin"
        self._cache.keep(rows)


class FusedDecoder(CachedDecoder):
    """As `CachedDecoder`, by the fused decode path of a model that has one; the model must not change meanwhile."""

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits = super().begin(prompts)
        self._step = self._model.bind(len(prompts), self._max_length)
        return logits

    def extend(self, tokens: Tensor) -> Tensor:
        assert self._cache is not None, "extend before begin"
        return self._step(tokens, self._cache)


def unsupported_reason(model: GPTModel) -> str | None:
    """Why a model has no fused decode path; None if it has one."""
    try:
        model.bind(rows=1, max_length=1)
    except Unsupported as why:
        return str(why)
    return None


class PlainDecoder:
    """Runs over the whole sequences in every step: the reference of `CachedDecoder`."""

    def __init__(self, model: GPTModel, stage: InferenceStage | None = None):
        self._device = next(model.parameters()).device
        self._run = _run_of(model, stage)

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self._ids, self._mask = padded(prompts, self._device)
        return self._run(self._ids, self._mask)

    def extend(self, tokens: Tensor) -> Tensor:
        self._ids = torch.cat((self._ids, tokens[:, None]), 1)
        if self._mask is not None:
            self._mask = torch.cat((self._mask, torch.ones_like(tokens[:, None])), 1)
        return self._run(self._ids, self._mask)

    def keep(self, rows: Tensor) -> None:
        self._ids = self._ids[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]


def _run_of(model: GPTModel, stage: InferenceStage | None) -> Callable[..., Tensor]:
    """The model from ids to the logits of the last position, alone or over the ranks of `stage`."""
    return partial(model, output=last_logits) if stage is None else partial(stage.run, model)


def padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts filled up on the left, so that all end together: ids and mask (1 = real), both int64 `[batch, longest]`.

    The mask is None where there is nothing to fill up."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    if all(len(p) == longest for p in prompts):
        return ids, None
    return ids, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
