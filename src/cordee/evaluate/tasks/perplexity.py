"""Perplexity: how well a model predicts texts, token by token.

Owns the sliding window and the sums. Every token of a document but the first is predicted exactly once, from as much
of what comes before it as the window gives; documents do not see each other. Of several processes all read everything,
and each copy of the model takes its share of the windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from cordee.config.schema import EvaluateOptions
from cordee.errors import Problem, ProblemError
from cordee.evaluate.documents import Document, check_path, is_indexed, read_documents
from cordee.evaluate.task import Metrics, Result, Subject
from cordee.log import logger
from cordee.model.config import ModelConfig
from cordee.model.gpt import GPTModel
from cordee.ops.cross_entropy import IGNORED
from cordee.parallel import collectives
from cordee.parallel.inference import Place

SORTED_BATCHES = 16  # windows of so many batches are sorted by length together, so that little is padding

T = TypeVar("T")
Tokens = npt.NDArray[np.int64]
Window = tuple[Tokens, Tokens]  # inputs, and the label at each place


@dataclass
class Score:
    """Sums over documents: `nats` is the total of -log(probability) of `tokens` tokens. `num_bytes` is the length of
    their text, None if it is not known of all. `unscored` counts documents without a token to predict."""

    nats: float = 0.0
    tokens: int = 0
    documents: int = 0
    unscored: int = 0
    num_bytes: int | None = 0

    def count(self, document: Document) -> None:
        self.documents += 1
        self.unscored += len(document.tokens) < 2
        self.num_bytes = _sum_known(self.num_bytes, document.num_bytes)

    def __add__(self, other: Score) -> Score:
        return Score(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.documents + other.documents,
            self.unscored + other.unscored,
            _sum_known(self.num_bytes, other.num_bytes),
        )

    def metrics(self) -> Metrics:
        """loss in nats per token, perplexity = exp(loss), and bits per byte where the text is known."""
        loss = self.nats / self.tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf  # a float holds no more
        metrics: Metrics = {"loss": loss, "perplexity": perplexity, "tokens": self.tokens, "documents": self.documents}
        if self.num_bytes:
            metrics["bits_per_byte"] = self.nats / math.log(2) / self.num_bytes
        return metrics


def _sum_known(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def windows(tokens: Tokens, window: int, stride: int) -> Iterator[Window]:
    """Pieces of at most `window` tokens that begin `stride` apart, with labels at places that were not scored before.

    The label at a place is the token after it. With `stride` equal to `window` the pieces are disjoint.
    """
    assert 0 < stride <= window, f"windows of {window} that move on by {stride} leave tokens out"
    last = len(tokens) - 1
    scored = 0
    for start in range(0, last, stride):
        stop = min(start + window, last)
        labels = tokens[start + 1 : stop + 1].copy()
        labels[: scored - start] = IGNORED
        yield tokens[start:stop], labels
        scored = stop
        if stop == last:
            return


@torch.inference_mode()
def score(
    model: GPTModel,
    documents: Iterable[Document],
    window: int,
    stride: int,
    batch_size: int,
    place: Place | None = None,
) -> Score:
    """The score of `documents` under a model in evaluation mode, `batch_size` windows at a time.

    place: that of `model` among several processes, which all call this alike and get the same.
    """
    total = Score()
    copy, copies = (0, 1) if place is None else (place.layout.data_rank, place.layout.data_size)

    def cut() -> Iterator[Window]:
        for document in documents:
            total.count(document)
            yield from windows(document.tokens, window, stride)

    for group in _groups(cut(), batch_size * copies * SORTED_BATCHES):
        batches = _groups(sorted(group, key=lambda pair: len(pair[0])), batch_size)
        scores = [_score_batch(model, batch, place) for batch in _dealt(batches, copy, copies)]
        nats, tokens = _sum_over(place, math.fsum(nats for nats, _ in scores), sum(tokens for _, tokens in scores))
        total.nats += nats
        total.tokens += tokens
    return total


def _dealt(batches: Iterable[list[Window]], copy: int, copies: int) -> Iterator[list[Window]]:
    """Those of `copy`. They get longer: every other round goes backwards, so that no copy always has the shortest."""
    for number, dealt in enumerate(_groups(batches, copies)):
        own = copies - 1 - copy if number % 2 else copy
        if own < len(dealt):
            yield dealt[own]


def _sum_over(place: Place | None, nats: float, tokens: int) -> tuple[float, int]:
    """The sums of all copies. They meet for every group, lest one waits for the others' whole evaluation at the end."""
    if place is None:
        return nats, tokens
    counted = (nats, tokens) if place.layout.speaks_for_samples else (0.0, 0)
    nats_of, tokens_of = zip(*collectives.gather(counted, place.layout), strict=True)
    return math.fsum(nats_of), sum(tokens_of)


def _score_batch(model: GPTModel, batch: list[Window], place: Place | None) -> tuple[float, int]:
    """Padding is on the right, where causal attention keeps it from what is scored."""
    longest = max(len(inputs) for inputs, _ in batch)
    ids = np.zeros((len(batch), longest), np.int64)
    labels = np.full((len(batch), longest), IGNORED, np.int64)
    for row, (inputs, targets) in enumerate(batch):
        ids[row, : len(inputs)], labels[row, : len(inputs)] = inputs, targets
    device = next(model.parameters()).device
    inputs, targets = torch.from_numpy(ids).to(device), torch.from_numpy(labels).to(device)
    if place is None:
        nats = model(inputs, output=lambda head, hidden: head.loss(hidden, targets)[0])
    else:
        nats = place.loss(model, inputs, targets)
    return nats.item(), int((labels != IGNORED).sum())


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


class Perplexity:
    """The task: text files and prefixes of `.bin/.idx`, each a part of the result."""

    name = "perplexity"

    def check(self, options: EvaluateOptions, model: ModelConfig) -> list[Problem]:
        of_paths = [problem for path in options.task_data_path for problem in check_path(path)]
        return [*_window_problems(options, model.max_position_embeddings), *of_paths]

    def needs_tokenizer(self, options: EvaluateOptions) -> bool:
        return not all(is_indexed(path) for path in options.task_data_path)

    def run(self, subject: Subject, options: EvaluateOptions, progress: Callable[[float], None]) -> Result:
        window = options.seq_length or subject.model.config.max_position_embeddings
        stride = options.stride or window
        paths = options.task_data_path
        total, parts = Score(), {}
        for number, path in enumerate(paths):
            documents = read_documents(path, subject.tokenizer, options, subject.model.config.vocab_size)
            followed = _followed(documents, lambda done, before=number: progress((before + done) / len(paths)))
            first = islice(followed, options.max_eval_samples)
            part = score(subject.model, first, window, stride, options.evaluation_batch_size, subject.place)
            _check_score(part, path)
            total, parts[path] = total + part, part.metrics()
        progress(1.0)
        return Result(self.name, total.metrics(), parts)


def _followed(documents: Iterable[Document], progress: Callable[[float], None]) -> Iterator[Document]:
    for document in documents:
        yield document
        progress(document.done)


def _check_score(score: Score, path: str) -> None:
    if score.unscored:
        logger.warning("%s: %d documents without a token to predict", path, score.unscored)
    if not score.tokens:
        why, fix = "it holds no token to predict", "give text, or tokens, of some length"
        raise ProblemError([Problem("--task-data-path", path, why, fix)])
    if not math.isfinite(score.nats):
        why = "the model's loss on it is not finite: its weights are damaged, or too large for this dtype"
        raise ProblemError([Problem("--task-data-path", path, why, "try --dtype float32")])


def _window_problems(options: EvaluateOptions, longest: int) -> Iterator[Problem]:
    window = options.seq_length or longest
    if window > longest:
        why = f"the model holds at most {longest} tokens"
        yield Problem("--seq-length", window, why, f"give at most {longest}")
    elif options.stride is not None and options.stride > window:
        why = f"tokens between windows of {window} would not be scored"
        yield Problem("--stride", options.stride, why, f"give at most {window}")


TASK = Perplexity()
