"""Adapters beside their base: checkpoints of runs that trained nothing else, and others that go into a model.

Owns which base such a checkpoint belongs to, the sum of the two, and of which kind an adapter is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from cordee.checkpoint import formats, source
from cordee.checkpoint.source import CheckpointSource
from cordee.checkpoint.storage import location_of, reached
from cordee.errors import Problem, ProblemError, Problems, raise_all
from cordee.model.config import LowRankConfig, slice_of
from cordee.tensors.rules import IDENTITY
from cordee.tensors.views import Index, Leaf, Op, View
from cordee.tune import lora
from cordee.tune.options import AdapterOptions
from cordee.weights import peft
from cordee.weights.adapter import Adapter, Change, Given, Merged, fingerprint
from cordee.weights.codec import Source
from cordee.weights.megatron import adapter as megatron
from cordee.weights.megatron.source import MegatronSource


def trained(path: str, option: str) -> CheckpointSource:
    """The adapters in a checkpoint, or in the newest of a run. ProblemError, about `option`, if there are none."""
    with reached(option, path):
        found = source.read(location_of(path, option))
    if found.base is None:
        why, fix = "it is a checkpoint of a whole model, no adapter", "give what training with --lora-... has saved"
        raise ProblemError([Problem(option, path, why, fix, "whole")])
    return found


def given(options: AdapterOptions) -> Given:
    """What options say of the adapter to merge."""
    path, modules = Path(options.lora_load or ""), options.lora_target_modules
    return Given(path=path, r=options.lora_r, alpha=options.lora_alpha, modules=modules)


def read(load: str, options: AdapterOptions) -> Source:
    """The weights at `load`, the adapter that options name merged into them."""
    base = formats.read(load)
    return base if options.lora_load is None else with_adapter(base, given(options))


def with_base(found: CheckpointSource) -> Source:
    """What a run with adapters has trained, in the base that it names."""
    assert found.base is not None
    base = formats.read(found.base["path"])
    return Merged(base, TrainedAdapter(found, base))


def with_adapter(base: Source, given: Given) -> Source:
    """`base` with the adapter at `given.path` merged in. ProblemError if there is none, or `base` cannot take it."""
    return Merged(base, _adapter(base, given))


def _adapter(base: Source, given: Given) -> Adapter:
    path = Path(given.path)
    if peft.is_adapter(path):
        return peft.read(given, base.spec)
    form = formats.find(location_of(path, "--lora-load"))
    if form is not None and form.name == "cordee":
        found = trained(str(path), "--lora-load")
        raise_all(lora.check_stated(found.spec, given.r, given.alpha, given.modules))
        return TrainedAdapter(found, base)
    if form is None or form.name != "mg":
        why = (
            "it is no checkpoint of adapters, nor of PEFT (no adapter_config.json), nor a Megatron checkpoint in files"
        )
        raise ProblemError([Problem("--lora-load", path, why, "give the directory of an adapter", "unknown")])
    if not isinstance(base, MegatronSource):
        why = "it has Megatron's names, and what it is to be merged into is no Megatron checkpoint"
        fix = "give the Megatron checkpoint that it was trained on as --load-dir"
        raise ProblemError([Problem("--lora-load", path, why, fix, "base", ("load_dir",))])
    return megatron.read(given, base.spec, base.dialect)


def check_base(base: Source, found: CheckpointSource, option: str) -> Problems:
    """Whether the adapters of a checkpoint were trained on `base`."""
    assert found.base is not None
    if base.spec.shapes() != found.spec.shapes():
        why = f"its adapters are of another model than the base, a {base.spec.family.name} of other shapes"
    elif fingerprint(base) != found.base["fingerprint"]:
        why = "the base has other weights than those that its adapters were trained on"
    else:
        return
    fix = f"give the base that it was trained on, {found.base['path']}, as --load"
    yield Problem(option, str(found.path), why, fix, "base", ("load", "load_dir"), found.base["path"])


class TrainedAdapter:
    """The adapters in a checkpoint, for their `base`. ProblemError if they were trained on another."""

    notes: tuple[str, ...] = ()

    def __init__(self, found: CheckpointSource, base: Source):
        raise_all(check_base(base, found, "--lora-load"))
        self._whole = frozenset(found.spec.shapes()).intersection(found.names())
        self._view = found.view
        self._read = cache(found.tensor)
        self._adapted = defaultdict[str, dict[str, LowRankConfig]](dict)
        for path, name, config in found.spec.config.adapted():
            self._adapted[f"{path}.weight"][name] = config

    def changes(self, name: str) -> tuple[Op, Sequence[Change | None]] | None:
        if name not in self._whole and name not in self._adapted:
            return None

        def change(view: View, dtype: torch.dtype) -> View:
            whole = self._view(name) if name in self._whole else view
            return Leaf(view.shape, lambda index: self._sum(name, whole, index).to(dtype))

        return IDENTITY, [change]

    def _sum(self, name: str, base: View, index: Index) -> Tensor:
        """A slice of a parameter with the adapters of it, in float32."""
        total = torch.empty([cut.stop - cut.start for cut in index])
        total.copy_(base.read(index))
        path, stacked = name.removesuffix(".weight"), ".experts." in name
        for part, config in self._adapted.get(name, {}).items():
            a, b = (self._read(f"{path}.adapters.{part}.{factor}") for factor in "ab")
            rows, place = list(index[:-1]), [slice(None)] * (len(index) - 1)
            if (cut := slice_of(path, part)) is not None:
                dim = stacked + cut.dim
                start, stop, _ = slice(cut.start, cut.stop).indices(base.shape[dim])
                low, high = max(rows[dim].start, start), min(rows[dim].stop, stop)
                if low >= high:
                    continue
                place[dim] = slice(low - rows[dim].start, high - rows[dim].start)
                rows[dim] = slice(low - start, high - start)
            b, a = b[tuple(rows)], a[(*rows[:stacked], slice(None), index[-1])]
            product = b.flatten(1 if stacked else 0, -2) @ a
            total[tuple(place)] += config.scale * product.view(*b.shape[:-1], -1)
        return total
