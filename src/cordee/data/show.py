"""`cordee data show`: what is in a `.bin/.idx` pair, as text.

Owns the figures and how samples are shown. The byte format is `indexed.py`'s."""

import json
from collections.abc import Iterator

import numpy as np

from cordee.config import laws
from cordee.data.gpt_check import token_problems
from cordee.data.indexed import IndexedDataset
from cordee.data.manifest import Manifest, read_manifest
from cordee.data.options import ShowDataConfig
from cordee.data.readers import reading
from cordee.errors import Findings, Problem, Problems, at_most, raise_all
from cordee.log import counted
from cordee.tokenizer import Tokenizer, load_tokenizer, names_tokenizer
from cordee.tokenizer.base import outside

_TOKENS = 64  # of a sequence that are shown


def run(config: ShowDataConfig) -> int:
    """Print the figures of a pair and some of its sequences. Raises `ProblemError` for a pair that is broken, or was
    made with another tokenizer."""
    dataset, manifest, tokenizer = _opened(config)
    for label, value in describe(dataset, manifest):
        print(f"{label:<16} {value}")
    for index in range(config.start, min(config.start + config.num, len(dataset))):
        print()
        for line in _sequence_lines(dataset, index, tokenizer):
            print(line)
    return 0


def check_run(config: ShowDataConfig) -> list[Problem]:
    """Everything that is wrong with the pair, the tokenizer and what is asked of them."""
    found = Findings()
    found.attempt(lambda: _opened(config))
    return found.problems


def describe(dataset: IndexedDataset, manifest: Manifest | None = None) -> Iterator[tuple[str, str]]:
    """Figures of a pair, as labels and values; lengths are in tokens. Memory: 4 bytes a sequence."""
    lengths = dataset.sequence_lengths
    yield "sequences", f"{len(dataset):,}"
    yield "documents", f"{dataset.num_documents:,}"
    yield "tokens", f"{dataset.num_tokens:,}"
    yield "dtype", str(dataset.dtype)
    if len(dataset):
        middle, most = np.percentile(lengths, (50, 95), method="lower")
        figures = (("min", lengths.min()), ("median", middle), ("95%", most), ("max", lengths.max()))
        spread = ", ".join(f"{name} {value:,}" for name, value in figures)
        yield "sequence length", f"{spread}, mean {lengths.mean(dtype=np.float64):,.1f}"
        yield "empty sequences", f"{np.count_nonzero(lengths == 0):,}"
    if manifest is not None and (made_with := manifest.tokenizer) is not None:
        yield "tokenizer", f"{made_with.type} of {made_with.vocab_size:,} tokens, end of document: {made_with.eod}"


def _opened(config: ShowDataConfig) -> tuple[IndexedDataset, Manifest | None, Tokenizer | None]:
    found = Findings([*laws.problems(config)])
    tokenizer = found.attempt(lambda: load_tokenizer(config)) if names_tokenizer(config) else None

    def read() -> tuple[IndexedDataset, Manifest | None]:
        with reading("dataset", config.prefix):
            dataset = IndexedDataset(config.prefix)
            raise_all(dataset.problems())
            return dataset, read_manifest(dataset)

    pair = found.attempt(read)
    if pair is not None:
        found.problems += _request_problems(config, *pair, tokenizer)
    raise_all(found.problems)
    assert pair is not None, "its problems are raised"
    return *pair, tokenizer


def _request_problems(
    config: ShowDataConfig, dataset: IndexedDataset, manifest: Manifest | None, tokenizer: Tokenizer | None
) -> Problems:
    last = max(0, len(dataset) - 1)
    yield from at_most("--start", config.start, last, f"the last sequence, {last}")
    if manifest is not None:
        yield from token_problems(config.prefix, manifest, None, tokenizer)
    if tokenizer is None:
        return
    for index in range(config.start, min(config.start + config.num, len(dataset))):
        tokens = dataset.get(index, length=_TOKENS)
        if (wrong := outside(tokens.tolist(), tokenizer.vocab_size)) is not None:
            why = f"sequence {index} holds token {wrong}, and the tokenizer has {tokenizer.vocab_size} tokens"
            fix = "give the tokenizer that it was made with"
            yield Problem("dataset", config.prefix, why, fix, "tokenizer", limit=tokenizer.vocab_size)
            return


def _sequence_lines(dataset: IndexedDataset, index: int, tokenizer: Tokenizer | None) -> Iterator[str]:
    length, tokens = int(dataset.sequence_lengths[index]), dataset.get(index, length=_TOKENS).tolist()
    left = " ..." if length > len(tokens) else ""
    yield f"sequence {index}: {counted(length, 'token')}"
    yield f"  ids   {' '.join(map(str, tokens))}{left}"
    if tokenizer is not None:  # as JSON: on one line, and nothing that a terminal obeys
        yield f"  text  {json.dumps(tokenizer.decode(map(int, tokens)), ensure_ascii=False)}{left}"
