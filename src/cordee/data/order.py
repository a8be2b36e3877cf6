"""How the samples of a dataset or a blend are ordered, in numbers: epochs, blocks, sizes, memory.

Owns the laws by which a number of samples becomes epochs and blocks; they depend on the data and the options alone,
never on a machine. Builds no array and reads no file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# A last epoch of which less than this part is needed is shuffled on its own, so that the epochs before it are whole.
_WHOLE_EPOCH = 0.80
# A blend asks each dataset for this much more than its share, because rounding may draw a sample too many.
_SURPLUS = 0.005
# Megatron shuffles all epochs of a run together, so its order takes memory by the length of the run. It is kept for
# every run that passes over its data at most `_MANY_EPOCHS` times or has at most `_LARGE` entries (documents of all
# epochs + samples; samples, in a blend). Beyond both, the order is made of blocks of about `_BLOCK` entries.
_MANY_EPOCHS = 64
_LARGE = 1 << 26
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Epochs:
    """Whole passes over a dataset, and how Megatron shuffles their samples."""

    epochs: int
    samples: int  # all that fit in these epochs
    last_apart: bool  # the last epoch is shuffled on its own
    boundary: int  # the samples before it are shuffled apart from those after it

    @classmethod
    def of(cls, tokens: int, epochs: int, last_apart: bool, seq_length: int) -> "Epochs":
        """`epochs` of `tokens` each."""
        samples = (epochs * tokens - 1) // seq_length
        before_last = ((epochs - 1) * tokens - 1) // seq_length
        return cls(epochs, samples, last_apart, before_last if last_apart else samples)

    @classmethod
    def plan(cls, tokens: int, num_samples: int | None, seq_length: int) -> "Epochs":
        """The fewest that hold `num_samples` samples; one if that is None."""
        assert tokens > 1, "a dataset of one token has nothing to predict"
        if num_samples is None:
            return cls.of(tokens, 1, False, seq_length)
        epochs = max(1, -(-(num_samples * seq_length + 1) // tokens))
        before_last = ((epochs - 1) * tokens - 1) // seq_length
        of_an_epoch = (tokens - 1) // seq_length
        last_apart = epochs > 1 and num_samples - before_last < int(_WHOLE_EPOCH * of_an_epoch)
        return cls.of(tokens, epochs, last_apart, seq_length)


@dataclass(frozen=True)
class Order:
    """The order of a dataset's samples: `blocks` blocks one after another, each of them Megatron's order for as many
    samples as `block` has, with a seed of its own. One block is Megatron's order of the whole run."""

    documents: int  # of one epoch
    block: Epochs
    blocks: int

    @classmethod
    def plan(cls, documents: int, tokens: int, num_samples: int | None, seq_length: int) -> "Order":
        """For at least `num_samples` samples (None: those of one epoch) of documents with `tokens` tokens together."""
        whole = Epochs.plan(tokens, num_samples, seq_length)
        if whole.epochs <= _MANY_EPOCHS or documents * whole.epochs + whole.samples <= _LARGE:
            return cls(documents, whole, 1)
        assert num_samples is not None
        epochs = max(-(-(seq_length + 1) // tokens), _BLOCK // (documents + tokens // seq_length))
        block = Epochs.plan(tokens, (epochs * tokens - 1) // seq_length, seq_length)
        return cls(documents, block, -(-num_samples // block.samples))

    @classmethod
    def of_blocks(
        cls, documents: int, tokens: int, num_samples: int, seq_length: int, epochs: int, last_apart: bool
    ) -> "Order":
        """As many blocks of `epochs` as hold `num_samples` samples: how a run that is extended resumes."""
        block = Epochs.of(tokens, epochs, last_apart, seq_length)
        return cls(documents, block, -(-num_samples // block.samples))

    @classmethod
    def of_sequences(cls, sequences: int, num_samples: int | None) -> "Order":
        """As many passes over sequences that are a sample each, ordered one by one, as hold `num_samples` samples."""
        return cls(sequences, Epochs(1, sequences, False, sequences), -(-(num_samples or 1) // sequences))

    @property
    def samples(self) -> int:
        return self.blocks * self.block.samples

    @property
    def epochs(self) -> int:
        return self.blocks * self.block.epochs

    @property
    def is_small(self) -> bool:
        """One of many blocks that is sooner built than read."""
        return self.blocks > 1 and self.documents * self.block.epochs + self.block.samples <= 2 * _BLOCK

    @property
    def bytes_to_build(self) -> int:
        """Memory that building one block takes at most: 16 bytes for each document of its epochs (number, length and
        end), 12 for each sample (begin and place), twice that once 32 bits do not count them."""
        return _bytes_to_build(self.documents * self.block.epochs, self.block.samples)

    @property
    def bytes_of_one_block(self) -> int:
        """Memory that building would take if all epochs were shuffled together, as Megatron does."""
        return _bytes_to_build(self.documents * self.epochs, self.samples)


def _bytes_to_build(documents: int, samples: int) -> int:
    return 16 * documents + (12 if max(documents, samples) < 2**31 else 24) * samples


def block_seed(seed: int, block: int) -> int:
    """The seed of a block: that of the run for the first, for others one that follows from both numbers."""
    return seed if block == 0 else int(np.random.SeedSequence((seed, block)).generate_state(1)[0])


def normalise(weights: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    array = np.asarray(weights, np.float64)
    return array / np.sum(array)


def blend_sizes(weights: Sequence[float], size: int) -> tuple[list[int], int]:
    """For a blend of `size` samples: how many samples each dataset has to hold, and how many the blend then has.

    As Megatron from release 0.8 on, which adds the surplus of 0.5 % to the rounded share; release 0.6 adds it before
    rounding. A dataset can so be asked for one sample more than there, which matters to its order only where that
    sample needs another epoch."""
    shares = [math.ceil(size * weight) for weight in normalise(weights).tolist()]
    return [math.ceil(share * (1 + _SURPLUS)) for share in shares], sum(shares)


def blend_period(size: int, orders: Sequence[Order]) -> int:
    """After how many samples a blend of `size` repeats its choice of datasets: never, and so exactly as Megatron's,
    unless it is large and the order of one of its datasets is in blocks too."""
    return _BLOCK if size > _LARGE and any(order.blocks > 1 for order in orders) else size


def periodic_sizes(weights: Sequence[float], size: int, period: int) -> list[int]:
    """How many samples each dataset has to hold for a blend that repeats its choices: no period draws more of one than
    its share and one, for only what is behind its share is drawn."""
    periods = -(-size // period)
    return [periods * (math.ceil(period * weight) + 1) for weight in normalise(weights).tolist()]
