"""What a task asks of a model: log-probabilities of given tokens, and continuations.

Owns the kinds of request, how text becomes one that fits the model, and the pieces of which each is computed, every one
for itself and in any order. Knows no model and no processes."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cordee.errors import ProblemError
from cordee.generate.options import DecodingOptions
from cordee.tokenizer.base import outside

if TYPE_CHECKING:
    from cordee.tokenizer import Tokenizer

Tokens = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Likelihood:
    """The log-probability of a continuation, in nats, and whether greedy decoding would have written it."""

    logprob: float
    greedy: bool


@dataclass(frozen=True, eq=False)
class Window:
    """Tokens to score: `tokens[first:]`, each after all of `tokens` before it; `first` is at least 1.

    The result is their log-probability and, where `greedy` asks for it, whether each is the most likely token. `key`
    names it: what has the same key is computed once. Windows of one `row` show the model the same."""

    tokens: Tokens
    first: int
    greedy: bool = False
    settings = None

    @property
    def inputs(self) -> Tokens:
        return self.tokens[:-1]

    @property
    def length(self) -> int:
        """Tokens that the model sees."""
        return len(self.tokens) - 1

    @cached_property
    def row(self) -> str:
        return digest(self.inputs.tobytes())

    @cached_property
    def key(self) -> str:
        return digest(f"{self.row} {self.tokens[-1]} {self.first} {self.greedy}".encode())

    @staticmethod
    def is_result(value: Any) -> bool:
        """Whether a value of JSON has the form of a result."""
        if not isinstance(value, list) or len(value) != 2:
            return False
        logprob, greedy = value
        return isinstance(logprob, float) and math.isfinite(logprob) and isinstance(greedy, bool)


@dataclass(frozen=True, eq=False)
class Loglikelihood:
    """How likely `tokens[start:]` are after `tokens[:start]`; answered by a `Likelihood`."""

    tokens: Tokens
    start: int

    def pieces(self) -> Iterator[Window]:
        yield Window(self.tokens, self.start, greedy=True)

    def answer(self, results: Sequence[Any]) -> Likelihood:
        ((logprob, greedy),) = results
        return Likelihood(logprob, bool(greedy))


@dataclass(frozen=True, eq=False)
class RollingLoglikelihood:
    """How likely all tokens but the first are, each after what the window that first reaches it gives.

    Windows show the model at most `window` tokens and begin `stride` apart. Answered by the log-probability in nats, 0
    where there is no token to score."""

    tokens: Tokens
    window: int
    stride: int

    def pieces(self) -> Iterator[Window]:
        return windows(self.tokens, self.window, self.stride)

    def answer(self, results: Sequence[Any]) -> float:
        return math.fsum(logprob for logprob, _ in results)


@dataclass(frozen=True)
class GenerateUntil:
    """What the model writes after `prompt`, up to the first of the texts `until`, a stop token or a length.

    options: length and sampling; the batch size is ignored. number: distinguishes samples of one prompt."""

    prompt: tuple[int, ...]
    until: tuple[str, ...]
    options: DecodingOptions
    number: int = 0

    @property
    def settings(self) -> DecodingOptions:
        """What is computed in one batch has the same."""
        return self.options

    @property
    def length(self) -> int:
        return len(self.prompt) + self.options.max_new_tokens

    @cached_property
    def key(self) -> str:
        alone = replace(self, options=replace(self.options, batch_size=1))
        return digest(json.dumps(asdict(alone)).encode())

    @property
    def row(self) -> str:
        return self.key

    @staticmethod
    def is_result(value: Any) -> bool:
        """Whether a value of JSON has the form of a result."""
        return isinstance(value, str)

    def pieces(self) -> Iterator["GenerateUntil"]:
        yield self

    def answer(self, results: Sequence[Any]) -> str:
        (text,) = results
        return text


Piece = Window | GenerateUntil  # what is computed at once, in any order and company
Request = Loglikelihood | RollingLoglikelihood | GenerateUntil


def windows(tokens: Tokens, window: int, stride: int) -> Iterator[Window]:
    """Pieces that score every token but the first once; with `stride` equal to `window` no token is seen twice."""
    assert 0 < stride <= window, f"windows of {window} that move on by {stride} leave tokens out"
    last = len(tokens) - 1
    scored = 0
    for start in range(0, last, stride):
        stop = min(start + window, last)
        yield Window(tokens[start : stop + 1], scored - start + 1)
        scored = stop
        if stop == last:
            return


def digest(content: bytes) -> str:
    """A short name for `content`, the same in every run."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class Encoder:
    """Texts as requests to a model of `vocab_size` tokens that sees at most `window`.

    Every text begins with bos if `prepend_bos` and the tokenizer has one. What is too long is cut at its left, behind
    bos; `truncated` counts the requests to which that happened. ProblemError for a text with a token that the model
    does not have."""

    def __init__(self, tokenizer: "Tokenizer | None", window: int, *, vocab_size: int, prepend_bos: bool):
        self._tokenizer = tokenizer
        self.window = window
        self._vocab_size = vocab_size
        self._prepend_bos = prepend_bos
        self.truncated = 0

    def loglikelihood(self, context: str, continuation: str) -> Loglikelihood:
        """How likely `continuation` is after `context`, which may be empty.

        Spaces at the end of the context belong to the continuation. The two are tokenized as one text and cut where the
        context ends when tokenized alone (as lm-evaluation-harness does). ProblemError if the continuation alone is too
        long, or has no token."""
        stripped = context.rstrip()
        alone, joint = self._ids(stripped, context + continuation)
        before, after = joint[: len(alone)], joint[len(alone) :]
        if not after:  # the texts have grown together to no more tokens
            before, (after,) = alone, self._ids(context[len(stripped) :] + continuation)
        if not after:
            why, fix = "what is to be scored has no token", "leave out documents that end in no text"
            raise ProblemError.of("continuation", repr(continuation), why, fix, "empty")
        before = self._fitted(before, self.window + 1 - len(after))
        return Loglikelihood(np.array(self._known(before + after), np.int64), len(before))

    def generate_until(
        self, context: str, until: Sequence[str], options: DecodingOptions, number: int = 0
    ) -> GenerateUntil:
        """ProblemError if `options` leave no room for a context."""
        (ids,) = self._ids(context)
        prompt = self._fitted(ids, self.window - options.max_new_tokens)
        return GenerateUntil(tuple(self._known(prompt)), tuple(until), options, number)

    def _ids(self, *texts: str) -> list[list[int]]:
        assert self._tokenizer is not None, "text needs a tokenizer"
        return self._tokenizer.encode_batch(texts, add_special_tokens=False)

    def _known(self, ids: list[int]) -> list[int]:
        assert self._tokenizer is not None
        if (wrong := outside(ids, self._vocab_size)) is not None:
            why = f"token id {wrong} of a text is none of the model's {self._vocab_size}"
            fix = "use the tokenizer that the model was trained with"
            raise ProblemError.of("tokenizer", self._tokenizer.type, why, fix, "range", limit=wrong)
        return ids

    def _fitted(self, ids: list[int], room: int) -> list[int]:
        """`ids` with what a text begins with, at least one token and at most `room`."""
        assert self._tokenizer is not None
        bos, eod = self._tokenizer.bos, self._tokenizer.eod
        start = [bos] if self._prepend_bos and bos is not None else []
        if not start and not ids:  # nothing is predicted without a token before it
            start = [token for token in (bos, eod) if token is not None][:1]
        if not start and not ids:
            why = "an empty context needs a token to begin with, and it has neither bos nor eos"
            raise ProblemError.of("tokenizer", self._tokenizer.type, why, "give another tokenizer")
        if room < max(1, len(start)):
            why = "a text that is to be scored or written is so long that no token of its context fits before it"
            raise ProblemError.of("--seq-length", self.window, why, "raise it if the model holds more")
        excess = max(0, len(start) + len(ids) - room)
        self.truncated += excess > 0
        return start + ids[excess:]
