"""Documents to score: of text files, and of tokens that are stored already.

Owns how both become token ids with the bytes of text behind them, and what is reported of records that cannot be used.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cordee.data.gpt_check import token_problems
from cordee.data.indexed import IndexedDataset, idx_path
from cordee.data.manifest import read_manifest
from cordee.data.readers import input_files, no_whole_files, read_file, reading
from cordee.data.readers.chunk import Invalid, other_keys
from cordee.errors import Problem, ProblemError, raise_all
from cordee.evaluate.options import EvaluateOptions
from cordee.log import counted, logger
from cordee.tokenizer import Tokenizer

SHOWN = 5  # broken records that are named


@dataclass(frozen=True)
class Document:
    """Token ids, int64 `[tokens]`.

    `num_bytes` is the length in UTF-8 of the text of all tokens but the first, None if it is not known. `done` is the
    share of the source up to the document's end, `part` the number of the source."""

    tokens: npt.NDArray[np.int64]
    num_bytes: int | None
    done: float
    part: int = 0


def is_indexed(path: str) -> bool:
    """Whether `path` is the prefix of a `.bin/.idx` pair."""
    return idx_path(path).is_file()


def check_path(path: str, options: EvaluateOptions) -> list[Problem]:
    """What is wrong with a path, without reading what is in it."""
    try:
        with reading("--task-data-path", path):
            if is_indexed(path):
                return [no_whole_files(".bin/.idx files")] if options.whole_files else IndexedDataset(path).problems()
            input_files(Path(path), whole=options.whole_files)
    except ProblemError as error:
        return error.problems
    return []


def read_documents(
    path: str, tokenizer: Tokenizer | None, options: EvaluateOptions, vocab_size: int
) -> Iterator[Document]:
    """The documents of `path`, in their order; with `options.prepend_bos`, the tokenizer's bos comes first.

    Raises ProblemError for ids that the vocabulary does not hold, and for broken records unless they are to be skipped.
    """
    bos = tokenizer.bos if tokenizer is not None and options.prepend_bos else None
    if is_indexed(path):
        documents = _indexed_documents(path, tokenizer, vocab_size, bos)
    else:
        assert tokenizer is not None, "text needs a tokenizer"
        documents = _text_documents(path, tokenizer, options, bos)
    for number, document in enumerate(documents):
        strange = document.tokens[(document.tokens < 0) | (document.tokens >= vocab_size)]
        if len(strange):
            why = f"document {number} holds token {strange[0]}, but the model has only {vocab_size} tokens"
            fix = "give the model's own tokenizer, or data made with it"
            raise ProblemError.of("--task-data-path", path, why, fix, "range", limit=int(strange[0]))
        yield document


def _indexed_documents(path: str, tokenizer: Tokenizer | None, vocab_size: int, bos: int | None) -> Iterator[Document]:
    dataset = IndexedDataset(path)
    if (manifest := read_manifest(dataset)) is not None:
        raise_all(token_problems(path, manifest, vocab_size, tokenizer))
    count = dataset.num_documents
    for number in range(count):
        sequences = dataset[int(dataset.document_indices[number]) : int(dataset.document_indices[number + 1])]
        tokens = np.concatenate([np.empty(0, np.int64), *sequences], dtype=np.int64, casting="unsafe")
        if bos is not None and tokens[:1].tolist() != [bos]:
            tokens = np.concatenate(([bos], tokens))
        yield Document(tokens, None, (number + 1) / count)


def _text_documents(path: str, tokenizer: Tokenizer, options: EvaluateOptions, bos: int | None) -> Iterator[Document]:
    files = input_files(Path(path), whole=options.whole_files)
    before = [] if bos is None else [bos]
    for number, file in enumerate(files):
        for texts, done in _texts(file, options):
            encoded = tokenizer.encode_batch(texts, add_special_tokens=False)
            for text, ids in zip(texts, encoded, strict=True):
                num_bytes = len(text.encode()) if before else None  # without bos the first token is not scored
                yield Document(np.array(before + ids, np.int64), num_bytes, (number + done) / len(files))


def _texts(file: Path, options: EvaluateOptions) -> Iterator[tuple[list[str], float]]:
    """Texts in portions, each with the share of the file read."""
    broken: list[Invalid] = []
    count = 0
    with reading("--task-data-path", file):
        for chunk in read_file(file, options.json_keys, whole=options.whole_files):
            rows, invalid = chunk.rows(options.json_keys)
            broken += invalid[: SHOWN - len(broken)]
            count += len(invalid)
            if broken and not options.skip_invalid:
                raise_all(() if rows else other_keys(options.json_keys, invalid))
                fix = "fix it, or leave such records out: --skip-invalid"
                raise_all(Problem("--task-data-path", record.place, record.why, fix, "records") for record in broken)
            yield [text for row in rows for text in row], chunk.done
    if broken:
        shown = "; ".join(f"{record.place}: {record.why}" for record in broken)
        logger.warning("%s left out that could not be read: %s", counted(count, "record"), shown)
