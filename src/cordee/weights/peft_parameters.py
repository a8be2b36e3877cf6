"""Low-rank adapters by canonical name as adapters of the PEFT library, and back.

Owns which module of a family's checkpoint holds which slice of a projection, and the matrices A and B of both sides: a
canonical B is laid out as the weight that it belongs to, so the rule of that weight brings it there and back. What may
stand in PEFT's files is `peft.py`'s affair."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from cordee.errors import ProblemError
from cordee.families.registry import ModelSpec
from cordee.model.config import SLICES, LowRankConfig, ModelConfig, slice_of
from cordee.tensors.rules import shapes_made
from cordee.tensors.views import Index, Leaf, Shape, View
from cordee.weights.adapter import SCORE, Merged
from cordee.weights.codec import Sink, Source, type_of
from cordee.weights.peft import CONFIG, FILES, LENGTHS, PREFIX, PeftAdapter, PeftPrefix, prefix_to_peft
from cordee.weights.staged_sink import Output
from cordee.weights.staging import TOKENIZER, Staging

TENSORS = next(iter(FILES))  # what is written
Read = Callable[[str], Tensor]  # of a parameter, by name


@dataclass(frozen=True)
class Held:
    """What the weight of the module `foreign` of a checkpoint holds of the projection `path`.

    name, full: the slice, or the projection itself: all of it. expert: which one's, None of a single weight or a stack.
    number: the place of its tensor in the rule of the projection's weight. transposed: it is `[in, out]`."""

    foreign: str
    path: str
    name: str
    number: int
    expert: int | None
    transposed: bool
    full: str


def held(spec: ModelSpec) -> Iterator[Held]:
    """The modules of a checkpoint that are projections, or parts of them."""
    rules, shapes = spec.rules(), spec.shapes()
    for path in dict.fromkeys(path for path, _, _ in spec.config.projections()):
        if (rule := rules.get(f"{path}.weight")) is not None:  # a tied head has none
            leaf, shape = path.rpartition(".")[2], shapes[rule.canonical]
            of_expert = ".experts." in path and len(rule.foreign_shapes(shape)[0]) == 2
            count = len(rule.foreign) // (shape[0] if of_expert else 1)
            names = [*SLICES[leaf]] if count > 1 else [leaf]  # rules take parts in this order
            without_input = shapes_made(rule.op.inverse, [(*shape[:-1], 0)])
            for number, foreign in enumerate(rule.foreign):
                expert, transposed = number // count if of_expert else None, without_input[number][0] == 0
                module, name = foreign.removesuffix(".weight"), names[number % count]
                yield Held(module, path, name, number, expert, transposed, f"{path.removesuffix(leaf)}{name}")


def compressed(known: Iterable[str], chosen: Iterable[str]) -> tuple[str, ...]:
    """The names that are `chosen` of those that are `known`, by their ends where these are chosen in every layer."""
    ends: dict[str, list[str]] = defaultdict(list)
    for name in known:
        ends[name.split(".", 2)[2] if name.startswith("layers.") else name].append(name)
    picked = set(chosen)
    parts = ([end] if picked.issuperset(names) else sorted(picked.intersection(names)) for end, names in ends.items())
    return tuple(name for part in parts for name in part)


def modules_of(names: Iterable[str]) -> list[str]:
    """The modules of parameters."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in names))


def _region(path: str, name: str) -> Index:
    """Where slice `name` is in what is laid out as the weight of the projection `path`."""
    cut = slice_of(path, name)
    return () if cut is None else (slice(None),) * (cut.dim + (".experts." in path)) + (slice(cut.start, cut.stop),)


def factors(
    model: ModelConfig, weight: str, shape: Shape, read: Read
) -> Iterator[tuple[str, LowRankConfig, Tensor, Tensor]]:
    """The adapters of a `weight` of this shape: slice, form, A, and B with zeros for what is not of the slice."""
    path = weight.removesuffix(".weight")
    for name, config in ((name, config) for of, name, config in model.adapted() if of == path):
        b = torch.zeros(*shape[:-1], config.rank)
        b[_region(path, name)] = read(f"{path}.adapters.{name}.b")
        yield name, config, read(f"{path}.adapters.{name}.a"), b


def lengths(model: ModelConfig, path: str, shape: Shape, read: Read) -> Tensor:
    """Those of the rows of the weight of `path`, of this shape, that DoRA has; NaN for other rows."""
    found = torch.full(shape[:-1], torch.nan)
    for name in (name for of, name, config in model.adapted() if of == path and config.dora):
        found[_region(path, name)] = read(f"{path}.adapters.{name}.m")
    return found


class LoadedAdapter(Source):
    """The model `spec`: `views` of adapters, and of what was trained as a whole beside them, and its `base`."""

    def __init__(self, spec: ModelSpec, base: Source, views: Mapping[str, View]):
        self.spec, self.notes, self._base, self._views = spec, base.notes, base, views
        self._shapes = spec.shapes() | {name: view.shape for name, view in views.items()}

    def dtype(self, name: str) -> torch.dtype:
        return type_of(self.view(name))

    def view(self, name: str) -> View:
        return self._views.get(name) or self._base.view(name)


def from_peft(adapter: PeftAdapter | PeftPrefix, base: Source) -> LoadedAdapter:
    """The model that an adapter makes of `base`, with parameters of its own. ProblemError if it makes none."""
    if isinstance(adapter, PeftPrefix):
        return LoadedAdapter(Merged(base, adapter).spec, base, adapter.prefixes)
    spec = replace(base.spec, base_prefix=True)  # PEFT names modules as they are in a model, whatever files have
    rules, shapes, views = spec.rules(), spec.shapes(), dict[str, View]()
    kinds = defaultdict[tuple[int, float, bool], list[str]](list)
    members = defaultdict[tuple[str, str], list[Held]](list)
    for place in held(spec):
        members[place.path, place.name].append(place)
    left = set(adapter.low_ranks)  # those of no projection, or of an expert without the others
    for (path, name), places in members.items():
        weights = [f"{place.foreign}.weight" for place in places]
        found = [each for weight in weights if (each := adapter.low_ranks.get(weight))]
        forms = {(each.r, each.scale, each.m is not None) for each in found}
        if len(forms) == 1 and left.issuperset(weights):
            left.difference_update(weights)
            ((rank, scale, dora),) = forms
            kinds[rank, scale, dora].append(places[0].full)
            rule, shape = rules[f"{path}.weight"], shapes[f"{path}.weight"]
            parts, inputs = [torch.zeros(part) for part in rule.foreign_shapes((*shape[:-1], rank))], []
            for place, weight in zip(places, weights, strict=True):
                a, b = adapter.matrices(weight)
                inputs.append(a)
                parts[place.number] = b.t() if place.transposed else b
            a = inputs[0] if places[0].expert is None else torch.stack(inputs)
            named = {"a": a, "b": rule.forward(parts)[_region(path, name)]}
            if dora:
                parts = [torch.zeros(part) for part in rule.foreign_shapes((*shape[:-1], 1))]
                for place, each in zip(places, found, strict=True):
                    assert each.m is not None
                    parts[place.number] = each.m[None] if place.transposed else each.m[:, None]
                named["m"] = rule.forward(parts)[_region(path, name)][..., 0]
            for factor, value in named.items():
                views[f"{path}.adapters.{name}.{factor}"] = Leaf(tuple(value.shape), value.__getitem__)
    modules = set(modules_of(name for name, rule in rules.items() if adapter.whole.keys() & {*rule.foreign}))
    for name, rule in rules.items():
        if name.rpartition(".")[0] in modules:
            left |= {*rule.foreign} - adapter.whole.keys()
            views[name] = rule.view(lambda key, index: adapter.file.read(adapter.whole[key], index), shapes[name])
    if left:
        why = f"in training these take no adapter, or not without others beside them: {', '.join(sorted(left)[:3])}"
        fix = "merge it into the base: cordee convert --lora-load"
        raise ProblemError.of("--lora-load", str(adapter.path), why, fix, "unsupported", limit=sorted(left))
    known = [full for _, _, full in spec.config.projections()]
    low_rank = (
        LowRankConfig(targets=compressed(known, of), rank=r, scale=s, dora=d) for (r, s, d), of in kinds.items()
    )
    return LoadedAdapter(base.spec.adapted(low_rank, compressed(modules_of(rules), modules)), base, views)


def to_peft(spec: ModelSpec, read: Read) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings of the adapters of `spec`, whose parameters `read` gives. Slices of a module become
    one adapter with the sum of their ranks. ProblemError if PEFT has no such ones."""
    if spec.config.num_prefix_tokens:
        return prefix_to_peft(spec, read)
    spec = replace(spec, base_prefix=True)
    rules, shapes, places = spec.rules(), spec.shapes(), defaultdict[str, list[Held]](list)
    for place in held(spec):
        places[place.path].append(place)
    pieces = defaultdict[Held, list[tuple[Tensor, Tensor, float]]](list)
    for path in dict.fromkeys(path for path, _, _ in spec.config.adapted()):
        leaf, shape = path.rpartition(".")[2], shapes[f"{path}.weight"]
        for name, config, a, b in factors(spec.config, f"{path}.weight", shape, read):
            parts = rules[f"{path}.weight"].inverse(b)
            for place in (each for each in places[path] if name in (leaf, each.name) or each.name == leaf):
                part = parts[place.number].t() if place.transposed else parts[place.number]
                pieces[place].append((a if place.expert is None else a[place.expert], part, config.scale))
    of_rows = dict[str, Tensor]()
    for place in pieces if any(each.dora for each in spec.config.low_rank) else ():
        weight = f"{place.path}.weight"
        rows = rules[weight].inverse(lengths(spec.config, place.path, shapes[weight], read)[..., None])[place.number]
        of_rows[f"{PREFIX}{place.foreign}.{LENGTHS}"] = rows.flatten()
    refused = [f"{name}, of some rows" for name, rows in of_rows.items() if rows.isnan().any()]
    refused += [f"{place.foreign}, a stack of experts" for place, found in pieces.items() if found[0][0].ndim > 2]
    if spec.config.tied_head and spec.config.tunes("embedding.weight"):
        refused.append("an embedding to which the head is tied")
    if refused:
        why = f"PEFT has no place for {refused[0]}"
        raise ProblemError.of("--save-model-type", "peft", why, "merge: --save-model-type hf", "unsupported")
    tensors, forms = of_rows, dict[str, tuple[int, float]]()
    for place, found in pieces.items():
        scale = found[0][2]
        a, b = torch.cat([a for a, _, _ in found]), torch.cat([b * (own / scale) for _, b, own in found], 1)
        named = {"lora_A.weight": a, "lora_B.weight": b}
        if place.path == "embedding":
            named = {"lora_embedding_A": b.t(), "lora_embedding_B": a.t()}
        tensors |= {f"{PREFIX}{place.foreign}.{factor}": value for factor, value in named.items()}
        forms[place.foreign] = len(a), scale * len(a)
    heads = set[str]() if spec.config.lm_head else {SCORE}  # the values of a policy are no part of a language model
    tuned = [rule for name, rule in rules.items() if spec.config.tunes(name) or name in heads]
    for rule in tuned:
        parts = zip(rule.foreign, rule.inverse(read(rule.canonical)), strict=True)
        tensors |= {f"{PREFIX}{name}": part for name, part in parts}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if spec.config.lm_head else "SEQ_CLS",
        "fan_in_fan_out": any(place.transposed for place in pieces),
        "lora_dropout": max((each.dropout for each in spec.config.low_rank), default=0.0),
        "modules_to_save": modules_of(name for rule in tuned for name in rule.foreign) or None,
        "use_dora": any(each.dora for each in spec.config.low_rank),
        "inference_mode": True,
        **_targets(forms, [place.foreign for several in places.values() for place in several]),
    }
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, settings


def _targets(forms: Mapping[str, tuple[int, float]], modules: Iterable[str]) -> dict[str, Any]:
    """Which modules have adapters, by what their names end with where all such have; rank and alpha of most, and those
    of the others."""
    others = {name.rpartition(".")[2] for name in modules if name not in forms}
    (r, alpha), _ = Counter(forms.values()).most_common(1)[0] if forms else ((1, 1), 0)
    return {
        "target_modules": sorted({name if (end := name.rpartition(".")[2]) in others else end for name in forms}),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: rank for name, (rank, _) in forms.items() if rank != r},
        "alpha_pattern": {name: own for name, (_, own) in forms.items() if own != alpha},
    }


class PeftSink(Sink):
    """A directory of PEFT in the making, of what `to_peft` has made; no more is taken."""

    def __init__(self, output: Output, tensors: dict[str, Tensor], settings: dict[str, Any]):
        self._output, self._tensors, self._settings = output, tensors, settings
        self._staging = Staging(output.path, overwrite=output.overwrite)

    def take(self, name: str, view: View) -> None: ...

    def close(self) -> None:
        with self._staging.writing():
            content = save(self._tensors, {"format": "pt"})  # save_file makes what only its owner may read
            (self._staging.scratch / TENSORS).write_bytes(content)
            self._staging.write_json(CONFIG, self._settings)
            self._staging.copy_assets(self._output.assets, TOKENIZER)
        self._staging.publish()

    def abort(self) -> None:
        self._staging.discard()
