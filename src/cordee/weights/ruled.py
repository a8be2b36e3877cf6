"""Weights that rules make of the tensors in files.

Owns reading by rules, whatever the files and the names in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from cordee.tensors.rules import Rule
from cordee.tensors.views import Index, View, normalise
from cordee.weights.codec import Source
from cordee.weights.files import TensorFile


class RuledSource(Source):
    """`files` maps each foreign name to the file that holds it, `_rules` each canonical name to its rule."""

    files: Mapping[str, TensorFile]
    _rules: dict[str, Rule]

    def dtype(self, name: str) -> torch.dtype:
        stored = (self.files[foreign].tensors[foreign].dtype for foreign in self._rules[name].foreign)
        return reduce(torch.promote_types, (dtype for dtype in stored if dtype))

    def tensor(self, name: str, index: Sequence[slice] | None = None) -> Tensor:
        return self.view(name).read(normalise(index, self._shapes[name]))

    def copy_into(self, out: Tensor, name: str, index: Sequence[slice] | None = None) -> None:
        self.view(name).read_into(out, normalise(index, self._shapes[name]))

    def view(self, name: str) -> View:
        dtype = self.dtype(name)

        def get(foreign: str, index: Index) -> Tensor:
            return self.files[foreign].read(foreign, index).to(dtype)

        return self._rules[name].view(get, self._shapes[name])
