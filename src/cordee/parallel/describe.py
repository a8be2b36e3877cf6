"""A layout as text: which ranks shard what.

Owns the text that a run and `cordee check` show. Works from `Degrees` alone, without torch."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from cordee.log import counted
from cordee.parallel.degrees import AXES, Degrees

_SHARED = {
    "pp": "layers",
    "replicate": "samples",
    "shard": "samples",
    "cp": "tokens of a sequence",
    "ep": "experts",
    "tp": "heads, width of the MLP, vocabulary",
}
_SHOWN = 4  # groups of an axis, and ranks of a group


def describe_layout(degrees: Degrees, held: Sequence[int] = ()) -> str:
    """Size and groups of every axis with several ranks; `held`: parameters that each rank keeps between steps."""
    d = degrees
    if d.world_size == 1:
        return "\n".join(["1 process", *_kept(held)])
    data = f"dp {d.data}" + (f" (replicate {d.replicate} x shard {d.shard})" if d.replicate > 1 and d.shard > 1 else "")
    experts = f", ep {d.ep}" if d.ep > 1 else ""
    lines = [f"{counted(d.world_size, 'process', 'processes')} = pp {d.pp} x {data} x cp {d.cp} x tp {d.tp}{experts}"]
    axes = [axis for axis in (*AXES[:-1], "ep", "tp") if getattr(d, axis) > 1]
    names = max(map(len, axes))
    shared = max(len(_SHARED[axis]) for axis in axes)
    for axis in axes:
        count = d.world_size // getattr(d, axis)
        found = _shortened(count, lambda number, axis=axis: _ranks(group(d, axis, number)), " | ")
        lines.append(f"  {axis:<{names}} {getattr(d, axis):>4}  {_SHARED[axis]:<{shared}}  ranks {found}")
    of_experts = f", one of experts in {_storage(*d.expert_storage)}" if d.ep > 1 else ""
    lines.append(f"  a parameter is kept in {_storage(*d.storage)}{of_experts}")
    return "\n".join([*lines, *_kept(held)])


def group(degrees: Degrees, axis: str, number: int) -> range:
    """The ranks of a group along `axis`, "ep" too, in order."""
    size = getattr(degrees, axis)
    # Experts fold over the ranks with different tokens, neighbours first, inside of which lie those of tp only.
    stride = degrees.tp if axis == "ep" else math.prod(degrees.sizes[AXES.index(axis) + 1 :])
    first = number // stride * size * stride + number % stride
    return range(first, first + size * stride, stride)


def _storage(copies: int, shards: int) -> str:
    return f"{counted(shards, 'shard')} x {counted(copies, 'copy', 'copies')}"


def _kept(held: Sequence[int]) -> list[str]:
    """One line for consecutive ranks that keep the same number of parameters."""
    lines, first = [], 0
    for number, run in groupby(held):
        ranks = range(first, first + len(list(run)))
        who = f"rank {first}" if len(ranks) == 1 else f"ranks {_ranks(ranks)} each"
        lines.append(f"  {who}: {number:,} parameters between steps")
        first += len(ranks)
    return lines


def _ranks(group: range) -> str:
    """0 1 2 3 -> 0-3; 0 4 8 -> 0 4 8"""
    if len(group) > 2 and group[-1] - group[0] == len(group) - 1:
        return f"{group[0]}-{group[-1]}"
    return _shortened(len(group), lambda number: str(group[number]), " ")


def _shortened(count: int, part: Callable[[int], str], between: str) -> str:
    parts = [part(number) for number in range(min(count, _SHOWN))]
    if count > _SHOWN:
        parts[-1:] = ["...", part(count - 1)]
    return between.join(parts)
