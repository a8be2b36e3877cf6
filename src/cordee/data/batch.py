"""A micro-batch: named tensors, each with declared axes.

Owns what axes a field may have, and how samples become tensors and tensors are moved or cut along an axis, whatever
fields an objective adds. Knows nothing of where samples come from or where the tensors go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cordee.data.messages import IGNORED

Sample = Mapping[str, npt.NDArray[Any]]  # what a dataset gives, by the name of what it is

_AXES = "cordee.axes"
_PAD = "cordee.pad"


def axes(*names: str, pad: float = 0, **default: Any) -> Any:
    """Declare a field of a batch: the names of its dims, "sample", "sequence", "token" or another, and what stands at
    places of the axis "token" that a sample does not have."""
    return field(metadata={_AXES: names, _PAD: pad}, **default)


@dataclass(frozen=True, eq=False)
class Batch:
    """`input_ids` and `labels` are int64 [batch, seq]; `labels[t]` is the target at position t, -100 where none is.

    `position_ids` int64 [batch, seq] counts from 0 in every document, `segments` int64 [batch, seq] numbers the
    documents of a sequence, between which there is no attention; None means one document from position 0 on. `counted`
    bool [batch, seq] is False for padding; None: there is none. `samples` int64 [samples] counts samples over the run.
    A sample has one or more sequences, all samples the same number, which follow each other in the batch.

    A subclass, a dataclass of keywords, adds fields, each declared by `axes`. Whatever is done to a batch is done to
    all of them."""

    input_ids: Tensor = axes("sequence", "token")
    labels: Tensor = axes("sequence", "token", pad=IGNORED)
    position_ids: Tensor | None = axes("sequence", "token", default=None)
    segments: Tensor | None = axes("sequence", "token", default=None, pad=-1)
    counted: Tensor | None = axes("sequence", "token", default=None)
    samples: Tensor | None = axes("sample", default=None)

    @classmethod
    def of(cls, samples: Sequence[Sample], length: int) -> Self:
        """The batch of samples that hold its fields under their names: arrays with the axes of the field but for
        "sample", where a field has that. Sequences are padded at the end to `length` tokens. AssertionError for what
        is no field, for a field that a sample lacks, and for sequences that are longer."""
        declared = {each.name: each.metadata for each in fields(cls)}
        names = samples[0].keys()
        assert all(sample.keys() == names for sample in samples), "samples of one batch have the same fields"
        assert names <= declared.keys(), f"{cls.__name__} has no {', '.join(sorted(names - declared.keys()))}"

        def joined(name: str) -> Tensor:
            axes, pad = declared[name][_AXES], declared[name][_PAD]
            arrays = [np.asarray(sample[name]) for sample in samples]
            if "token" in axes:
                dim = axes.index("token") - len(axes)
                assert all(array.shape[dim] <= length for array in arrays), f"{name} is longer than {length} tokens"
                arrays = [_padded(array, dim, length, pad) for array in arrays]
            return torch.from_numpy(np.concatenate(arrays) if axes[0] == "sequence" else np.stack(arrays))

        return cls(**{name: joined(name) for name in names})

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda _, tensor: tensor.to(device))

    def at(self, axis: str, index: Tensor) -> Self:
        """Those places of an axis that `index`, int64, names: of "token" these tokens of every sequence."""

        def cut(axes: tuple[str, ...], tensor: Tensor) -> Tensor:
            return tensor.index_select(axes.index(axis), index.to(tensor.device)) if axis in axes else tensor

        return self._each(cut)

    @property
    def num_tokens(self) -> int:
        """Tokens that the model computes, trained or not."""
        return self.input_ids.numel()

    @property
    def num_trained(self) -> int:
        """Tokens that have a label."""
        return int((self.labels != IGNORED).sum())

    @property
    def sequences(self) -> Tensor | None:
        """A number over the run for every sequence, int64 [batch]."""
        if self.samples is None:
            return None
        each = len(self.input_ids) // len(self.samples)
        if each == 1:
            return self.samples
        return (self.samples[:, None] * each + torch.arange(each, device=self.samples.device)).flatten()

    def _each(self, change: Callable[[tuple[str, ...], Tensor], Tensor]) -> Self:
        """This batch with every tensor as `change(axes, tensor)` makes it."""
        declared = {each.name: each.metadata for each in fields(self)}
        found = {name: value for name, value in vars(self).items() if value is not None}
        unknown = [name for name in found if _AXES not in declared.get(name, ())]
        assert not unknown, f"{', '.join(unknown)}: a field of a batch is declared by `axes`"
        return replace(self, **{name: change(declared[name][_AXES], value) for name, value in found.items()})


def _padded(array: npt.NDArray[Any], dim: int, length: int, pad: float) -> npt.NDArray[Any]:
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, length - array.shape[dim])
    return np.pad(array, widths, constant_values=pad)
