"""The fused decode path: modules bound to their weights, for steps of one token.

Such a step is so little arithmetic that on small models most of its time goes into calling modules. A module's `bind`
gives what its `forward` does as one function over its weights, which must not change meanwhile: views are made once,
projections add to the residual, all heads of a group are queries of one attention. Any cache serves both.

Owns what bound modules share, and what a module must not have to be bound. Whatever is not known here to be without
effect is refused: the model then decodes through its modules, which are the reference."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.model.cache import CacheStep
from cordee.model.config import RopeConfig
from cordee.model.rotary import Positions, depends_on_length
from cordee.ops.mask import AttentionMask

BoundNorm = Callable[[Tensor], Tensor]  # [batch, embed] to the same
BoundMLP = Callable[[Tensor, Tensor], Tensor]  # residual and x to residual + block(x)


class Unsupported(Exception):
    """Why a model has no fused decode path."""


@dataclass(frozen=True)
class DecodeStep:
    """What all layers of one step share; `angles` are cos and sin of every `Binding.rotation`."""

    step: CacheStep
    angles: list[tuple[Tensor, Tensor]]


BoundAttention = Callable[[Tensor, Tensor, DecodeStep], Tensor]  # as BoundMLP
BoundLayer = Callable[[Tensor, DecodeStep], Tensor]


class Binding:
    """What a model is bound for: about so many rows, of at most `max_length` tokens."""

    def __init__(self, rows: int, max_length: int, device: torch.device):
        self.rows = rows
        self._positions = Positions(torch.arange(max_length, device=device)[None])
        self._rotations: dict[tuple[RopeConfig, int, int], int] = {}
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._mask: AttentionMask | None = None
        self._bias: Tensor | None = None

    def rotation(self, rope: RopeConfig | None, head_dim: int, heads: int) -> int | None:
        """Which of a step's `angles` rotate the queries and the key of a group of `heads`."""
        if rope is None:
            return None
        if depends_on_length(rope) or rope.rotary_dim not in (None, head_dim):
            raise Unsupported("its rotary positions are partial, or change with the length")
        key = rope, head_dim, heads
        if key not in self._rotations:
            self._rotations[key] = len(self._tables)
            self._tables.append(self._table(*key))
        return self._rotations[key]

    def _table(self, rope: RopeConfig, head_dim: int, heads: int) -> tuple[Tensor, Tensor]:
        """cos and sin of all positions, float32 `[positions, 1, heads + 2, head_dim]`.

        x cos + roll(x) sin rotates the queries and the key of a group, and leaves its value as it is."""
        half_cos, half_sin = (half[0, :, 0] for half in self._positions.angles(rope, head_dim))
        cos = torch.cat((half_cos, half_cos), -1).expand(-1, heads + 1, -1)
        sin = torch.cat((-half_sin, half_sin), -1).expand(-1, heads + 1, -1)
        return F.pad(cos, (0, 0, 0, 1), value=1.0)[:, None], F.pad(sin, (0, 0, 0, 1))[:, None]

    def bias(self, mask: AttentionMask, q: Tensor) -> Tensor | None:
        """What SDPA is to add to scores: rendered once for all layers, where a bool mask would be converted by each."""
        if mask is not self._mask:
            self._mask, self._bias = mask, None if mask.is_plain() else mask.bias(None, q.dtype, q.device)
        return self._bias

    def step(self, step: CacheStep) -> DecodeStep:
        at = row_index(step)
        return DecodeStep(step, [(cos[at], sin[at]) for cos, sin in self._tables])


def row_index(step: CacheStep) -> slice | Tensor:
    """Index of a step's tokens, one a row, into a table of all positions."""
    return slice(step.lengths[0], step.filled) if step.alike else step.indices[:, 0]


def require_known(config: Any, known: str) -> None:
    """Refuse a config that sets any field but those `known`, such as one that is added to it later."""
    for field in fields(config):
        if field.name not in known.split() and getattr(config, field.name) != field.default:
            raise Unsupported(f"its {type(config).__name__} has {field.name}")


def require_plain(module: nn.Module, kind: type[nn.Module], parts: str) -> None:
    """Refuse a module of another class than `kind`, or with other children and parameters than `parts`.

    What is changed of it otherwise is for `placement.altered` to find."""
    name = type(module).__name__
    if type(module) is not kind or module._compiled_call_impl is not None:
        raise Unsupported(f"it has a {name} with a forward of its own")
    found = {**module._modules, **module._parameters}
    if added := sorted(part for part in found if found[part] is not None and part not in parts.split()):
        raise Unsupported(f"a {name} has {', '.join(added)}")
