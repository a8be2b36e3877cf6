"""A model that is being trained as a source of weights: for a model of another layout, or for a sink.

Owns which rank sends which shard of a parameter. A shard is a box, an offset and a shape, so that no technique that
shards or replicates parameters is known by name. Must not know what the weights are read for."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cordee.errors import Findings, ProblemError
from cordee.families.registry import ModelSpec
from cordee.model.gpt import GPTModel
from cordee.model.low_rank import quantised
from cordee.model.parameter import local_shard
from cordee.model.specs import model_specs
from cordee.parallel import collectives
from cordee.parallel.layout import Layout
from cordee.tensors.views import Index, Leaf, Shape, View, normalise
from cordee.weights.codec import Sink, Source, slices
from cordee.weights.load import load_into, mismatches

Box = tuple[Shape, Shape]  # of a shard: the global position of its first element, and its shape


def refill(model: GPTModel, source: "LiveSource") -> None:
    """Fill `model`, of any layout over the ranks of `source`, with the current weights; all ranks call it.

    Parameters of `model` keep their memory, type and device. ProblemError, on all ranks, if shapes differ."""
    collectives.raise_together(mismatches(dict(model.named_parameters()), source), source.layout.control)
    load_into(model, source)


def save(source: "LiveSource", sink: Sink | None) -> None:
    """Put all weights into `sink`; all ranks call it, one with a sink, which holds one whole parameter at a time.

    ProblemError, on all ranks, if they cannot be written; all is read to the end, for the other ranks take part."""
    found = Findings()
    for name in source.spec.shapes():  # what is added to the model has no place there
        if sink is None or found.problems:
            source.skip(name)
        else:
            found.attempt(partial(_put, sink, name, source.tensor(name)))
    collectives.raise_together(found.problems, source.layout.control)


def _put(sink: Sink, name: str, tensor: Tensor) -> None:
    try:
        sink.put(name, tensor)
    except OSError as error:
        raise ProblemError.of("output", None, f"it cannot be written: {error}", "make room or allow it") from error


class LiveSource(Source):
    """The parameters of `model`, the part that this rank trains of what `spec` describes.

    Reading is collective: between two steps all ranks of `layout` read the same parameters in the same order, each the
    part that it needs (`tensor`, `copy_into`) or none (`skip`). Beside the destination it takes the memory of one slice
    (`codec.SLICE`), on the model's device. Every shard is broadcast once, by the first rank that holds it.

    dtype: type in which weights are sent, as where float32 shards fill a model in bfloat16; None is that of the shards.
    """

    def __init__(self, model: GPTModel, spec: ModelSpec, layout: Layout, dtype: torch.dtype | None = None):
        self.spec = spec
        self._shapes = {name: each.shape for name, each in model_specs(spec.config).items()}  # adapters too
        self.layout = layout
        self._parameters = dict(model.named_parameters())
        self._quantised = quantised(model)
        self._device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
        own = {name: (_box(parameter), dtype or parameter.dtype) for name, parameter in self._parameters.items()}
        self._holders: dict[str, dict[Box, int]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for rank, held in enumerate(collectives.gather(own, layout)):
            for name, (box, kept) in held.items():
                self._holders.setdefault(name, {}).setdefault(box, rank)
                self._dtypes[name] = kept

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def view(self, name: str) -> View:
        return Leaf(self.shape(name), lambda index: self._read(name, index))

    def _read(self, name: str, index: Index) -> Tensor:
        out = torch.empty([part.stop - part.start for part in index], dtype=self.dtype(name))
        self._exchange(name, index, out)
        return out

    def copy_into(self, out: Tensor, name: str, index: Sequence[slice] | None = None) -> None:
        self._exchange(name, normalise(index, self.shape(name)), out)

    def skip(self, name: str) -> None:
        self._exchange(name, None, None)

    @torch.no_grad()
    def _exchange(self, name: str, wanted: Index | None, out: Tensor | None) -> None:
        """Broadcast all of a parameter, slice by slice, and copy what is `wanted` of it into `out`."""
        dtype = self.dtype(name)
        for (offset, shape), holder in self._holders[name].items():
            shard = self._shard(name, (offset, shape)) if holder == self.layout.rank else None
            for part in slices(shape, dtype.itemsize):
                if shard is not None:
                    sent = shard[part].to(dtype).contiguous()
                else:
                    sent = torch.empty([p.stop - p.start for p in part], dtype=dtype, device=self._device)
                if self.layout.mesh is not None:
                    sent = collectives.broadcast(sent, holder)
                if wanted is not None and out is not None:
                    start = tuple(first + p.start for first, p in zip(offset, part, strict=True))
                    _copy_common(out, wanted, sent, start)

    def _shard(self, name: str, box: Box) -> Tensor:
        parameter = self._quantised[name].kept() if name in self._quantised else self._parameters[name]
        assert _box(parameter) == box, f"{name} is not sharded as between two steps"
        return local_shard(parameter.detach())[0]


def _box(parameter: Tensor) -> Box:
    local, offset = local_shard(parameter.detach())
    return offset, tuple(local.shape)


def _copy_common(out: Tensor, wanted: Index, given: Tensor, start: Shape) -> None:
    """Copy the overlap of two parts of one tensor: `out` is at `wanted`, `given` begins at `start`."""
    to, taken = [], []
    for want, first, size in zip(wanted, start, given.shape, strict=True):
        low, high = max(want.start, first), min(want.stop, first + size)
        if low >= high:
            return
        to.append(slice(low - want.start, high - want.start))
        taken.append(slice(low - first, high - first))
    out[tuple(to)].copy_(given[tuple(taken)])
