"""Formats whose tensors are made by rules: weights out of their files, and into them.

Owns reading and writing by rules, whatever the files and the names in them, and the shapes that rules imply."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce

import torch
from torch import Tensor

from cordee.families.registry import ModelSpec
from cordee.tensors.rules import Rule
from cordee.tensors.views import Index, Shape, View
from cordee.weights.codec import Source
from cordee.weights.files import TensorFile
from cordee.weights.regions import Destination
from cordee.weights.staged_sink import Move, Output, StagedSink


def foreign_tensors(rules: Mapping[str, Rule], shapes: Mapping[str, Shape]) -> Iterator[tuple[str, str, Shape]]:
    """Every tensor of a format whose parameters have `shapes`: the parameter in it, its own name, and its shape."""
    for name, rule in rules.items():
        for foreign, shape in zip(rule.foreign, rule.foreign_shapes(shapes[name]), strict=True):
            yield name, foreign, shape


class RuledSource(Source):
    """`files` maps each foreign name to the file that holds it, `_rules` each canonical name to its rule."""

    files: Mapping[str, TensorFile]
    _rules: dict[str, Rule]

    def dtype(self, name: str) -> torch.dtype:
        stored = (self.files[foreign].tensors[foreign].dtype for foreign in self._rules[name].foreign)
        return reduce(torch.promote_types, (dtype for dtype in stored if dtype))

    def view(self, name: str) -> View:
        dtype = self.dtype(name)

        def get(foreign: str, index: Index) -> Tensor:
            return self.files[foreign].read(foreign, index).to(dtype)

        return self._rules[name].view(get, self._shapes[name])


class RuledSink(StagedSink):
    """`rules` are those of each canonical name."""

    def __init__(self, output: Output, spec: ModelSpec, rules: Mapping[str, Rule], dtypes: Mapping[str, torch.dtype]):
        self._rules = rules
        super().__init__(output, spec, dtypes)

    def moves(self, name: str, view: View, dtype: torch.dtype) -> Iterable[Move]:
        for foreign, part in self._rules[name].foreign_views(view).items():
            yield Move(part, dtype, [self.place(foreign, part.shape, dtype)])

    @abstractmethod
    def place(self, foreign: str, shape: Shape, dtype: torch.dtype) -> Destination:
        """Where a tensor goes. OSError if there is no room for it."""
