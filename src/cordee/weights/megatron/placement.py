"""Where each canonical parameter is in a checkpoint of Megatron, and how it is laid out there.

Owns the split of parameters over tensor ranks, of layers over stages and of experts over expert ranks, as operations of
the rules' algebra: one description serves reading, writing and the check of shapes. Knows no file format."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from cordee.errors import Problem, raise_all
from cordee.families.registry import ModelSpec
from cordee.model.config import AttentionConfig, LatentAttentionConfig, LayerConfig, ModelConfig
from cordee.model.gpt import GPTModel
from cordee.model.parameter import parameter_specs
from cordee.model.shards import ALONG
from cordee.tensors.rules import GATE_UP, IDENTITY, grouped_qkv, rotary_halves, shapes_made, stack
from cordee.tensors.views import Chain, Each, Join, Op, Rearrange, Shape, View
from cordee.weights.megatron.dialect import Dialect
from cordee.weights.megatron.layout import Chunk, MegatronLayout, Rank
from cordee.weights.megatron.padding import Crop

Key = tuple[Rank, int, str]  # rank, chunk and name of a tensor in the files


@dataclass(frozen=True)
class Slot:
    """A tensor of a file, or its rows from `row` on."""

    rank: Rank
    virtual: int
    name: str
    row: int = 0

    @property
    def key(self) -> Key:
        return self.rank, self.virtual, self.name


@dataclass(frozen=True)
class Placement:
    """The tensors of files that make one canonical parameter of `shape`, in the order `op` takes them.

    Each tensor is in one slot or in several, of which all hold the same."""

    shape: Shape
    op: Op
    slots: tuple[tuple[Slot, ...], ...]

    def __post_init__(self) -> None:
        assert self.op.inputs == len(self.slots), f"{self.op.inputs} != {len(self.slots)}"

    def parts(self, canonical: View) -> list[View]:
        """What goes into each of `slots`."""
        return self.op.inverse.apply([canonical])

    @cached_property
    def part_shapes(self) -> list[Shape]:
        """Shape of what is in each of `slots`."""
        return shapes_made(self.op.inverse, [self.shape])

    def stored(self) -> Iterator[tuple[Shape, Slot]]:
        """Every slot and the shape of the part in it."""
        for shape, copies in zip(self.part_shapes, self.slots, strict=True):
            for slot in copies:
                yield shape, slot


def place(spec: ModelSpec, layout: MegatronLayout, dialect: Dialect, padded_vocab: int) -> dict[str, Placement]:
    """The placement of every parameter by canonical name. ProblemError if `dialect` has no place for some."""
    placer = _Placer(spec, layout, dialect, padded_vocab)
    raise_all(placer.problems())
    return {name: placer.place(name) for name in placer.shapes}


def tensors_of(placements: Mapping[str, Placement]) -> dict[Key, tuple[Shape, str]]:
    """Shape of every tensor of the files, and the parameter in it; of several the last."""
    found: dict[Key, tuple[Shape, str]] = {}
    for name, placement in placements.items():
        for shape, slot in placement.stored():
            rows = (slot.row + shape[0], *shape[1:]) if shape else shape
            before, _ = found.get(slot.key, (rows, name))
            found[slot.key] = max(before, rows), name
    return found


@dataclass(frozen=True)
class _Split:
    """How a parameter, or one expert's part of it, is made of the tensors of all tensor ranks.

    `local` makes one rank's part of its tensors, the parts are laid along `dim`, and `whole` gives them their form."""

    dim: int | None  # None: every rank has all of it
    local: Op = IDENTITY
    whole: Op = IDENTITY

    def owners(self, ranks: int) -> list[tuple[int, ...]]:
        """The tensor ranks that hold each part."""
        return [tuple(range(ranks))] if self.dim is None else [(rank,) for rank in range(ranks)]

    def op(self, shape: Shape, ranks: int) -> Op:
        if self.dim is None:
            return Chain((self.local, self.whole))
        (joined,) = shapes_made(self.whole.inverse, [shape])
        return Chain((Each((self.local,) * ranks), Join(self.dim, (joined[self.dim] // ranks,) * ranks), self.whole))


class _Placer:
    def __init__(self, spec: ModelSpec, layout: MegatronLayout, dialect: Dialect, padded_vocab: int):
        self.config: ModelConfig = spec.config
        self.layout = layout
        self.dialect = dialect
        self.padded_vocab = padded_vocab
        self.shapes = spec.shapes()
        specs = parameter_specs(GPTModel(spec.config, device="meta"))
        self.axes = {name: parameter.axes for name, parameter in specs.items()}

    def problems(self) -> Iterator[Problem]:
        title = self.dialect.title
        if nameless := [name for name in self.shapes if self._names(name) is None]:
            kinds = sorted({name.split(".", 2)[-1] if name.startswith("layers.") else name for name in nameless})
            why = f"it has no place for {', '.join(kinds)}"
            yield Problem("target", title, why, "choose another format", "inexpressible", limit=kinds)
        for trait in sorted({trait for layer in self.config.layers for trait in _inexpressible(layer)}):
            yield Problem("target", title, f"it cannot express {trait}", "choose another format", "inexpressible")
        latent = any(isinstance(layer.attention, LatentAttentionConfig) for layer in self.config.layers)
        if self.dialect.packed_latent and latent and self.layout.tensor > 1:
            why = f"{title} does not split latent attention over tensor ranks"
            fix = "take 1, or --transformer-impl local"
            yield Problem("--target-tensor-parallel-size", self.layout.tensor, why, fix, "at most", limit=1)
        grouped = self.dialect.experts == "grouped"
        if grouped and any("mlp.experts." in name and name.endswith(".bias") for name in self.shapes):
            why = "experts with biases cannot be stored in one tensor"
            yield Problem("--moe-grouped-gemm", None, why, "leave it out")

    def _names(self, name: str) -> tuple[str, ...] | None:
        if not name.startswith("layers."):
            return self.dialect.model_names(name)
        layer, tail = self._layer(name)
        return self.dialect.names_in_layer(tail, self.config.layers[layer], self.layout.place_of_layer(layer)[1])

    @staticmethod
    def _layer(name: str) -> tuple[int, str]:
        _, number, tail = name.split(".", 2)
        return int(number), tail

    def place(self, name: str) -> Placement:
        names = self._names(name)
        assert names is not None
        if name.startswith("layers."):
            layer, tail = self._layer(name)
            chunk, _ = self.layout.place_of_layer(layer)
            if tail.startswith("mlp.experts."):
                return self._place_experts(name, names, chunk, self.config.layers[layer])
            return self._place(name, tail, names, chunk, self.config.layers[layer])
        chunk = self.layout.last if name.startswith(("final_norm.", "head.")) else self.layout.first
        placement = self._place(name, name, names, chunk, None)
        if name == "embedding.weight" and self.config.tie_word_embeddings:
            return self._with_tied_head(placement)
        return placement

    def _place(
        self, name: str, tail: str, names: tuple[str, ...], chunk: Chunk, layer: LayerConfig | None
    ) -> Placement:
        """A parameter that all expert ranks have."""
        shape, axes = self.shapes[name], self.axes[name]
        split = self._split(tail, shape, axes, len(names), layer)
        row = self._first_row(tail, layer)
        slots = tuple(
            tuple(
                Slot(Rank(tensor, chunk.pipeline, expert), chunk.virtual, foreign, row)
                for tensor in ranks
                for expert in range(self.layout.expert)
            )
            for ranks in split.owners(self.layout.tensor)
            for foreign in names
        )
        return Placement(shape, split.op(shape, self.layout.tensor), slots)

    def _split(self, tail: str, shape: Shape, axes: tuple[str, ...], count: int, layer: LayerConfig | None) -> _Split:
        """How tensor ranks share a parameter of `shape` that is stored under `count` names on each."""
        split = _Split(next((dim for dim, axis in enumerate(axes) if ALONG.get(axis) == "tp"), None))
        if "vocab" in axes:
            return replace(split, whole=Crop(shape[0], self.padded_vocab, self.dialect.tail_padding))
        module = tail.rpartition(".")[0]
        if module.endswith("gate_up"):
            split = replace(split, local=GATE_UP if count == 1 else stack(2))
        if module.startswith("mlp.shared.") and not self.dialect.shared_split:
            split = replace(split, dim=None)
        if layer is not None and isinstance(layer.attention, LatentAttentionConfig):
            return self._split_latent(split, module, layer.attention)
        if layer is not None and module == "attention.qkv":
            attention = layer.attention
            assert isinstance(attention, AttentionConfig)
            return replace(split, whole=grouped_qkv(attention.num_kv_heads, attention.q_per_group, attention.head_dim))
        return split

    def _split_latent(self, split: _Split, module: str, config: LatentAttentionConfig) -> _Split:
        """Megatron's RoPE rotates neighbouring dims of queries and keys, as the published weights of DeepSeek do."""
        rope, nope, latent = config.rope_head_dim, config.nope_head_dim, config.kv_lora_rank
        heads = Rearrange("(n d) ... -> n d ...", {"n": config.num_heads})
        down = 0 if self.dialect.latent_split else None
        match module:
            case "attention.q" | "attention.q_up":
                return replace(split, whole=Chain((rotary_halves(nope + rope, rope, nope), heads)))
            case "attention.kv_up":
                return replace(split, whole=heads)
            case "attention.q_down":
                return replace(split, dim=down)
            case "attention.kv_down":
                return replace(split, dim=down, whole=rotary_halves(latent + rope, rope, latent))
        return split

    def _first_row(self, tail: str, layer: LayerConfig | None) -> int:
        """Where a parameter begins in a tensor that it shares with another."""
        if not (self.dialect.packed_latent and tail.startswith("attention.kv_down.") and layer is not None):
            return 0
        config = layer.attention
        assert isinstance(config, LatentAttentionConfig)
        return config.q_lora_rank or config.num_heads * (config.nope_head_dim + config.rope_head_dim)

    def _with_tied_head(self, placement: Placement) -> Placement:
        """The last stage has a copy of the embedding, unless it is also the first."""
        last = self.layout.last
        if last.pipeline == self.layout.first.pipeline:
            return placement
        name = self.dialect.tied_head
        slots = tuple(
            (*copies, *(Slot(replace(slot.rank, pipeline=last.pipeline), last.virtual, name) for slot in copies))
            for copies in placement.slots
        )
        return replace(placement, slots=slots)

    def _place_experts(self, name: str, names: tuple[str, ...], chunk: Chunk, layer: LayerConfig) -> Placement:
        if self.dialect.experts == "grouped":
            return self._place_grouped(name, names, chunk)
        shape, axes, tensor = self.shapes[name], self.axes[name], self.layout.tensor
        split = self._split(self._layer(name)[1], shape[1:], axes[1:], len(names), layer)
        one = Chain((split.op(shape[1:], tensor), Rearrange("... -> 1 ...")))
        slots = tuple(
            tuple(Slot(Rank(r, chunk.pipeline, home), chunk.virtual, foreign.replace("{e}", str(e))) for r in ranks)
            for home, e in (divmod(expert, shape[0] // self.layout.expert) for expert in range(shape[0]))
            for ranks in split.owners(tensor)
            for foreign in names
        )
        return Placement(shape, Chain((Each((one,) * shape[0]), Join(0, (1,) * shape[0]))), slots)

    def _place_grouped(self, name: str, names: tuple[str, ...], chunk: Chunk) -> Placement:
        """All experts of a rank in one tensor, inputs before outputs, each expert's values together.

        The tensor of gate and up says it is `[inputs, experts * outputs]`, though it is `[experts, inputs, outputs]`.
        """
        shape, tensor, expert = self.shapes[name], self.layout.tensor, self.layout.expert
        (foreign,) = names
        local, ffn = shape[0] // expert, self.axes[name].index("ffn")
        if foreign.endswith("weight2"):
            rank_op: Op = Rearrange("(e f) h -> e h f", {"e": local})
        else:
            sizes = {"e": local, "h": shape[-1], "b": math.prod(shape[1:-2])}
            form = "e b f h" if len(shape) == 4 else "e (b f) h"
            rank_op = Chain((Rearrange("h x -> (h x)", {"h": shape[-1]}), Rearrange(f"(e h b f) -> {form}", sizes)))
        joined = Chain((Each((rank_op,) * tensor), Join(ffn, (shape[ffn] // tensor,) * tensor)))
        op = Chain((Each((joined,) * expert), Join(0, (local,) * expert)))
        ranks = [Rank(rank, chunk.pipeline, home) for home in range(expert) for rank in range(tensor)]
        slots = tuple((Slot(rank, chunk.virtual, foreign),) for rank in ranks)
        return Placement(shape, op, slots)


def _inexpressible(layer: LayerConfig) -> Iterator[str]:
    """What Megatron has no layer for, though it would have names for the parameters."""
    if layer.norm_placement == "post":
        yield "norms that only follow attention and MLP"
    attention = layer.attention
    if isinstance(attention, AttentionConfig) and attention.qk_norm is not None and attention.qk_norm.over == "all":
        yield "norms over all heads together"
