"""Adapters of low rank (LoRA) merged into the weights that they were trained on.

Owns the sum W + scale * B A, in float32 and by slices, so that a merge takes no more memory than a conversion. An
adapter speaks of the tensors of a checkpoint (`q_proj`, or a tensor rank's `linear_qkv`); the operation that makes a
canonical parameter of such tensors brings it to its slices of ours. The files that adapters come in are codecs' affair.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from cordee.errors import Problem, ProblemError, Problems
from cordee.model.config import ModelConfig
from cordee.tensors.views import Index, Leaf, Op, View
from cordee.weights.codec import Source, type_of

SCORE = "score.weight"
Change = Callable[[View, torch.dtype], View]  # what an adapter makes of a tensor of the checkpoint, in that type


@dataclass(frozen=True, kw_only=True)
class Given:
    """Options about an adapter, None where not given: what an adapter's own settings have must be the same."""

    path: Path
    r: int | None = None
    alpha: float | None = None
    modules: tuple[str, ...] | None = None

    def check_modules(self, weights: Iterable[str]) -> Problems:
        """Whether an adapter of these `weights` is of the `modules`."""
        found = {name.split(".")[-2] for name in weights}
        if self.modules is not None and set(self.modules) != found:
            why = f"the adapter is of {', '.join(sorted(found))}"
            yield Problem("--lora-target-modules", " ".join(self.modules), why, "leave it out", "stated", limit=found)


def is_factor(value: object) -> bool:
    """Whether a value of untrusted settings is a positive number that products in float32 can be made with."""
    return type(value) in (int, float) and 0 < value <= torch.finfo(torch.float32).max  # type: ignore[operator]


def fingerprint(source: Source) -> str:
    """What tells other weights from those of `source`, whatever format they are in: a few values of each parameter,
    rounded to bfloat16, so that copies in that type have the same."""
    found = 0
    for name in source.names():
        *outer, inner = source.shape(name)
        index = (*(slice(size // 2, size // 2 + 1) for size in outer), slice(0, min(inner, 8)))
        found = zlib.crc32(source.tensor(name, index).bfloat16().float().contiguous().numpy().tobytes(), found)
    return f"{found:08x}"


class Adapter(Protocol):
    """notes: what reading left out or assumed, in words. prefixes: parameters that it adds, by name.
    heads: the model whose heads were trained beside it, and the value head of that; None: the base keeps its own."""

    notes: tuple[str, ...] = ()
    prefixes: Mapping[str, View] = MappingProxyType({})
    heads: Source | None = None

    def changes(self, name: str) -> tuple[Op, Sequence[Change | None]] | None:
        """For a canonical parameter that changes: the operation that makes it, and the change of each tensor it takes,
        None for a tensor that stays."""
        return None


@dataclass(frozen=True)
class LowRank:
    """The product scale * B A, `[out, in]`, and transposed where the tensor it is added to is `[in, out]`.

    a, b: slices of `[r, in]` and `[out, r]`, asked for by rows and columns. m: of DoRA, the lengths `[out]` of the rows
    of the sum."""

    a: Callable[[Index], Tensor]
    b: Callable[[Index], Tensor]
    r: int
    scale: float
    transposed: bool = False
    m: Tensor | None = None

    def read(self, index: Index) -> Tensor:
        rows, columns = reversed(index) if self.transposed else index
        rank = slice(0, self.r)
        product = self.scale * (self.b((rows, rank)).float() @ self.a((rank, columns)).float())
        return product.t() if self.transposed else product

    def __call__(self, view: View, dtype: torch.dtype) -> View:
        """The sum of a tensor and this."""
        return Leaf(view.shape, lambda index: self._summed(view, index).to(dtype))

    def _summed(self, view: View, index: Index) -> Tensor:
        if self.m is None:
            return self.read(index).add_(view.read(index))
        inner = 0 if self.transposed else 1  # over all of which lengths are taken
        wide = tuple(slice(0, view.shape[dim]) if dim == inner else cut for dim, cut in enumerate(index))
        total = self.read(wide).add_(view.read(wide))
        stretch = self.m[index[1 - inner]] / total.norm(dim=inner)
        return (total * stretch.unsqueeze(inner))[(slice(None),) * inner + (index[inner],)]


def check_whole(model: ModelConfig) -> Problems:
    """Whether weights alone are all of a model."""
    if (count := model.num_prefix_tokens) > 0:
        why = "keys and values before all others are no change of weights, so no format of models has a place for them"
        fix = "generate and evaluate with it as it is, or write PEFT's: cordee convert --save-model-type peft"
        yield Problem("num_prefix_tokens", count, why, fix, "unsupported")


class Merged(Source):
    """The weights of `base` with an adapter merged in, and its prefixes, which are no weights, beside them."""

    exact = False

    def __init__(self, base: Source, adapter: Adapter):
        self.spec = base.spec
        if adapter.heads is not None:
            heads = adapter.heads.spec.config
            self.spec = base.spec.with_heads(score=heads.score, lm_head=heads.lm_head)
        self.assets = base.assets
        self._base = base
        self._adapter = adapter
        ours, whole = self.spec.shapes(), base.spec.shapes()
        self._shapes = {name: base.shape(name) for name in base.names() if name in ours or name not in whole} | ours
        for name, prefix in adapter.prefixes.items():
            self._shapes[name] = prefix.shape
            self.spec = self.spec.adapted((), (), prefix.shape[-2])
        self.changed = {name for name in ours if adapter.changes(name) is not None}
        merged = f"an adapter was merged into {len(self.changed)} of {len(ours)} tensors"
        self.notes = (*base.notes, *adapter.notes, merged)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._adapter.prefixes:
            return type_of(self.view(name))
        return self._base.dtype("embedding.weight" if name == SCORE else name)

    def view(self, name: str) -> View:
        if (prefix := self._adapter.prefixes.get(name)) is not None:
            return Leaf(prefix.shape, lambda index: _finite(name, prefix.read(index)))
        if name == SCORE and (heads := self._adapter.heads) is not None:
            return Leaf(self.shape(name), lambda index: _finite(name, heads.tensor(name, index).to(self.dtype(name))))
        base, changes = self._base.view(name), self._adapter.changes(name) if name in self.changed else None
        if changes is None:
            return base
        op, of_parts = changes
        parts, dtype = zip(op.inverse.apply([base]), of_parts, strict=True), self.dtype(name)
        (view,) = op.apply([part if change is None else change(part, dtype) for part, change in parts])
        return Leaf(view.shape, lambda index: _finite(name, view.read(index)))


def _finite(name: str, values: Tensor) -> Tensor:
    """Those of a parameter, all of which must be numbers, which a damaged or diverged adapter has not."""
    if not values.isfinite().all():
        why, fix = f"with the adapter in it, as {values.dtype}, it has NaN or infinite values", "take another adapter"
        raise ProblemError.of(name, None, why, fix, "finite")
    return values
