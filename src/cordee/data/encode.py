"""One chunk of text to tokens: the work that runs in parallel.

Owns what becomes of each record: its tokens, or the reason why it is left out. Knows nothing of files or processes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cordee.data.handlers import Handler
from cordee.data.messages import BadRecord
from cordee.data.readers.chunk import Broken, Chunk, Invalid
from cordee.tokenizer import Tokenizer

T = TypeVar("T")
EMPTY, TOO_LONG, INVALID = "empty text", "too long", "invalid"


@dataclass(frozen=True, kw_only=True)
class Column:
    """The documents of one key: all their tokens, int32, and how many each has, int32."""

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    max_token: int


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A chunk's documents by key, how many records were left out for which reason, and how many things
    are not used whole, by what they are and what became of them. `text_bytes` counts all text as UTF-8."""

    columns: dict[str, Column]
    records: int
    text_bytes: int
    done: float
    invalid: list[Invalid]
    left_out: dict[str, int]
    in_part: Mapping[tuple[str, str], int] = field(default_factory=dict)


def read_records(chunk: Chunk, read: Callable[[Mapping[str, Any]], T], invalid: list[Invalid]) -> Iterator[T]:
    """What `read` makes of the records of a chunk; those that it cannot use are added to `invalid`."""
    for place, values in chunk.records(()):
        try:
            if isinstance(values, Broken):
                raise BadRecord(values.why)
            (record,) = values
            assert isinstance(record, Mapping)
            made = read(record)
        except BadRecord as bad:
            invalid.append(Invalid(f"{chunk.source}: {place}", str(bad)))
            continue
        yield made


@dataclass(frozen=True, kw_only=True)
class Encode:
    """How chunks are tokenized.

    An empty text is no document; with several keys the others of its record stay. A record of which any text has
    `seq_length` tokens or more is left out under all keys. With `eod` every document ends with it. With a `handler` a
    record is one text, as that writes it."""

    tokenizer: Tokenizer
    keys: tuple[str, ...]
    handler: Handler | None = None
    eod: int | None = None
    seq_length: int | None = None

    def __call__(self, chunk: Chunk) -> Encoded:
        if self.handler is None:
            rows, invalid = chunk.rows(self.keys)
        else:
            invalid = []
            rows = [(text,) for text in read_records(chunk, self.handler.text, invalid)]
        documents = {key: self._encode([row[i] for row in rows]) for i, key in enumerate(self.keys)}
        kept = [True] * len(rows)
        if self.seq_length is not None:
            kept = [max(map(len, record)) < self.seq_length for record in zip(*documents.values(), strict=True)]
            documents = {key: list(compress(batch, kept)) for key, batch in documents.items()}
        empty = sum(not ids for batch in documents.values() for ids in batch)
        return Encoded(
            columns={key: column_of(batch) for key, batch in documents.items()},
            records=len(rows) + len(invalid),
            text_bytes=sum(len(text) if text.isascii() else len(text.encode()) for row in rows for text in row),
            done=chunk.done,
            invalid=invalid,
            left_out={INVALID: len(invalid), EMPTY: empty, TOO_LONG: kept.count(False)},
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; none for an empty one, whatever a tokenizer would put around it."""
        encoded = iter(self.tokenizer.encode_batch([text for text in texts if text]))
        end = [] if self.eod is None else [self.eod]
        # A tokenizer may find no token in a text that is not empty: then it is no document either.
        return [ids + end if text and (ids := next(encoded)) else [] for text in texts]


def column_of(documents: Sequence[Sequence[int] | npt.NDArray[np.int32]]) -> Column:
    arrays = [np.asarray(ids, np.int32) for ids in documents if len(ids)]
    tokens, lengths = np.concatenate([np.empty(0, np.int32), *arrays]), [len(array) for array in arrays]
    return Column(tokens=tokens, lengths=np.asarray(lengths, np.int32), max_token=int(tokens.max(initial=-1)))
