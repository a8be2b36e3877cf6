"""Low-rank adapters by canonical name as adapters of the PEFT library, and back.

Owns which module of a family's checkpoint holds which slice of a projection, and the matrices A and B of both sides: a
canonical B is laid out as the weight that it belongs to, so the rule of that weight brings it there and back. What may
stand in PEFT's files is `peft.py`'s affair.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cordee.errors import Problem, ProblemError, Problems
from cordee.families.registry import ModelSpec
from cordee.model.config import SLICES, LowRankConfig, slice_of
from cordee.tensors.rules import Rule, shapes_made
from cordee.tensors.views import Index, Leaf, Shape, View, whole
from cordee.weights.codec import Sink, Source
from cordee.weights.peft import CONFIG, FILES, PREFIX, PeftAdapter
from cordee.weights.staged_sink import Output
from cordee.weights.staging import TOKENIZER, Staging

TENSORS = next(iter(FILES))  # what is written


@dataclass(frozen=True)
class Held:
    """What the weight of the module `foreign` of a checkpoint holds of the projection `path`.

    name: the slice, or the projection's own name: all of it. expert: which one's, None of a single weight.
    number: the place of its tensor in the rule of the projection's weight. transposed: it is `[in, out]`.
    matrix: it is one, and no stack of experts, whose adapters have no names in PEFT's files.
    """

    foreign: str
    path: str
    name: str
    number: int
    expert: int | None
    transposed: bool
    matrix: bool

    @property
    def full(self) -> str:
        parent, dot, _ = self.path.rpartition(".")
        return f"{parent}{dot}{self.name}"


def held(spec: ModelSpec) -> Iterator[Held]:
    """The modules of a checkpoint that are projections, or parts of them."""
    rules, shapes = spec.rules(), spec.shapes()
    alike: dict[object, list[Held]] = {}  # layers of one form are looked at once
    for path in dict.fromkeys(path for path, _, _ in spec.config.projections()):
        if (rule := rules.get(f"{path}.weight")) is None:
            continue  # a tied head
        _, number, part = path.split(".", 2) if path.startswith("layers.") else ("", "", path)
        key = (part, spec.config.layers[int(number)] if number else None)
        if key not in alike:
            alike[key] = list(_held(rule, shapes[rule.canonical], path))
        for each in alike[key]:
            yield replace(each, path=path, foreign=rule.foreign[each.number].removesuffix(".weight"))


def _held(rule: Rule, shape: Shape, path: str) -> Iterator[Held]:
    leaf, stacked = path.rpartition(".")[2], ".experts." in path
    without_input = shapes_made(rule.op.inverse, [(*shape[:-1], 0)])
    for number, foreign in enumerate(rule.foreign_shapes(shape)):
        box, name = _box(rule, number, shape), leaf
        for part, cut in SLICES.get(leaf, {}).items():
            dim = stacked + cut.dim
            if (box[dim].start, box[dim].stop) == slice(cut.start, cut.stop).indices(shape[dim])[:2]:
                name = part
        matrix = len(foreign) == 2
        expert = box[0].start if stacked and matrix else None
        yield Held("", path, name, number, expert, without_input[number][0] == 0, matrix)


def _box(rule: Rule, number: int, shape: Shape) -> Index:
    """The smallest box of a canonical tensor that the `number`-th tensor of a checkpoint is read from."""
    read: list[Index] = []

    def note(index: Index) -> Tensor:
        read.append(index)
        return torch.empty([cut.stop - cut.start for cut in index], device="meta")

    view = rule.op.inverse.apply([Leaf(shape, note)])[number]
    view.read(whole(view.shape))
    dims = zip(*read, strict=True)
    return tuple(slice(min(cut.start for cut in cuts), max(cut.stop for cut in cuts)) for cuts in dims)


def compressed(known: Iterable[str], chosen: Iterable[str]) -> tuple[str, ...]:
    """The names that are `chosen` of those that are `known`, by their ends where these are chosen in every layer."""
    ends: dict[str, list[str]] = defaultdict(list)
    for name in known:
        ends[name.split(".", 2)[2] if name.startswith("layers.") else name].append(name)
    picked = set(chosen)
    parts = ([end] if picked.issuperset(names) else sorted(picked.intersection(names)) for end, names in ends.items())
    return tuple(name for part in parts for name in part)


def region_of(path: str, name: str, dims: int) -> Index:
    """Where slice `name` is in a tensor of so many `dims` that is laid out as the weight of the projection `path`."""
    region = [slice(None)] * dims
    if (cut := slice_of(path, name)) is not None:
        region[cut.dim + (".experts." in path)] = slice(cut.start, cut.stop)
    return tuple(region)


# ---- out of PEFT's files -----------------------------------------------------------------------------------------------


class HeldAdapter(Source):
    """Adapters in memory. `spec` is the model with them; `names` are those of the adapters alone."""

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor]):
        self.spec = spec
        self._tensors = tensors
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def view(self, name: str) -> View:
        return Leaf(self._shapes[name], lambda index: self._tensors[name][index])


def from_peft(adapter: PeftAdapter, spec: ModelSpec) -> HeldAdapter:
    """An adapter as parameters of the model that it makes of the base `spec`. ProblemError if it makes none."""
    rules, shapes, members = spec.rules(), spec.shapes(), defaultdict[tuple[str, str], list[Held]](list)
    for place in held(spec):
        members[place.path, place.name].append(place)
    tensors: dict[str, Tensor] = {}
    kinds = defaultdict[tuple[int, float], list[str]](list)
    left = set(adapter.low_ranks)  # what is no projection, or an expert without the others
    for (path, name), places in members.items():
        weights = [f"{place.foreign}.weight" for place in places]
        forms = {(each.r, each.scale) for weight in weights if (each := adapter.low_ranks.get(weight))}
        if len(forms) != 1 or not left.issuperset(weights):
            continue
        left.difference_update(weights)
        (form,) = forms
        kinds[form].append(places[0].full)
        rule, shape = rules[f"{path}.weight"], shapes[f"{path}.weight"]
        parts = [torch.zeros(part) for part in rule.foreign_shapes((*shape[:-1], form[0]))]
        inputs = []
        for place, weight in zip(places, weights, strict=True):
            a, b = adapter.matrices(weight)
            inputs.append(a)
            parts[place.number] = b.t() if place.transposed else b
        b, start = rule.forward(parts), f"{path}.adapters.{name}"
        tensors[f"{start}.a"] = inputs[0] if places[0].expert is None else torch.stack(inputs)
        tensors[f"{start}.b"] = b[region_of(path, name, b.ndim)].contiguous()
    chosen = {name for name, rule in rules.items() if adapter.whole.intersection(rule.foreign)}
    modules = {name.rpartition(".")[0] for name in chosen}
    left |= {
        name
        for name in rules
        if name.rpartition(".")[0] in modules and not adapter.whole.issuperset(rules[name].foreign)
    }
    if left:
        why = f"in training these take no adapter, or not without others beside them: {', '.join(sorted(left)[:3])}"
        fix = "merge it into the base: cordee convert --lora-load"
        raise ProblemError([Problem("--lora-load", str(adapter.path), why, fix, "unsupported", limit=sorted(left))])
    known = [full for _, _, full in spec.config.projections()]
    low_rank = tuple(
        LowRankConfig(targets=compressed(known, names), rank=rank, scale=scale)
        for (rank, scale), names in kinds.items()
    )
    tuned = compressed(modules_of(rules), modules)
    return HeldAdapter(spec.adapted(low_rank, tuned), tensors)


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules of parameters."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


# ---- and into them -----------------------------------------------------------------------------------------------------


def check(spec: ModelSpec) -> Problems:
    """Whether PEFT has such adapters as those of `spec`."""
    stacks = {place.path for place in held(spec) if not place.matrix}
    for path in dict.fromkeys(path for path, _, _ in spec.config.adapted() if path in stacks):
        why = f"PEFT has no name for adapters of {path}, which is one stack of experts in the model's files"
        yield Problem("--save-model-type", "peft", why, "merge them: hf", "unsupported", limit=path)


def to_peft(spec: ModelSpec, read: Callable[[str], Tensor], base: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of the adapters of `spec`, whose parameters `read` gives by name, over the model at
    `base`. Slices of one module of the checkpoint become one adapter with the sum of their ranks."""
    rules, shapes, members = spec.rules(), spec.shapes(), defaultdict[str, list[Held]](list)
    for place in held(spec):
        members[place.path].append(place)
    pieces = defaultdict[Held, list[tuple[Tensor, Tensor, float]]](list)
    for path, name, config in spec.config.adapted():
        a, leaf = read(f"{path}.adapters.{name}.a"), path.rpartition(".")[2]
        b = torch.zeros(*shapes[f"{path}.weight"][:-1], config.rank)
        b[region_of(path, name, b.ndim)] = read(f"{path}.adapters.{name}.b")
        parts = rules[f"{path}.weight"].inverse(b)
        for place in members[path]:
            if name in (leaf, place.name) or place.name == leaf:
                part = parts[place.number]
                own = a if place.expert is None else a[place.expert]
                pieces[place].append((own, part.t() if place.transposed else part, config.scale))
    tensors, forms = {}, {}
    for place, found in pieces.items():
        scale = found[0][2]
        a = torch.cat([a for a, _, _ in found])
        b = torch.cat([b * (own / scale) for _, b, own in found], 1)
        if place.path == "embedding":
            factors = {"lora_embedding_A": b.t(), "lora_embedding_B": a.t()}
        else:
            factors = {"lora_A.weight": a, "lora_B.weight": b}
        tensors |= {f"{PREFIX}{place.foreign}.{factor}": value.contiguous() for factor, value in factors.items()}
        forms[place.foreign] = len(a), scale * len(a)
    modules: list[str] = []
    for rule in (rule for name, rule in rules.items() if spec.config.tunes(name)):
        tensors |= {
            PREFIX + name: part.contiguous()
            for name, part in zip(rule.foreign, rule.inverse(read(rule.canonical)), strict=True)
        }
        modules += modules_of(rule.foreign)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "fan_in_fan_out": any(place.transposed for place in pieces),
        "lora_dropout": max((each.dropout for each in spec.config.low_rank), default=0.0),
        "modules_to_save": list(dict.fromkeys(modules)) or None,
        "inference_mode": True,
        **_targets(forms, [place.foreign for places in members.values() for place in places]),
    }
    return tensors, settings


class PeftSink(Sink):
    """A directory of PEFT in the making, with the adapters of `spec` over the model at `base`."""

    def __init__(self, output: Output, spec: ModelSpec, base: str, dtypes: Mapping[str, torch.dtype]):
        self._output, self._spec, self._base, self._dtypes = output, spec, base, dtypes
        self._tensors: dict[str, Tensor] = {}
        self._staging = Staging(output.path, overwrite=output.overwrite)

    def take(self, name: str, view: View) -> None:
        self._tensors[name] = view.read(whole(view.shape)).to(self._dtypes[name])

    def close(self) -> None:
        tensors, settings = to_peft(self._spec, self._tensors.__getitem__, self._base)
        with self._staging.writing():
            save_file(tensors, self._staging.scratch / TENSORS, {"format": "pt"})
            self._staging.write_json(CONFIG, settings)
            self._staging.copy_assets(self._output.assets, TOKENIZER)
        self._staging.publish()

    def abort(self) -> None:
        self._staging.discard()


def _targets(forms: Mapping[str, tuple[int, float]], modules: Iterable[str]) -> dict[str, Any]:
    """Which modules have adapters, by what their names end with where all such have; rank and alpha of most, and those
    of the others."""
    leaves = {name.rpartition(".")[2] for name in forms}
    leaves -= {name.rpartition(".")[2] for name in modules if name not in forms}
    targets = {leaf if (leaf := name.rpartition(".")[2]) in leaves else name for name in forms}
    (r, alpha), _ = Counter(forms.values()).most_common(1)[0] if forms else ((1, 1), 0)
    return {
        "target_modules": sorted(targets),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, (rank, _) in forms.items() if rank != r},
        "alpha_pattern": {name: own for name, (_, own) in forms.items() if own != alpha},
    }
