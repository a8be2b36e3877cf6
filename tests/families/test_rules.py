"""Weight rules: invertible, sliceable, and equal to what NumPy-style indexing by hand gives."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cordee.families.count import canonical_shapes
from cordee.families.registry import families, spec_from_preset
from cordee.model.config import AttentionConfig, LatentAttentionConfig, MLPConfig, ModelConfig, MoEConfig
from cordee.tensors.rules import TRANSPOSE, Rule, grouped_qkv, packed_qkv, rotary_halves, separate_qkv, stack
from cordee.tensors.views import Chain, Each, Join, Leaf, Rearrange, Split

size = st.integers(1, 4)


def counted(*shape: int) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


@st.composite
def index_of(draw, shape):
    cuts = []
    for length in shape:
        start = draw(st.integers(0, length))
        cuts.append(slice(start, draw(st.integers(start, length))))
    return tuple(cuts)


@st.composite
def smaller(draw, config: ModelConfig) -> ModelConfig:
    """`config` with the first and the last of its layers, random small sizes, and biases wherever there can be some."""
    layers = [
        replace(layer, attention=draw(smaller_attention(layer.attention)), mlp=draw(smaller_mlp(layer.mlp)))
        for layer in (config.layers[0], config.layers[-1])
    ]
    sizes = {name: draw(size) for name in ("vocab_size", "hidden_size", "max_position_embeddings")}
    return replace(config, layers=tuple(layers), **sizes)


@st.composite
def smaller_attention(draw, config: AttentionConfig | LatentAttentionConfig):
    if isinstance(config, LatentAttentionConfig):
        names = ["num_heads", "kv_lora_rank", "nope_head_dim", "v_head_dim"] + ["q_lora_rank"] * bool(
            config.q_lora_rank
        )
        return replace(config, **{name: draw(size) for name in names}, rope_head_dim=2 * draw(size), bias=True)
    groups, head_dim, rope = draw(size), 2 * draw(size), config.rope
    heads = groups * (1 if config.num_heads == config.num_kv_heads else draw(size))
    if rope is not None and rope.rotary_dim is not None:
        rope = replace(rope, rotary_dim=2 * draw(st.integers(1, head_dim // 2)))
    sizes = {"num_heads": heads, "num_kv_heads": groups, "head_dim": head_dim}
    return replace(config, **sizes, rope=rope, qkv_bias=True, out_bias=True)


@st.composite
def smaller_mlp(draw, config: MLPConfig | MoEConfig):
    if isinstance(config, MLPConfig):
        return replace(config, ffn_hidden_size=draw(size), bias=True)
    router = replace(config.router, num_experts=draw(size), top_k=1)
    shared = config.shared and draw(smaller_mlp(config.shared))
    return replace(config, router=router, expert=draw(smaller_mlp(config.expert)), shared=shared)


every_family = pytest.mark.parametrize("name", [name for name, family in families().items() if family.presets])


@pytest.mark.slow
@every_family
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_every_rule_of_every_family_inverts_and_slices(name, data):
    check_rules(name, data)


@pytest.mark.slow
@pytest.mark.exhaustive
@every_family
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_every_rule_of_every_family_inverts_and_slices_in_many_models(name, data):
    check_rules(name, data)


def check_rules(name, data):
    family = families()[name]
    preset = data.draw(st.sampled_from(sorted(family.presets)))
    config = data.draw(smaller(spec_from_preset(preset).config))
    rules = {rule.canonical: rule for rule in family.weights(config)}
    shapes = {name: shape for name, shape in canonical_shapes(config).items() if name in rules}
    for name, shape in shapes.items():
        rule, canonical = rules[name], counted(*shape)
        foreign = rule.inverse(canonical)
        assert [tuple(tensor.shape) for tensor in foreign] == rule.foreign_shapes(shape)
        assert rule.canonical_shape([tuple(tensor.shape) for tensor in foreign]) == shape
        assert torch.equal(rule.forward(foreign), canonical)
        held = dict(zip(rule.foreign, foreign, strict=True))
        index = data.draw(index_of(shape))
        assert torch.equal(rule.read(lambda n, i, held=held: held[n][i], shape, index), canonical[index])


# One example of every layout that published families use, with its canonical form made by hand.


def split_qkv(tensors, groups, per_group, dim):
    q, k, v = tensors
    rows = []
    for g in range(groups):
        rows += [q[(g * per_group + r) * dim :][:dim] for r in range(per_group)]
        rows += [k[g * dim :][:dim], v[g * dim :][:dim]]
    return torch.stack(rows).reshape(groups, per_group + 2, dim, -1)


def qkv_parts():
    return [counted(24, 3), counted(8, 3) + 1000, counted(8, 3) + 2000]  # 2 groups, 3 q heads each, head dim 4


def interleaved_columns():
    """gpt_oss: experts [E, in, 2 * ffn] with gate and up in turns."""
    foreign = counted(2, 3, 8)
    op = Rearrange("e i (f two) -> e two f i", {"two": 2})
    return op, [foreign], torch.stack([foreign[..., 0::2], foreign[..., 1::2]], 1).mT


def rope_halves():
    """Neighbouring pairs of a head's dims to halves."""
    foreign = counted(2 * 6, 5)
    op = Rearrange("(n half two) h -> n (two half) h", {"n": 2, "two": 2})
    return op, [foreign], foreign.reshape(2, 6, 5)[:, [0, 2, 4, 1, 3, 5]]


def partial_rope_halves():
    """Only the first half of each head is rotary: the rest keeps its place."""
    foreign = counted(2 * 8, 5)
    halves = foreign.reshape(2, 8, 5)[:, [0, 2, 1, 3, 4, 5, 6, 7]]
    return rotary_halves(8, 4), [foreign], halves.reshape(16, 5)


def experts():
    """One gate and one up matrix a file entry, for each of three experts, to [experts, 2, ffn, hidden]."""
    foreign = [counted(4, 5) + 100 * i for i in range(6)]
    pair = Chain((Each((Rearrange("f h -> 1 1 f h"),) * 2), Join(1, (1, 1))))
    return Chain((Each((pair,) * 3), Join(0, (1, 1, 1)))), foreign, torch.stack(foreign).reshape(3, 2, 4, 5)


def up_before_gate():
    """Fused [up; gate] in the other order."""
    foreign = counted(8, 3)
    op = Chain((Split(0, (4, 4)), Swap(), stack(2)))
    return op, [foreign], torch.stack([foreign[4:], foreign[:4]])


class Swap:
    """Two tensors in the other order: an operation that a family may bring along."""

    inputs = 2

    @property
    def inverse(self):
        return self

    def apply(self, views):
        return list(reversed(views))


LAYOUTS = {
    "separate": lambda: (separate_qkv(2, 3, 4), qkv_parts(), split_qkv(qkv_parts(), 2, 3, 4)),
    "packed": lambda: (packed_qkv(2, 3, 4), [torch.cat(qkv_parts())], split_qkv(qkv_parts(), 2, 3, 4)),
    "packed transposed": lambda: (
        Chain((TRANSPOSE, packed_qkv(2, 3, 4))),
        [torch.cat(qkv_parts()).T],
        split_qkv(qkv_parts(), 2, 3, 4),
    ),
    "grouped": lambda: (grouped_qkv(2, 3, 4), [counted(40, 3)], counted(40, 3).reshape(2, 5, 4, 3)),
    "gate and up": lambda: (
        stack(2),
        [counted(4, 3), counted(4, 3) + 50],
        torch.stack([counted(4, 3), counted(4, 3) + 50]),
    ),
    "fused gate_up": lambda: (
        Rearrange("(two f) h -> two f h", {"two": 2}),
        [counted(8, 3)],
        counted(8, 3).reshape(2, 4, 3),
    ),
    "up before gate": up_before_gate,
    "interleaved columns": interleaved_columns,
    "rope halves": rope_halves,
    "partial rope halves": partial_rope_halves,
    "experts": experts,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_the_one_made_by_hand(layout):
    op, foreign, canonical = LAYOUTS[layout]()
    rule = Rule("x", tuple(f"f{i}" for i in range(len(foreign))), op)
    assert torch.equal(rule.forward(foreign), canonical)
    assert all(torch.equal(a, b) for a, b in zip(rule.inverse(canonical), foreign, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_slices_of_a_layout_are_slices_of_the_whole(layout, data):
    op, foreign, canonical = LAYOUTS[layout]()
    rule = Rule("x", tuple(f"f{i}" for i in range(len(foreign))), op)
    held = dict(zip(rule.foreign, foreign, strict=True))
    index = data.draw(index_of(canonical.shape))
    view = rule.view(lambda name, cut: held[name][cut], tuple(canonical.shape))
    assert torch.equal(view.read(index), canonical[index])
    out = torch.full_like(canonical[index], -1)
    view.read_into(out, index)
    assert torch.equal(out, canonical[index])
    leaf = Leaf(tuple(canonical.shape), lambda cut: canonical[cut])
    cut = data.draw(index_of(foreign[0].shape))
    assert torch.equal(rule.foreign_views(leaf)["f0"].read(cut), foreign[0][cut])


class Meter:
    """Counts the elements read of each foreign tensor."""

    def __init__(self, rule, tensors):
        self.tensors = dict(zip(rule.foreign, tensors, strict=True))
        self.read: dict[str, int] = {}

    def get(self, name, index):
        part = self.tensors[name][index]
        self.read[name] = self.read.get(name, 0) + part.numel()
        return part


@pytest.mark.parametrize(
    ("layout", "dim"),
    [
        ("separate", 0),
        ("separate", 3),
        ("packed", 0),
        ("packed", 3),
        ("packed transposed", 0),
        ("packed transposed", 3),
        ("grouped", 0),
        ("gate and up", 1),
        ("gate and up", 2),
        ("interleaved columns", 0),
        ("interleaved columns", 2),
        ("experts", 0),
        ("experts", 2),
        ("experts", 3),
    ],
)
def test_a_shard_reads_no_more_than_itself(layout, dim):
    op, foreign, canonical = LAYOUTS[layout]()
    rule = Rule("x", tuple(f"f{i}" for i in range(len(foreign))), op)
    meter = Meter(rule, foreign)
    index = tuple(slice(0, 1) if d == dim else slice(None) for d in range(canonical.ndim))
    part = rule.read(meter.get, tuple(canonical.shape), index)
    assert torch.equal(part, canonical[index])
    assert sum(meter.read.values()) == part.numel()


def test_a_slice_of_one_slot_reads_only_that_tensor():
    op, foreign, canonical = LAYOUTS["separate"]()
    rule = Rule("x", ("q", "k", "v"), op)
    meter = Meter(rule, foreign)
    rule.read(meter.get, tuple(canonical.shape), (slice(None), slice(3, 4)))
    assert meter.read == {"k": foreign[1].numel()}


def test_reading_into_a_buffer_holds_one_foreign_tensor_at_a_time():
    """Parts go straight to their place: nothing of the size of the whole is built on the way."""
    op, foreign, canonical = LAYOUTS["experts"]()
    rule = Rule("x", tuple(f"f{i}" for i in range(6)), op)
    largest = 0

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            nonlocal largest
            result = super().__torch_function__(function, types, args, kwargs or {})
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    held = {name: tensor.as_subclass(Watched) for name, tensor in zip(rule.foreign, foreign, strict=True)}
    view = rule.view(lambda name, cut: held[name][cut], tuple(canonical.shape))
    out = torch.empty_like(canonical)
    view.read_into(out, tuple(slice(0, n) for n in canonical.shape))
    assert torch.equal(out, canonical)
    assert largest == foreign[0].numel()


def test_shapes_that_do_not_fit_are_refused():
    rule = Rule("x", ("q", "k", "v"), separate_qkv(2, 3, 4))
    with pytest.raises(AssertionError):
        rule.canonical_shape([(24, 3), (8, 3), (12, 3)])
    with pytest.raises(AssertionError):
        rule.foreign_shapes((2, 4, 4, 3))


def test_a_rule_needs_as_many_names_as_its_operation_takes():
    with pytest.raises(AssertionError):
        Rule("x", ("q", "k"), separate_qkv(2, 3, 4))
