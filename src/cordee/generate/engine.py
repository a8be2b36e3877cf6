"""Generation: prompts in, new tokens out.

Owns the loop over steps, batches, when a sample ends, and the checks of a request. What a step computes is
`decoder.py`'s, which token it picks `sampling.py`'s. Knows nothing of text and files."""

import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from cordee.errors import Problem, ProblemError, raise_all
from cordee.generate.decoder import CachedDecoder, Decoder, FusedDecoder, PlainDecoder, unsupported_reason
from cordee.generate.options import DecodingOptions
from cordee.generate.sampling import choose
from cordee.log import counted, logger
from cordee.model.config import ModelConfig
from cordee.model.gpt import GPTModel
from cordee.parallel.inference import InferenceStage
from cordee.tokenizer.base import outside

Prompts = Sequence[Sequence[int]]
Ended = Callable[[int, Sequence[int]], bool]  # whether sample `number`, of which these tokens are there, is complete


@dataclass(frozen=True)
class Token:
    """A token as it is written: the number of its sample (its prompt's place in the call), its id, and whether it is
    the sample's last."""

    sample: int
    id: int
    last: bool


@dataclass
class _Sample:
    """A sample in the making."""

    number: int
    name: int  # in what is drawn
    prompt: Sequence[int]
    tokens: list[int] = field(default_factory=list)


def generate(
    model: GPTModel,
    prompts: Prompts,
    options: DecodingOptions | None = None,
    *,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    on_token: Callable[[Token], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt; a stop token that ended it comes last.

    Parameters as for `stream`; `on_token` sees every token as soon as it is there."""
    written: list[list[int]] = [[] for _ in prompts]
    for token in stream(model, prompts, options, stop_ids=stop_ids, vocab_size=vocab_size):
        written[token.sample].append(token.id)
        if on_token is not None:
            on_token(token)
    return written


def stream(
    model: GPTModel,
    prompts: Prompts,
    options: DecodingOptions | None = None,
    *,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
    stage: InferenceStage | None = None,
    names: Sequence[int] | None = None,
    ended: Ended = lambda number, tokens: False,
) -> Iterator[Token]:
    """Tokens one by one, as they are written; the samples of a batch take turns.

    A sample depends on its prompt, and drawn at random on the seed and its name; never on the batch it is in.

    options: length, filters, seed and batch size.
    stop_ids: tokens that end a sample; they are yielded too.
    vocab_size: only ids below it are written, where the model has more rows than the tokenizer has tokens.
    stage: the one that `model` is of several processes, which all call this alike.
    names: of the samples; their numbers if none are given.
    ended: asked after every token whether it is its sample's last; stop tokens and length need not be looked at.
    Raises ProblemError if the request does not fit the model, or the model gives no numbers."""
    options = options or DecodingOptions()
    raise_all(check(model.config, prompts, options))
    samples = [_Sample(n, n if names is None else names[n], prompt) for n, prompt in enumerate(prompts)]
    stop = frozenset(stop_ids)

    def last(sample: _Sample) -> bool:
        tokens = sample.tokens
        return tokens[-1] in stop or len(tokens) == options.max_new_tokens or ended(sample.number, tokens)

    return _stream(model, samples, options, last, vocab_size, stage)


@torch.inference_mode()
def _stream(
    model: GPTModel,
    samples: list[_Sample],
    options: DecodingOptions,
    last: Callable[[_Sample], bool],
    vocab_size: int | None,
    stage: InferenceStage | None,
) -> Iterator[Token]:
    decoder_of = _decoder_of(model, options, stage)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(samples), options.batch_size):
            batch = samples[start : start + options.batch_size]
            decoder = decoder_of(max(len(s.prompt) for s in batch) + options.max_new_tokens)
            yield from _write(decoder, batch, options, last, vocab_size)
    finally:
        model.train(training)


def check(
    model: ModelConfig, prompts: Prompts, options: DecodingOptions, places: Iterable[str] | None = None
) -> list[Problem]:
    """What keeps a model from continuing these prompts. `places`: where each was given, "prompt 1" if not said."""
    room, vocab_size = model.context_length, model.vocab_size
    problems = []
    for option, prompt in zip(places or (f"prompt {number}" for number in count(1)), prompts, strict=False):
        if not prompt:
            problems.append(Problem(option, None, "it has no tokens", "begin with at least one, such as bos"))
        elif (wrong := outside(prompt, vocab_size)) is not None:
            why = f"token id {wrong} is none of the model's {vocab_size}"
            fix = "use the tokenizer that the model was trained with"
            problems.append(Problem(option, None, why, fix, "range", limit=wrong))
        elif (length := len(prompt) + options.max_new_tokens) > room:
            given = counted(len(prompt), "token")
            why = f"{given} and {options.max_new_tokens} new ones are {length}; the model holds {room}"
            fix = f"shorten the prompt by {len(prompt) - room + 1} tokens or more"
            if len(prompt) < room:
                fix = f"set --max-new-tokens to at most {room - len(prompt)}, or shorten the prompt"
            problems.append(Problem(option, length, why, fix, "at most", ("max_new_tokens",), room))
    return problems


def _decoder_of(model: GPTModel, options: DecodingOptions, stage: InferenceStage | None) -> Callable[[int], Decoder]:
    """What makes a decoder for sequences of at most so many tokens."""
    if not options.use_kv_cache:
        return lambda length: PlainDecoder(model, stage)
    if stage is not None:
        return lambda length: CachedDecoder(model, length, stage)
    if options.straight_decoding:
        if (why := unsupported_reason(model)) is None:
            return lambda length: FusedDecoder(model, length)
        _log_unsupported(why)
    return lambda length: CachedDecoder(model, length)


@functools.cache
def _log_unsupported(why: str) -> None:
    logger.info("the fused decode path is not used: %s", why)


def _write(
    decoder: Decoder,
    samples: list[_Sample],
    options: DecodingOptions,
    last: Callable[[_Sample], bool],
    vocab_size: int | None,
) -> Iterator[Token]:
    """Write one batch. Samples that have ended leave it, so that the rest goes faster."""
    logits = decoder.begin([s.prompt for s in samples])
    while True:
        logits = logits[:, :vocab_size]
        _require_numbers(logits)
        tokens = choose(logits, options, [(s.name, len(s.tokens)) for s in samples])
        unfinished = []
        for row, (sample, token) in enumerate(zip(samples, tokens.tolist(), strict=True)):
            sample.tokens.append(token)
            complete = last(sample)
            if not complete:
                unfinished.append(row)
            yield Token(sample.number, token, complete)
        if not unfinished:
            return
        if len(unfinished) < len(samples):
            rows = torch.tensor(unfinished, device=tokens.device)
            decoder.keep(rows)
            tokens, samples = tokens[rows], [samples[row] for row in unfinished]
        logits = decoder.extend(tokens)


def _require_numbers(logits: Tensor) -> None:
    if not logits.sum(dtype=torch.float32).isfinite():
        why = "the model's outputs are not finite: its weights are damaged, or too large for this dtype"
        raise ProblemError.of("--dtype", str(logits.dtype).removeprefix("torch."), why, "try float32", "not finite")
