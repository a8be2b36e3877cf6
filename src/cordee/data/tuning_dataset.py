"""Samples of tuning: which sequence of a dataset sample i is.

Owns the order of whole sequences, and how the pairs of files of a dataset belong together. What stands in them is
`tuning.py`'s affair."""

import functools
from collections.abc import Iterator
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from cordee.data.indexed import IndexedDataset, idx_path
from cordee.data.messages import IGNORED
from cordee.data.order import Order, block_seed
from cordee.data.tuning import DESIRABLE, FIELDS, SIDES, field_names, kept_of_sides, source_length
from cordee.errors import Problem, ProblemError

Form: TypeAlias = Literal["dialogues", "pairs", "kto"]
CHOSEN, REJECTED = (side + FIELDS[0] for side in SIDES)
MISMATCHED = "mismatched_"  # the side of a sample of KTO that is its prompt with the answer to another one
_TRIED = 64  # samples, to find another prompt; of data with a single one, an answer to it has to do


def document(prefix: str, field: str = FIELDS[0]) -> str:
    """The prefix of the pair of files that holds a field of a dataset."""
    return f"{prefix}_packed_{field}_document"


def form_of(ids: str) -> Form | None:
    """What the dataset is whose ids, of pairs the chosen ones, have this prefix; None: text, or nothing."""
    if ids.endswith(document("", CHOSEN)):
        return "pairs"
    if not ids.endswith(document("")):
        return None
    return "kto" if idx_path(sibling(ids, DESIRABLE)).exists() else "dialogues"


def sibling(ids: str, field: str) -> str:
    """As `document`, from that of the ids."""
    return document(ids.removesuffix(document("", CHOSEN)).removesuffix(document("")), field)


def ids_of(ids: str) -> list[IndexedDataset]:
    """The ids of all sides of a dataset, the first of which have this prefix."""
    return [IndexedDataset(prefix) for prefix in (ids, *[sibling(ids, REJECTED)] * (form_of(ids) == "pairs"))]


def fields_of(ids: str) -> tuple[str, ...]:
    form = form_of(ids)
    return tuple(name.removeprefix("packed_") for name in field_names(form == "pairs", form == "kto"))


def sibling_problems(indexed: IndexedDataset) -> Iterator[Problem]:
    """Why the other fields do not belong to these ids."""
    lengths = indexed.sequence_lengths
    for field in fields_of(indexed.prefix)[1:]:
        prefix = sibling(indexed.prefix, field)
        try:
            other = IndexedDataset(prefix).sequence_lengths
        except ProblemError as error:
            yield from error.problems
            continue
        if field == DESIRABLE and len(lengths) == 1:
            why, fix = "it has one sample, whose prompt no other answer can be put to", "give more samples"
            yield Problem("dataset", prefix, why, fix, "at least", limit=2)
        if field == REJECTED and len(other) == len(lengths):  # of another side, with lengths of its own
            lengths = other
        if not np.array_equal(other, np.ones_like(lengths) if field == DESIRABLE else lengths):
            why = f"its sequences are not as long as those of {indexed.prefix}"
            yield Problem("dataset", prefix, why, "preprocess again, or copy all its files again", "differs")


class TuningDataset:
    """Samples that are whole sequences of `[first, last)`, in another permutation for every pass over them.

    The first pass is in MindSpeed-LLM's order; each further one has a seed of its own, so that no place depends on
    those before; without a seed they come as in the files. `order` says how many samples there are. A sample that is
    longer than `seq_length` is cut. Of pairs a sample has the fields of both sides. `reference`, if it is set, are the
    log-probabilities of the answers of each sequence by a reference model, float32 [sequences, sides]."""

    reference: npt.NDArray[np.float32] | None = None

    def __init__(self, indexed: IndexedDataset, first: int, last: int, order: Order, seq_length: int, seed: int | None):
        self.indexed, self.order, self.seq_length = indexed, order, seq_length
        self.first, self.count = first, last - first
        self.fields = {name: IndexedDataset(sibling(indexed.prefix, name)) for name in fields_of(indexed.prefix)}

        @functools.lru_cache(maxsize=2)
        def permutation(block: int) -> npt.NDArray[np.int64]:
            if seed is None:
                return np.arange(self.count)
            return np.random.RandomState(block_seed(seed, block)).permutation(self.count)

        self.permutation = permutation

    def __len__(self) -> int:
        return self.order.samples

    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int64]]:
        """`input_ids`, `attention_mask` and `labels`, int64 [tokens], and what else there is of a sample."""
        block, place = divmod(index, self.count)
        number = int(self.permutation(block)[place])
        found = self._read(self.first + number)
        for sides in (SIDES, ("",), (MISMATCHED,)):
            if f"{sides[0]}labels" in found:
                kept = kept_of_sides([found[f"{side}labels"] for side in sides], self.seq_length)
                for side, own in zip(sides, kept, strict=True):
                    found |= {name: found[name][own] for name in (side + field for field in FIELDS)}
        return found if self.reference is None else found | {"reference": self.reference[number]}

    def whole(self) -> Iterator[dict[str, npt.NDArray[np.int64]]]:
        """All sequences in the order of the files, none cut."""
        return map(self._read, range(self.first, self.first + self.count))

    def _read(self, sequence: int) -> dict[str, npt.NDArray[np.int64]]:
        return {name: field.get(sequence).astype(np.int64) for name, field in self.fields.items()}


class PromptDataset(TuningDataset):
    """Samples whose last answer is written anew: none is cut."""

    def __init__(self, indexed: IndexedDataset, first: int, last: int, order: Order, seq_length: int, seed: int | None):
        super().__init__(indexed, first, last, order, int(indexed.sequence_lengths.max(initial=1)), seed)


class MismatchedDataset(TuningDataset):
    """Samples of KTO, each with its prompt before the answer of another one of the files, drawn until its prompt is
    another too: as often desirable as all are."""

    def _read(self, sequence: int) -> dict[str, npt.NDArray[np.int64]]:
        own = other = super()._read(sequence)
        prompt = own["input_ids"][: (start := source_length(own["labels"]))]
        for drawn in np.random.default_rng(sequence).integers(1, len(self.indexed), _TRIED).tolist():
            other = super()._read((sequence + drawn) % len(self.indexed))
            start = source_length(other["labels"])
            if not np.array_equal(prompt, other["input_ids"][:start]):
                break
        before = {"input_ids": prompt, "labels": np.full_like(prompt, IGNORED), "attention_mask": np.ones_like(prompt)}
        return own | {MISMATCHED + name: np.concatenate([before[name], other[name][start:]]) for name in FIELDS}
