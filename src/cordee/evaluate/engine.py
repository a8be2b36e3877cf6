"""Requests answered by a model: in batches, over all copies of it, in the order in which they were asked.

Owns what is computed together and by whom. Pieces of a portion of requests are sorted by length, the longest first, so
that little is padding and a lack of memory shows at once; each copy of the model takes its share of the batches. An
answer depends on its request alone, within rounding. Knows no task."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from cordee.errors import ProblemError
from cordee.evaluate.finished import Finished
from cordee.evaluate.requests import GenerateUntil, Piece, Request, Window
from cordee.evaluate.task import Doc, Subject
from cordee.generate.engine import stream
from cordee.generate.text import continuation
from cordee.model.head import Head
from cordee.parallel import collectives

PORTION = 1 << 24  # tokens that are sorted together: what is kept of them is small beside a model
BEFORE = 8  # tokens of a prompt with which its continuation is decoded: a character has fewer

T = TypeVar("T")
D = TypeVar("D", bound=Doc)


class Engine:
    """Answers requests by the model of `subject`, `batch_size` sequences at a time on each copy.

    finished: results of an earlier evaluation, to which those of this one are added; on all ranks, written by one.
    All processes that share the model or the work ask the same and get the same."""

    def __init__(self, subject: Subject, batch_size: int, finished: Finished | None = None):
        self._subject = subject
        self._batch_size = batch_size
        self._finished = finished or Finished(None)
        self._device = next(subject.model.parameters()).device
        self._layout = layout = None if subject.stage is None else subject.stage.layout
        self._copy, self._copies = (0, 1) if layout is None else (layout.data_rank, layout.data_size)
        known = self._finished.results
        self._known = known if layout is None else collectives.from_first(known, layout)

    def answers(
        self, asked: Iterable[tuple[D, Sequence[Request]]], progress: Callable[[float], None] = lambda share: None
    ) -> Iterator[tuple[D, list[Any]]]:
        """Each document with the answers to its requests, in order; `progress` gets the share of all that is done.

        Documents are taken in portions. ProblemError if the model's outputs are not finite."""
        before = 0.0
        for portion in _portions(asked):
            pieces = {piece.key: piece for _, requests in portion for _, parts in requests for piece in parts}
            results = {key: self._known[key] for key, piece in pieces.items() if piece.is_result(self._known.get(key))}
            missing = [piece for key, piece in pieces.items() if key not in results]
            reached = portion[-1][0].done
            for found, share in self._computed(missing):
                results |= found
                progress(before + (reached - before) * share)
            before = reached
            progress(reached)
            for doc, requests in portion:
                yield doc, [request.answer([results[piece.key] for piece in parts]) for request, parts in requests]

    def _computed(self, pieces: Iterable[Piece]) -> Iterator[tuple[dict[str, Any], float]]:
        """Results by key, each time that every copy has computed a batch, and the share of all that is computed."""
        rounds = list(_groups(_batches(pieces, self._batch_size), self._copies))
        for number, batches in enumerate(rounds, 1):
            own = batches[self._copy] if self._copy < len(batches) else []
            found = self._from_all(dict(zip([piece.key for piece in own], self._compute(own), strict=True)))
            _require_numbers(found.values(), self._subject)
            kept = found if self._subject.speaks else {}  # in the file of one rank, which all ranks wait for
            collectives.together(partial(self._finished.add, kept), self._layout and self._layout.control)
            yield found, number / len(rounds)

    def _from_all(self, own: dict[str, Any]) -> dict[str, Any]:
        if (layout := self._layout) is None:
            return own
        parts = collectives.gather(own if layout.speaks_for_samples else {}, layout)
        return {key: result for part in parts for key, result in part.items()}

    def _compute(self, batch: Sequence[Piece]) -> list[Any]:
        """Results of pieces of one kind; of none, where other copies have more to do."""
        windows = [piece for piece in batch if isinstance(piece, Window)]
        prompts = [piece for piece in batch if isinstance(piece, GenerateUntil)]
        return self._score(windows) if windows else self._write(prompts) if prompts else []

    @torch.inference_mode()
    def _score(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        """Padding is on the right, where causal attention keeps it from what is scored."""
        model, stage = self._subject.model, self._subject.stage
        rows = {window.row: window.inputs for window in windows}
        numbers = {name: number for number, name in enumerate(rows)}
        ids = np.zeros((len(rows), max(map(len, rows.values()))), np.int64)
        for number, inputs in enumerate(rows.values()):
            ids[number, : len(inputs)] = inputs

        def output(head: Head, hidden: Tensor) -> Tensor:
            return torch.stack([_measured(head, hidden[numbers[window.row]], window) for window in windows])

        inputs = torch.from_numpy(ids).to(self._device)
        if stage is None:
            measured = model(inputs, output=output)
        else:
            measured = stage.output(model, inputs, output, like=torch.empty(len(windows), 2, device="meta"))
        return [(logprob, greedy > 0) for logprob, greedy in measured.tolist()]

    def _write(self, requests: Sequence[GenerateUntil]) -> list[str]:
        model, tokenizer, stop = self._subject.model, self._subject.tokenizer, self._subject.stop_ids
        assert tokenizer is not None, "continuations are texts"
        written: list[list[int]] = [[] for _ in requests]

        def text(number: int, tokens: Sequence[int]) -> str:
            return continuation(tokenizer, requests[number].prompt[-BEFORE:], tokens, stop)

        def ended(number: int, tokens: Sequence[int]) -> bool:
            until = requests[number].until
            return bool(until) and any(end in text(number, tokens) for end in until)

        tokens = stream(
            model,
            [request.prompt for request in requests],
            replace(requests[0].options, batch_size=len(requests)),
            stop_ids=stop,
            vocab_size=tokenizer.vocab_size,
            stage=self._subject.stage,
            names=[int(request.key, 16) for request in requests],
            ended=ended,
        )
        for token in tokens:
            written[token.sample].append(token.id)
        return [_cut(text(number, tokens), requests[number].until) for number, tokens in enumerate(written)]


def _portions(
    asked: Iterable[tuple[D, Sequence[Request]]],
) -> Iterator[list[tuple[D, list[tuple[Request, list[Piece]]]]]]:
    """Documents with their requests and the pieces of these, as many as make `PORTION` tokens."""
    portion, size = [], 0
    for doc, requests in asked:
        parts = [(request, list(request.pieces())) for request in requests]
        portion.append((doc, parts))
        size += sum(piece.length for _, pieces in parts for piece in pieces)
        if size >= PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _batches(pieces: Iterable[Piece], size: int) -> Iterator[list[Piece]]:
    """Pieces of `size` rows, the longest first."""
    of_settings: dict[Any, list[Piece]] = {}
    for piece in pieces:
        of_settings.setdefault(piece.settings, []).append(piece)
    for alike in of_settings.values():
        alike.sort(key=lambda piece: (-piece.length, piece.row))
        rows = (list(row) for _, row in groupby(alike, key=lambda piece: piece.row))
        yield from (list(chain.from_iterable(batch)) for batch in _groups(rows, size))


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _measured(head: Head, hidden: Tensor, window: Window) -> Tensor:
    """Log-probability of a window's tokens, and 1 if the model would write them; float32 `[2]` of `[seq, embed]`."""
    hidden = hidden[None, window.first - 1 : window.length]
    labels = torch.from_numpy(window.tokens[window.first :])[None].to(hidden.device)
    logprob = head.token_logprobs(hidden, labels).sum()
    greedy = (head.logits(hidden).argmax(-1) == labels).all() if window.greedy else torch.zeros_like(logprob)
    return torch.stack((logprob, greedy.to(logprob.dtype)))


def _require_numbers(results: Iterable[Any], subject: Subject) -> None:
    if not all(math.isfinite(result[0]) for result in results if not isinstance(result, str)):
        dtype = str(next(subject.model.parameters()).dtype).removeprefix("torch.")
        why = "the model's loss is not finite: its weights are damaged, or too large for this dtype"
        raise ProblemError.of("--dtype", dtype, why, "try --dtype float32", "not finite")


def _cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first that any of `until` begins."""
    return text[: min((place for stop in until if (place := text.find(stop)) >= 0), default=len(text))]
