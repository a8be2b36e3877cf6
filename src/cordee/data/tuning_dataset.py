"""Samples of tuning: which sequence of a dataset sample i is.

Owns the order of whole sequences, and how the pairs of files of a dataset belong together. What stands in them is
`tuning.py`'s affair.
"""

import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cordee.data.indexed import IndexedDataset
from cordee.data.order import Order, block_seed
from cordee.data.tuning import FIELDS, kept_of
from cordee.errors import Problem, ProblemError


def document(prefix: str, field: str = FIELDS[0]) -> str:
    """The prefix of the pair of files that holds a field of a dataset."""
    return f"{prefix}_packed_{field}_document"


def sibling(indexed: str, field: str) -> str:
    """As `document`, from that of the ids."""
    return document(indexed.removesuffix(document("")), field)


def sibling_problems(indexed: IndexedDataset) -> Iterator[Problem]:
    """Why the other fields do not belong to these ids."""
    for field in FIELDS[1:]:
        prefix = sibling(indexed.prefix, field)
        try:
            other = IndexedDataset(prefix)
        except ProblemError as error:
            yield from error.problems
            continue
        if not np.array_equal(other.sequence_lengths, indexed.sequence_lengths):
            why = f"its sequences are not as long as those of {indexed.prefix}"
            yield Problem("dataset", prefix, why, "preprocess again, or copy all its files again", "differs")


class TuningDataset:
    """Samples that are whole sequences of `[first, last)`, in another permutation for every pass over them.

    The first pass is in MindSpeed-LLM's order; each further one has a seed of its own, so that no place depends on
    those before; without a seed they come as in the files. `order` says how many samples there are. A sample that is
    longer than `seq_length` is cut.
    """

    def __init__(self, indexed: IndexedDataset, first: int, last: int, order: Order, seq_length: int, seed: int | None):
        self.order, self.seq_length = order, seq_length
        self._first, self._count = first, last - first
        self._fields = {FIELDS[0]: indexed} | {
            name: IndexedDataset(sibling(indexed.prefix, name)) for name in FIELDS[1:]
        }

        @functools.lru_cache(maxsize=2)
        def permutation(block: int) -> npt.NDArray[np.int64]:
            if seed is None:
                return np.arange(self._count)
            return np.random.RandomState(block_seed(seed, block)).permutation(self._count)

        self._permutation = permutation

    def __len__(self) -> int:
        return self.order.samples

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int64]]:
        """`input_ids`, `attention_mask` and `labels`, int64 [tokens]."""
        block, place = divmod(index, self._count)
        found = self._read(self._first + int(self._permutation(block)[place]))
        kept = kept_of(found["labels"], self.seq_length)
        return {name: values[kept] for name, values in found.items()}

    def whole(self) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
        """All sequences in the order of the files, none cut."""
        return map(self._read, range(self._first, self._first + self._count))

    def _read(self, sequence: int) -> dict[str, npt.NDArray[np.int64]]:
        return {name: field.get(sequence).astype(np.int64) for name, field in self._fields.items()}
