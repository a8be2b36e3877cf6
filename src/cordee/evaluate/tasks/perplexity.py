"""Perplexity: how well a model predicts texts, token by token.

Owns the sums. Every token of a document but the first is predicted exactly once, from as much of what comes before it
as the window gives; documents do not see each other."""

import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import chain, islice

from cordee.errors import Problem, Problems, at_most, raise_all
from cordee.evaluate.documents import Document, check_path, is_indexed, read_documents
from cordee.evaluate.options import EvaluateOptions
from cordee.evaluate.requests import Encoder, RollingLoglikelihood
from cordee.evaluate.task import Metrics, Result, Subject
from cordee.log import counted, logger
from cordee.model.config import ModelConfig


@dataclass(frozen=True)
class Score:
    """Sums over documents: `nats` is the total of -log(probability) of `tokens` tokens. `num_bytes` is the length of
    their text, None if it is not known of all. `unscored` counts documents without a token to predict."""

    nats: float = 0.0
    tokens: int = 0
    documents: int = 0
    unscored: int = 0
    num_bytes: int | None = 0

    @classmethod
    def of(cls, document: Document, logprob: float) -> "Score":
        length = len(document.tokens)
        return cls(-logprob, max(0, length - 1), 1, int(length < 2), document.num_bytes)

    def __add__(self, other: "Score") -> "Score":
        *ours, num_bytes = astuple(self)
        *theirs, more = astuple(other)
        known = None if num_bytes is None or more is None else num_bytes + more
        nats, tokens, documents, unscored = map(operator.add, ours, theirs)
        return Score(nats, tokens, documents, unscored, known)

    def metrics(self) -> Metrics:
        """loss in nats per token, perplexity = exp(loss), and bits per byte where the text is known."""
        loss = self.nats / self.tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf  # a float holds no more
        metrics: Metrics = {"loss": loss, "perplexity": perplexity, "tokens": self.tokens, "documents": self.documents}
        if self.num_bytes:
            metrics["bits_per_byte"] = self.nats / math.log(2) / self.num_bytes
        return metrics


class Perplexity:
    """The task: text files and prefixes of `.bin/.idx`, each a part of the result."""

    name = "perplexity"

    def check(self, options: EvaluateOptions, model: ModelConfig | None) -> list[Problem]:
        of_paths = [problem for path in options.task_data_path for problem in check_path(path, options)]
        return [*(_window_problems(options, model.context_length) if model else ()), *of_paths]

    def needs_tokenizer(self, options: EvaluateOptions) -> bool:
        return not all(is_indexed(path) for path in options.task_data_path)

    def docs(self, subject: Subject, options: EvaluateOptions) -> Iterator[Document]:
        paths = options.task_data_path
        for number, path in enumerate(paths):
            documents = read_documents(path, subject.tokenizer, options, subject.model.config.vocab_size)
            for document in islice(documents, options.max_eval_samples):
                yield replace(document, part=number, done=(number + document.done) / len(paths))

    def requests(self, doc: Document, encoder: Encoder, options: EvaluateOptions) -> list[RollingLoglikelihood]:
        return [RollingLoglikelihood(doc.tokens, encoder.window, options.stride or encoder.window)]

    def score(self, answered: Iterable[tuple[Document, Sequence[float]]], options: EvaluateOptions) -> Result:
        scores = [Score() for _ in options.task_data_path]
        for document, (logprob,) in answered:
            scores[document.part] += Score.of(document, logprob)
        raise_all(chain.from_iterable(map(_score_problems, scores, options.task_data_path)))
        parts = {path: score.metrics() for path, score in zip(options.task_data_path, scores, strict=True)}
        return Result(self.name, sum(scores, Score()).metrics(), parts)


def _score_problems(score: Score, path: str) -> Problems:
    if score.unscored:
        logger.warning("%s: %s without a token to predict", path, counted(score.unscored, "document"))
    if not score.tokens:
        why, fix = "it holds no token to predict", "give text, or tokens, of some length"
        yield Problem("--task-data-path", path, why, fix, "empty")


def _window_problems(options: EvaluateOptions, longest: int) -> Problems:
    yield from at_most("--seq-length", options.seq_length, longest, f"the {longest} positions that the model holds")
    if options.seq_length is None or options.seq_length >= (options.stride or 0):  # less than the stride breaks a law
        what = f"the {longest} tokens of the model's longest window: some are not scored"
        yield from at_most("--stride", options.stride, longest, what)


TASK = Perplexity()
