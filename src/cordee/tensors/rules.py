"""How a canonical parameter is laid out in the tensors of a foreign checkpoint.

Owns rules, and the usual operations that they are made of by their names. Knows no family and no file format, and never
imports torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from cordee.tensors.views import Chain, Each, Index, Join, Leaf, Op, Rearrange, Shape, Split, View, normalise, whole

if TYPE_CHECKING:
    from torch import Tensor

    from cordee.model.config import LayerConfig, ModelConfig

IDENTITY = Chain()
TRANSPOSE = Rearrange("i o -> o i")
GATE_UP = Rearrange("(two f) ... -> two f ...", {"two": 2})  # one tensor [gate; up] along dim 0


def stack(count: int) -> Op:
    """`count` tensors `[...]` to one `[count, ...]`, in their order."""
    return Chain((Each((Rearrange("... -> 1 ..."),) * count), Join(0, (1,) * count)))


def separate_qkv(groups: int, q_per_group: int, head_dim: int) -> Op:
    """q `[heads * d, ...]`, k and v `[groups * d, ...]` to `[groups, q_per_group + 2, d, ...]`."""
    sizes = {"g": groups, "r": q_per_group, "d": head_dim}
    q, kv = Rearrange("(g r d) ... -> g r d ...", sizes), Rearrange("(g d) ... -> g 1 d ...", sizes)
    return Chain((Each((q, kv, kv)), Join(1, (q_per_group, 1, 1))))


def packed_qkv(groups: int, q_per_group: int, head_dim: int) -> Op:
    """One tensor `[all q; all k; all v]` along dim 0 to `[groups, q_per_group + 2, d, ...]`."""
    kv = groups * head_dim
    return Chain((Split(0, (kv * q_per_group, kv, kv)), separate_qkv(groups, q_per_group, head_dim)))


def grouped_qkv(groups: int, q_per_group: int, head_dim: int) -> Op:
    """One tensor with q, k, v of each group together (Megatron, InternLM2; per head where `q_per_group` is 1)."""
    return Rearrange("(g s d) ... -> g s d ...", {"g": groups, "s": q_per_group + 2, "d": head_dim})


def rotary_halves(head_dim: int, rotary_dim: int, start: int = 0) -> Op:
    """Rows `[heads * d, ...]` of heads whose `rotary_dim` dims from `start` RoPE rotates in pairs, as halves."""
    apart = Rearrange("(n d) ... -> n d ...", {"d": head_dim})
    parts = Split(1, (start, rotary_dim, head_dim - start - rotary_dim))
    halves = Rearrange("n (half two) ... -> n (two half) ...", {"two": 2})
    return Chain((apart, parts, Each((IDENTITY, halves, IDENTITY)), parts.inverse, apart.inverse))


@dataclass(frozen=True)
class Rule:
    """One canonical parameter and the foreign tensors that make it, in the order `op` takes them."""

    canonical: str
    foreign: tuple[str, ...]
    op: Op = IDENTITY

    def __post_init__(self) -> None:
        assert self.op.inputs == len(self.foreign), f"{self.canonical}: {self.op.inputs} != {len(self.foreign)}"

    @cached_property
    def _inverse(self) -> Op:
        return self.op.inverse

    def foreign_shapes(self, shape: Shape) -> list[Shape]:
        """Shapes of the foreign tensors of a canonical tensor of `shape`."""
        return shapes_made(self._inverse, [shape])

    def canonical_shape(self, shapes: Sequence[Shape]) -> Shape:
        """Shape of the canonical tensor made of foreign tensors of `shapes`."""
        (shape,) = shapes_made(self.op, shapes)
        return shape

    def view(self, get: Callable[[str, Index], Tensor], shape: Shape) -> View:
        """The canonical tensor of `shape`, read by slices through `get(foreign name, index)`."""
        leaves = [
            Leaf(foreign_shape, lambda index, name=name: get(name, index))
            for name, foreign_shape in zip(self.foreign, self.foreign_shapes(shape), strict=True)
        ]
        (view,) = self.op.apply(leaves)
        return view

    def read(self, get: Callable[[str, Index], Tensor], shape: Shape, index: Sequence[slice] | None = None) -> Tensor:
        """Slice `index` of the canonical tensor of `shape`; all of it if None. May share memory with its sources."""
        return self.view(get, shape).read(normalise(index, shape))

    def foreign_views(self, canonical: View) -> dict[str, View]:
        """The foreign tensors, by name, read by slices from the canonical one."""
        return dict(zip(self.foreign, self._inverse.apply([canonical]), strict=True))

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Foreign tensors to the canonical one."""
        held = dict(zip(self.foreign, tensors, strict=True))
        shape = self.canonical_shape([tuple(tensor.shape) for tensor in tensors])
        return self.read(lambda name, index: held[name][index], shape)

    def inverse(self, tensor: Tensor) -> list[Tensor]:
        """The canonical tensor to the foreign ones."""
        views = self.foreign_views(Leaf(tuple(tensor.shape), lambda index: tensor[index]))
        return [view.read(whole(view.shape)) for view in views.values()]

    def named(self, canonical: Callable[[str], str], foreign: Callable[[str], str]) -> Rule:
        """The same rule with its names mapped."""
        return replace(self, canonical=canonical(self.canonical), foreign=tuple(map(foreign, self.foreign)))


def shapes_made(op: Op, shapes: Sequence[Shape]) -> list[Shape]:
    """The shapes of what `op` makes of tensors of `shapes`."""

    def unreadable(index: Index) -> Tensor:
        raise AssertionError("only the shape of this tensor is known")

    return [view.shape for view in op.apply([Leaf(shape, unreadable) for shape in shapes])]


def module(canonical: str, *foreign: str, op: Op = IDENTITY) -> list[Rule]:
    """Rules for the weight and the bias of a module; a rule whose parameter a model lacks is left out later."""
    return [Rule(f"{canonical}.{part}", tuple(f"{name}.{part}" for name in foreign), op) for part in ("weight", "bias")]


def each_layer(config: ModelConfig, rules: Callable[[LayerConfig], list[Rule]], prefix: str) -> list[Rule]:
    """The `rules` of every layer, named under `layers.{i}.` and the foreign `prefix`, such as `model.layers.{i}.`."""
    found = [(i, rule) for i, layer in enumerate(config.layers) for rule in rules(layer)]
    return [rule.named(f"layers.{i}.".__add__, prefix.format(i=i).__add__) for i, rule in found]
