"""Samples for next-token training: which tokens sample i holds, in exactly Megatron's order.

Owns the document, sample and shuffle index of one dataset and the blend of several. Knows nothing of batches, ranks
or loss masks: sample i is the same wherever it is asked for.

The order is that of `megatron.core.datasets` (compared with its release 0.16 index by index): the sequences of a
split, repeated for as many epochs as the samples need and shuffled, form one stream of tokens; sample j holds the
`seq_length + 1` tokens from token `j * seq_length` on, so the last token of a sample is also the first of the next;
the samples are then shuffled. "Documents" are here the sequences of the indexed dataset, as in Megatron. Its release
0.6 gives the same order for one dataset; for blends it rounds the parts differently, see `blend_sizes`."""

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from cordee import device
from cordee.data.indexed import IndexedDataset
from cordee.data.order import Epochs, Order, block_seed, normalise
from cordee.data.order_cache import Arrays, cached_arrays, content_key
from cordee.errors import Problem, ProblemError, raise_all
from cordee.log import in_bytes

Ints = npt.NDArray[np.int32]
_CHUNK = 1 << 16  # numbers of an index that are worked out at a time
_HELD = 2  # blocks of an order
_BLEND_ENTRY = 10  # bytes of a sample in the index of a blend

Int64s = npt.NDArray[np.int64]


class Dataset(Protocol):
    """Samples by number, each a mapping of arrays; sample i never depends on which were asked for before."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, npt.NDArray[Any]]: ...


class Indexes(NamedTuple):
    """Megatron's document, sample and shuffle index of one block of an order."""

    documents: npt.NDArray[np.int32]
    samples: npt.NDArray[Any]
    shuffle: npt.NDArray[Any]


class GPTDataset:
    """Samples of `seq_length + 1` tokens, int64, from the sequences `[first, last)` of an indexed dataset.

    `order` says how many samples there are and in which blocks they are ordered. A block is built when a sample of it
    is first asked for, and two are held. Blocks are kept in `cache_dir` under a name that follows from their content
    and opened by memory map, but for small ones. `verified`: another process of this machine has just verified or built
    what is kept of an order in one block, so its bytes are not compared with their checksum. ProblemError for a block
    that has to be built and takes more memory than this machine has left."""

    def __init__(
        self,
        indexed: IndexedDataset,
        first: int,
        last: int,
        order: Order,
        seq_length: int,
        seed: int,
        cache_dir: Path | None = None,
        verified: bool = False,
    ):
        self.indexed = indexed
        self.order = order
        self.seq_length = seq_length
        self._first, self._last, self._seed = first, last, seed
        self._cache_dir = None if order.is_small else cache_dir
        self._blocks: OrderedDict[int, Indexes] = OrderedDict()  # the last used ones
        self._verified = verified and order.blocks == 1  # nobody has opened a further block before this process
        self._lock = threading.Lock()  # the threads of a loader wait for a block instead of building it twice
        if order.blocks == 1:
            self.indexes(0)

    def __len__(self) -> int:
        return self.order.samples

    def __getitem__(self, index: int) -> dict[str, Int64s]:
        """The "tokens" of sample `index`, int64 [seq_length + 1]."""
        block, place = divmod(index, self.order.block.samples)
        indexes = self.indexes(block)
        sample = int(indexes.shuffle[place])
        (begin, begin_offset), (end, end_offset) = indexes.samples[sample : sample + 2].tolist()
        return {"tokens": self.indexed.gather(indexes.documents[begin : end + 1], begin_offset, end_offset + 1)}

    def indexes(self, block: int) -> Indexes:
        """Those of a block of the order."""
        if not 0 <= block < self.order.blocks:
            raise IndexError(f"block {block} of {self.order.blocks}")
        with self._lock:
            if block not in self._blocks:
                while len(self._blocks) >= _HELD:
                    self._blocks.popitem(last=False)
                self._blocks[block] = self._open_block(block)
            self._blocks.move_to_end(block)
            return self._blocks[block]

    def _open_block(self, block: int) -> Indexes:
        plan, first, last = self.order.block, self._first, self._last
        lengths = self.indexed.sequence_lengths
        seed = block_seed(self._seed, block)

        def build() -> Arrays:
            what = f"the order of {plan.samples:,} samples in {plan.epochs:,} epochs of {last - first:,} sequences"
            _require_memory("dataset", self.indexed.prefix, what, self.order.bytes_to_build)
            return _build_indexes(lengths, first, last, plan, self.seq_length, seed)

        if self._cache_dir is None:
            return Indexes(**build())
        facts = {"first": first, "epochs": plan.epochs, "last_apart": plan.last_apart, "seq_length": self.seq_length}
        key = content_key(order="gpt", lengths=lengths[first:last], seed=seed, **facts)
        documents, samples = plan.epochs * (last - first), plan.samples
        shapes = {"documents": (documents,), "samples": (samples + 1, 2), "shuffle": (samples,)}
        return Indexes(**cached_arrays(self._cache_dir, key, shapes, build, self._verified))


def _require_memory(option: str, value: str | None, what: str, needed: int) -> None:
    """ProblemError if building `what` takes more memory than there is: the system would kill the process instead."""
    if needed > (available := device.available_memory()):
        why = f"{what} takes {in_bytes(needed)} of memory to build, and this machine has {in_bytes(available)} left"
        fix = "ask for fewer samples, take a larger --seq-length, or build it on a machine with more memory"
        raise ProblemError.of(option, value, why, fix)


def _build_indexes(sequence_lengths: Ints, first: int, last: int, plan: Epochs, seq_length: int, seed: int) -> Arrays:
    # The legacy generator is part of the order: numpy promises its stream never to change.
    random = np.random.RandomState(seed)
    documents = build_document_index(np.arange(first, last, dtype=np.int32), plan.epochs, random, plan.last_apart)
    samples = build_sample_index(sequence_lengths, documents, seq_length, plan.samples)
    shuffle = build_shuffle_index(plan.boundary, plan.samples, random)
    return {"documents": documents, "samples": samples, "shuffle": shuffle}


def build_document_index(documents: Ints, epochs: int, random: np.random.RandomState, last_apart: bool) -> Ints:
    """The documents of all epochs, shuffled: int32 [epochs x documents]."""
    if last_apart and epochs > 1:
        before = build_document_index(documents, epochs - 1, random, False)
        return np.concatenate((before, build_document_index(documents, 1, random, False)))
    index = np.tile(documents, epochs)
    random.shuffle(index)
    return index


def build_sample_index(sequence_lengths: Ints, document_index: Ints, seq_length: int, samples: int) -> npt.NDArray[Any]:
    """Where each sample begins, int32 (or int64 where needed) [samples + 1, 2]: position in the document index and
    token in that document.

    Sample j begins with token `j * seq_length` of the stream; the document that holds it is the first to end after it.
    """
    largest = max(len(document_index), int(sequence_lengths.max(initial=0)))
    ends = sequence_lengths[document_index].astype(np.int64)
    np.cumsum(ends, out=ends)
    index = np.empty((samples + 1, 2), np.int32 if largest <= np.iinfo(np.int32).max else np.int64)
    for begin in range(0, samples + 1, _CHUNK):
        starts = np.arange(begin, min(begin + _CHUNK, samples + 1), dtype=np.int64) * seq_length
        positions = np.searchsorted(ends, starts, side="right")
        if begin == 0:
            positions[0] = 0  # the stream begins with the first document, even an empty one
        index[begin : begin + _CHUNK, 0] = positions
        index[begin : begin + _CHUNK, 1] = starts - (ends[positions] - sequence_lengths[document_index[positions]])
    return index


def build_shuffle_index(boundary: int, samples: int, random: np.random.RandomState) -> npt.NDArray[Any]:
    """A permutation of the samples, [samples], that keeps those before `boundary` and those after it apart."""
    index = np.arange(samples, dtype=np.uint32 if samples < np.iinfo(np.uint32).max - 1 else np.int64)
    random.shuffle(index[:boundary])
    if boundary < samples:
        random.shuffle(index[boundary:])
    return index


class BlendedDataset:
    """Samples of several datasets in the proportion of their weights, each dataset's own in order.

    Which dataset comes when is Megatron's choice for the first `period` samples (None: for all of them), and then the
    same again; each dataset's own samples continue. `cache_dir`, `verified` and ProblemError: as for `GPTDataset`."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        weights: Sequence[float],
        size: int,
        cache_dir: Path | None = None,
        period: int | None = None,
        verified: bool = False,
    ):
        self.datasets = list(datasets)
        self.size = size
        self.period = period or size
        # Megatron normalises once for the sizes and once more here; the last bit of a weight can decide a tie.
        normalised = normalise(normalise(weights))

        def build() -> Arrays:
            _require_memory("blend", None, f"the blend of {self.size:,} samples", self.period * _BLEND_ENTRY)
            return dict(zip(("dataset", "sample"), build_blend(normalised, self.period), strict=True))

        arrays = cached_arrays(
            cache_dir,
            content_key(order="blend", weights=normalised.tolist(), size=self.period),
            {"dataset": (self.period,), "sample": (self.period,)},
            build,
            verified,
        )
        self.dataset_index = arrays["dataset"]
        self.dataset_sample_index = arrays["sample"]
        self.drawn = _count(self.dataset_index, len(self.datasets))  # of each dataset in a period
        raise_all(self._oversampled())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Mapping[str, npt.NDArray[Any]]:
        turn, place = divmod(index, self.period)
        dataset = int(self.dataset_index[place])
        return self.datasets[dataset][turn * self.drawn[dataset] + int(self.dataset_sample_index[place])]

    def _oversampled(self) -> Iterator[Problem]:
        """Datasets of which a small blend draws more than there are, by rounding up; Megatron refuses these too."""
        turns, rest = divmod(self.size, self.period)
        last = _count(self.dataset_index[:rest], len(self.datasets))
        for number, (dataset, each, more) in enumerate(zip(self.datasets, self.drawn, last, strict=True), 1):
            if (count := turns * each + more) > len(dataset):
                why = f"a blend of {self.size} samples draws {count} of dataset {number}, which has {len(dataset)}"
                fix = "ask for more samples, give that dataset more text, or blend fewer"
                yield Problem("blend", count, why, fix, limit=len(dataset))


def _count(numbers: npt.NDArray[np.int16], kinds: int) -> list[int]:
    """How often each of the numbers below `kinds` occurs."""
    counts = np.zeros(kinds, np.int64)
    for begin in range(0, len(numbers), _CHUNK):  # counting makes a copy of eight bytes each
        counts += np.bincount(numbers[begin : begin + _CHUNK], minlength=kinds)
    return counts.tolist()


def build_blend(weights: npt.NDArray[np.float64], size: int) -> tuple[npt.NDArray[np.int16], Int64s]:
    """Which dataset gives sample i, int16 [size], and which of its own samples that is, int64 [size].

    Sample i comes from the dataset that is most behind its share, the one with the largest
    `weight * max(i, 1) - drawn`; the lowest of equals (Megatron's rule).

    Each choice depends on all before it, yet a wrong count of what was drawn corrects itself after few samples. So the
    samples are cut in as many blocks as they are long, every block starts from a guess, and all take their steps
    together as one array. A block whose guess was not where the block before it ended is done again from there, until
    none is left; the result is therefore the rule's, to the last sample."""
    length = max(1, math.isqrt(size))
    blocks = -(-size // length)
    begins = np.arange(blocks, dtype=np.int64) * length
    drawn = _guess_drawn(weights, begins)
    dataset_index = np.empty((blocks, length), np.int16)
    sample_index = np.empty((blocks, length), np.int64)
    ends = drawn.copy()
    todo = np.arange(blocks)
    while todo.size:
        counts = drawn[todo]
        for step in range(length):
            samples = np.maximum(begins[todo] + step, 1).astype(np.float64)
            chosen = np.argmax(samples[:, None] * weights - counts, axis=1)
            taken = np.arange(len(todo)), chosen
            dataset_index[todo, step], sample_index[todo, step] = chosen, counts[taken]
            counts[taken] += 1
        ends[todo] = counts
        todo = np.flatnonzero((drawn[1:] != ends[:-1]).any(axis=1)) + 1
        drawn[todo] = ends[todo - 1]
    return dataset_index.reshape(-1)[:size], sample_index.reshape(-1)[:size]


def _guess_drawn(weights: npt.NDArray[np.float64], begins: Int64s) -> Int64s:
    """Counts [blocks, datasets] near each dataset's share that add up to the samples before each block."""
    shares = begins[:, None] * weights
    drawn = np.floor(shares).astype(np.int64)
    missing = begins - drawn.sum(axis=1)
    ranks = np.argsort(np.argsort(drawn - shares, axis=1, kind="stable"), axis=1)
    return drawn + (ranks < missing[:, None])
