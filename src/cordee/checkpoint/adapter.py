"""Adapters beside their base: checkpoints of runs that trained nothing else, and others that go into a model.

Owns which base such a checkpoint belongs to, the sum of the two, and of which kind an adapter is."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cordee.checkpoint import formats, source
from cordee.checkpoint.source import CheckpointSource
from cordee.checkpoint.storage import Location, location_of, reached
from cordee.errors import Problem, ProblemError, Problems, raise_all
from cordee.families.registry import ModelSpec
from cordee.tensors.rules import IDENTITY
from cordee.tensors.views import Index, Leaf, Op, View
from cordee.tune import lora
from cordee.tune.options import AdapterOptions
from cordee.weights import peft
from cordee.weights.adapter import Adapter, Change, Given, Merged, fingerprint
from cordee.weights.codec import Source
from cordee.weights.megatron import adapter as megatron
from cordee.weights.megatron.source import MegatronSource
from cordee.weights.peft_parameters import factors, lengths


def read(load: str, options: AdapterOptions, path: str | None) -> Source:
    """The weights at `load`, the adapter at `path`, of which options may say something, merged into them."""
    base = formats.read(load)
    return base if path is None else Merged(base, adapter_of(base, path, options))


def adapter_of(base: Source, path: str, options: AdapterOptions) -> Adapter:
    """The adapter at `path`. ProblemError if there is none, `base` cannot take it, or options say something else."""
    given = Given(path=Path(path), r=options.lora_r, alpha=options.lora_alpha, modules=options.lora_target_modules)
    if peft.is_adapter(given.path):
        return peft.read(given, base.spec)
    with reached("--lora-load", path):
        form = formats.find(location := location_of(path, "--lora-load"))
        found = source.read(location) if form is not None and form.name == "cordee" else None
    if found is not None and found.base is not None:
        raise_all(lora.check_stated(found.spec, options))
        return TrainedAdapter(found, base)
    if form is None or form.name != "mg":
        why = "it is neither PEFT's (no adapter_config.json), nor a checkpoint of adapters of a run or of Megatron"
        raise ProblemError.of("--lora-load", path, why, "give the directory of an adapter", "unknown")
    if not isinstance(base, MegatronSource):
        why = "it has Megatron's names, and what it is to be merged into is no Megatron checkpoint"
        fix = "give the Megatron checkpoint that it was trained on as --load-dir"
        raise ProblemError.of("--lora-load", path, why, fix, "base", ("load_dir",))
    return megatron.read(given, base.spec, base.dialect)


def check_base(base: Source, manifest: Mapping[str, Any], where: Location, option: str) -> Problems:
    """Whether the adapters of a checkpoint were trained on `base`."""
    trained, kept = ModelSpec.from_dict(manifest["model"]), manifest["base"]
    ours, theirs = (each.with_heads(score=False, lm_head=False).shapes() for each in (base.spec, trained))
    if ours != theirs or fingerprint(base) != kept["fingerprint"]:
        why, path = "its adapters were trained on other weights than those of the base", kept["path"]
        yield Problem(option, str(where), why, f"give --load {path}", "base", ("load", "load_dir"), path)


class TrainedAdapter(Adapter):
    """The adapters in a checkpoint, for their `base`. ProblemError if they were trained on another."""

    def __init__(self, found: CheckpointSource, base: Source):
        raise_all(check_base(base, found.manifest, found.path, "--lora-load"))
        self._source, self._shapes, self._own, self.heads = found, found.spec.shapes(), set(found.names()), found
        self.prefixes = {name: found.view(name) for name in found.names() if name.endswith(".prefix")}
        self._adapted = {f"{path}.weight" for path, _, _ in found.spec.config.adapted()}
        self._factors = cache(lambda name: list(factors(found.spec.config, name, self._shapes[name], found.tensor)))

    def changes(self, name: str) -> tuple[Op, Sequence[Change | None]] | None:
        if name not in self._own and name not in self._adapted:
            return None

        def change(view: View, dtype: torch.dtype) -> View:
            whole = self._source.view(name) if name in self._own else view
            return Leaf(view.shape, lambda index: self._sum(name, whole, index).to(dtype))

        return IDENTITY, [change]

    def _sum(self, name: str, base: View, index: Index) -> Tensor:
        """A slice of a parameter with the adapters of it, in float32."""
        stacked, columns, path = ".experts." in name, index[-1], name.removesuffix(".weight")
        parts = list(self._factors(name))
        if dora := any(config.dora for _, config, _, _ in parts):
            index = (*index[:-1], slice(0, base.shape[-1]))  # lengths are of whole rows
        total = torch.empty([cut.stop - cut.start for cut in index]).copy_(base.read(index))
        for _, config, a, b in parts:
            a, b = a[(*index[:stacked], slice(None), index[-1])], b[index[:-1]]
            total += config.scale * (b.flatten(1 if stacked else 0, -2) @ a).view_as(total)
        if dora:
            stretch = lengths(self._source.spec.config, path, base.shape, self._source.tensor)[index[:-1]]
            total *= torch.where(stretch.isnan(), 1.0, stretch / total.norm(dim=-1))[..., None]
            total = total[..., columns]
        return total
