"""Samples for next-token training: which tokens sample i holds, in exactly Megatron's order.

Owns the document, sample and shuffle index of one dataset and the blend of several. Knows nothing of batches, ranks
or loss masks: sample i is the same wherever it is asked for.

The order is that of `megatron.core.datasets` (compared with its release 0.16 index by index): the sequences of a
split, repeated for as many epochs as the samples need and shuffled, form one stream of tokens; sample j holds the
`seq_length + 1` tokens from token `j * seq_length` on, so the last token of a sample is also the first of the next;
the samples are then shuffled. "Documents" are here the sequences of the indexed dataset, as in Megatron. Its release
0.6 gives the same order for one dataset; for blends it rounds the parts differently, see `blend_sizes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cordee.data.indexed import IndexedDataset
from cordee.data.order_cache import Arrays, cached_arrays, content_key

# A last epoch of which less than this part is needed is shuffled on its own, so that the epochs before it are whole.
_WHOLE_EPOCH = 0.80
# A blend asks each dataset for this much more than its share, because rounding may draw a sample too many.
_SURPLUS = 0.005

Int64s = npt.NDArray[np.int64]


class Dataset(Protocol):
    """Samples by number; sample i never depends on which were asked for before."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Int64s: ...


@dataclass(frozen=True)
class Epochs:
    """How often a dataset is passed over for `num_samples` samples, and how its last pass is shuffled."""

    epochs: int
    samples: int  # all that fit in these epochs, at least as many as asked for
    samples_before_last: int  # those of the epochs before the last
    last_apart: bool  # the last epoch is shuffled on its own

    @classmethod
    def plan(cls, tokens: int, num_samples: int | None, seq_length: int) -> Epochs:
        """For `tokens` per epoch; `num_samples` None is one epoch."""
        assert tokens > 1, "a dataset of one token has nothing to predict"
        needed = 0 if num_samples is None else num_samples * seq_length + 1
        epochs = max(1, -(-needed // tokens))
        samples = (epochs * tokens - 1) // seq_length
        before_last = ((epochs - 1) * tokens - 1) // seq_length
        if epochs == 1 or num_samples is None:
            return cls(epochs, samples, 0, last_apart=False)
        of_an_epoch = (tokens - 1) // seq_length
        last_apart = num_samples - before_last < int(_WHOLE_EPOCH * of_an_epoch)
        return cls(epochs, samples, before_last, last_apart)


class GPTDataset:
    """Samples of `seq_length + 1` tokens, int64, from the sequences `[first, last)` of an indexed dataset.

    It holds at least `num_samples` samples (None: those of one epoch). The indexes are kept in `cache_dir` under a
    name that follows from their content and opened by memory map.
    """

    def __init__(
        self,
        indexed: IndexedDataset,
        first: int,
        last: int,
        num_samples: int | None,
        seq_length: int,
        seed: int,
        cache_dir: Path | None = None,
    ):
        self.indexed = indexed
        self.seq_length = seq_length
        lengths = indexed.sequence_lengths[first:last]
        self.epochs = Epochs.plan(int(lengths.sum(dtype=np.int64)), num_samples, seq_length)
        plan = self.epochs
        documents = plan.epochs * (last - first)
        key = content_key(
            order="gpt",
            lengths=lengths,
            first=first,
            epochs=plan.epochs,
            last_apart=plan.last_apart,
            seq_length=seq_length,
            seed=seed,
        )
        shapes = {"documents": (documents,), "samples": (plan.samples + 1, 2), "shuffle": (plan.samples,)}
        arrays = cached_arrays(
            cache_dir,
            key,
            shapes,
            lambda: _build_indexes(indexed.sequence_lengths, first, last, plan, seq_length, seed),
        )
        self.document_index = arrays["documents"]
        self.sample_index = arrays["samples"]
        self.shuffle_index = arrays["shuffle"]

    def __len__(self) -> int:
        return self.epochs.samples

    def __getitem__(self, index: int) -> Int64s:
        """Sample `index` as int64 [seq_length + 1]."""
        sample = int(self.shuffle_index[index])
        (begin, begin_offset), (end, end_offset) = self.sample_index[sample : sample + 2].tolist()
        return self.indexed.gather(self.document_index[begin : end + 1], begin_offset, end_offset + 1)


def _build_indexes(
    sequence_lengths: npt.NDArray[np.int32], first: int, last: int, plan: Epochs, seq_length: int, seed: int
) -> Arrays:
    # The legacy generator is part of the order: numpy promises its stream never to change.
    random = np.random.RandomState(seed)
    documents = build_document_index(np.arange(first, last, dtype=np.int32), plan.epochs, random, plan.last_apart)
    samples = build_sample_index(sequence_lengths, documents, seq_length, plan.samples)
    boundary = plan.samples_before_last if plan.last_apart else plan.samples
    return {"documents": documents, "samples": samples, "shuffle": build_shuffle_index(boundary, plan.samples, random)}


def build_document_index(
    documents: npt.NDArray[np.int32], epochs: int, random: np.random.RandomState, last_apart: bool
) -> npt.NDArray[np.int32]:
    """The documents of all epochs, shuffled: int32 [epochs x documents]."""
    if last_apart and epochs > 1:
        before = build_document_index(documents, epochs - 1, random, False)
        return np.concatenate((before, build_document_index(documents, 1, random, False)))
    index = np.tile(documents, epochs)
    random.shuffle(index)
    return index


def build_sample_index(
    sequence_lengths: npt.NDArray[np.int32], document_index: npt.NDArray[np.int32], seq_length: int, samples: int
) -> npt.NDArray[Any]:
    """Where each sample begins, int32 (or int64 where needed) [samples + 1, 2]: position in the document index and
    token in that document.

    Sample j begins with token `j * seq_length` of the stream; the document that holds it is the first to end after it.
    """
    lengths = sequence_lengths[document_index]
    largest = max(len(document_index), int(sequence_lengths.max(initial=0)))
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = np.arange(samples + 1, dtype=np.int64) * seq_length
    positions = np.searchsorted(ends, starts, side="right")
    positions[0] = 0  # the stream begins with the first document, even an empty one
    index = np.empty((samples + 1, 2), np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    index[:, 0] = positions
    index[:, 1] = starts - (ends[positions] - lengths[positions])
    return index


def build_shuffle_index(boundary: int, samples: int, random: np.random.RandomState) -> npt.NDArray[Any]:
    """A permutation of the samples, [samples], that keeps those before `boundary` and those after it apart."""
    dtype = np.uint32 if samples < np.iinfo(np.uint32).max - 1 else np.int64
    index = np.arange(samples, dtype=dtype)
    random.shuffle(index[:boundary])
    if boundary < samples:
        random.shuffle(index[boundary:])
    return index


class BlendedDataset:
    """Samples of several datasets in the proportion of their weights, each dataset's own in order."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float], size: int, cache_dir: Path | None = None):
        self.datasets = list(datasets)
        self.size = size
        # Megatron normalises once for the sizes and once more here; the last bit of a weight can decide a tie.
        normalised = normalise(normalise(weights))
        arrays = cached_arrays(
            cache_dir,
            content_key(order="blend", weights=normalised.tolist(), size=size),
            {"dataset": (size,), "sample": (size,)},
            lambda: dict(zip(("dataset", "sample"), build_blend(normalised, size), strict=True)),
        )
        self.dataset_index = arrays["dataset"]
        self.dataset_sample_index = arrays["sample"]
        drawn = np.bincount(self.dataset_index, minlength=len(self.datasets))
        assert all(count <= len(dataset) for count, dataset in zip(drawn.tolist(), self.datasets, strict=True))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Int64s:
        return self.datasets[self.dataset_index[index]][int(self.dataset_sample_index[index])]


def normalise(weights: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    array = np.asarray(weights, np.float64)
    return array / np.sum(array)


def blend_sizes(weights: Sequence[float], size: int) -> tuple[list[int], int]:
    """For a blend of `size` samples: how many samples each dataset has to hold, and how many the blend then has.

    As Megatron from release 0.8 on, which adds the surplus of 0.5 % to the rounded share; release 0.6 adds it before
    rounding. A dataset can so be asked for one sample more than there, which matters to its order only where that
    sample needs another epoch.
    """
    shares = [math.ceil(size * weight) for weight in normalise(weights).tolist()]
    return [math.ceil(share * (1 + _SURPLUS)) for share in shares], sum(shares)


def build_blend(weights: npt.NDArray[np.float64], size: int) -> tuple[npt.NDArray[np.int16], Int64s]:
    """Which dataset gives sample i, int16 [size], and which of its own samples that is, int64 [size].

    Sample i comes from the dataset that is most behind its share, the one with the largest
    `weight * max(i, 1) - drawn`; the lowest of equals (Megatron's rule).

    Each choice hangs on all before it, yet a wrong count of what was drawn corrects itself after few samples. So the
    samples are cut in as many blocks as they are long, every block starts from a guess, and all take their steps
    together as one array. A block whose guess was not where the block before it ended is done again from there, until
    none is left; the result is therefore the rule's, to the last sample.
    """
    length = max(1, math.isqrt(size))
    blocks = -(-size // length)
    begins = np.arange(blocks, dtype=np.int64) * length
    drawn = _guess_drawn(weights, begins)
    choices = np.zeros((length, blocks), np.int16)
    ends = np.zeros_like(drawn)
    todo = np.arange(blocks)
    while todo.size:
        ends[todo], choices[:, todo] = _draw(weights, begins[todo], drawn[todo], length)
        wrong = np.flatnonzero((drawn[1:] != ends[:-1]).any(axis=1)) + 1
        drawn[wrong] = ends[wrong - 1]
        todo = wrong
    dataset_index = np.ascontiguousarray(choices.T).reshape(-1)[:size]
    sample_index = np.empty(size, np.int64)
    for dataset in range(len(weights)):
        places = np.flatnonzero(dataset_index == dataset)
        sample_index[places] = np.arange(len(places))
    return dataset_index, sample_index


def _guess_drawn(weights: npt.NDArray[np.float64], begins: Int64s) -> Int64s:
    """Counts [blocks, datasets] near each dataset's share that add up to the samples before each block."""
    shares = begins[:, None] * weights
    drawn = np.floor(shares).astype(np.int64)
    missing = begins - drawn.sum(axis=1)
    ranks = np.argsort(np.argsort(drawn - shares, axis=1, kind="stable"), axis=1)
    return drawn + (ranks < missing[:, None])


def _draw(
    weights: npt.NDArray[np.float64], begins: Int64s, drawn: Int64s, steps: int
) -> tuple[Int64s, npt.NDArray[np.int16]]:
    """Take `steps` choices in every block: the counts after them [blocks, datasets] and the choices [steps, blocks]."""
    drawn = drawn.copy()
    choices = np.empty((steps, len(begins)), np.int16)
    rows = np.arange(len(begins))
    for step in range(steps):
        samples = np.maximum(begins + step, 1).astype(np.float64)
        choices[step] = chosen = np.argmax(samples[:, None] * weights - drawn, axis=1)
        drawn[rows, chosen] += 1
    return drawn, choices
