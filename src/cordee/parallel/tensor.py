"""Tensor and sequence parallelism: matrices sharded over the ranks of an axis (Shoeybi et al. 2019; Korthikanti et al.
2022).

Options: `--tensor-model-parallel-size`, `--sequence-parallel` (options.py). Law: `laws.tensor`. Cost: `cost.py`.
Owns the collectives at the borders of blocks, and the views through which
the mathematics runs on local shards of parameters that `sharding.py` has made.

Between its borders a block computes another part of the work on every rank, from the same tokens: gradients of what
is replicated there (a norm of queries, a router) are parts of a sum. Outside of blocks all ranks do the same, unless
sequence parallelism gives each of them other tokens."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate

from cordee.model.attention import Attention
from cordee.model.gpt import GPTModel
from cordee.model.linear import Linear
from cordee.model.moe import MoE, StackedLinear
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import Placement, View, after, before
from cordee.model.shards import ALONG, part_of
from cordee.model.specs import ParameterSpec
from cordee.parallel import differentiable, sharding
from cordee.parallel.layout import Layout
from cordee.parallel.options import ParallelOptions

NAME = "tensor parallelism"


def apply(model: GPTModel, layout: Layout, options: ParallelOptions) -> None:
    """Let `model`, whose parameters are sharded already, compute its part on each tensor-parallel rank.

    Nothing happens where there is one."""
    sequence = options.sequence_parallel
    group = layout.group("tp")
    if group is None:
        return
    axis = _Axis(group, layout.axis_rank("tp"), layout.degrees.tp)
    _set_borders(model, axis, sequence)
    inside = {module for block in _blocks(model) for module in block.modules()}
    for module in model.modules():
        if isinstance(module, SpecifiedModule):
            _set_views(module, axis, summed=sequence or module in inside)


@dataclass(frozen=True)
class _Axis:
    """The tensor-parallel axis, seen from this rank."""

    group: ProcessGroup
    rank: int
    size: int


def _blocks(model: GPTModel) -> Iterator[nn.Module]:
    """The modules between borders."""
    for layer in model.own_layers():
        yield layer.attention
        yield layer.mlp
    if model.has_head:
        yield model.head
    if model.has_embedding:
        yield model.embedding  # every rank looks up its own rows


def _set_borders(model: GPTModel, axis: _Axis, sequence: bool) -> None:
    border = partial(_set_border, group=axis.group, sequence=sequence)
    if sequence:
        own_tokens = after(lambda positions: positions.chunk(axis.size, -1)[axis.rank])
        model.placement.wrap("outside_blocks", NAME, own_tokens, compiles=True)
    for layer in model.own_layers():
        border(layer.attention.placement)
        border(layer.mlp.placement)
        layer.attention.placement.set(NAME, first_head=axis.rank * layer.config.attention.num_heads // axis.size)
        if isinstance(layer.attention, Attention):
            _prepare_attention(layer.attention, axis)
        if isinstance(layer.mlp, MoE):
            layer.mlp.placement.set(NAME, balance_share=1.0 / axis.size)  # every rank routes the same tokens
    vocabulary = _Vocabulary.of(model.config.vocab_size, axis)
    if model.has_embedding:
        border(model.embedding.placement)
        model.embedding.placement.replace("lookup", NAME, vocabulary.lookup, compiles=True)
        if model.config.learned_positions and sequence:
            own = partial(differentiable.split_fwd_pad_bwd, group=axis.group, dim=1)
            model.position_embedding.placement.wrap("exit", NAME, after(own), compiles=True)
    if model.has_head:
        border(model.head.placement)
        model.head.placement.set(NAME, vocabulary=vocabulary)
    if model.has_head and model.config.score and sequence:
        model.score.placement.wrap("exit", NAME, after(partial(_all_tokens, axis=axis)), compiles=True)


def _all_tokens(values: Tensor, axis: _Axis) -> Tensor:
    """Values `[batch, seq]` of the tokens of all ranks, on which they compute the same."""
    return differentiable.all_gather_fwd_split_bwd(values, axis.group, 1, [values.shape[1]] * axis.size)


def _prepare_attention(module: Attention, axis: _Axis) -> None:
    if (groups := module.config.num_kv_heads) % axis.size:
        module.placement.set(NAME, slots=module.config.q_per_group * groups // axis.size + 2)
    scores = module.placement.scores
    if (slopes := scores.slopes) is not None:
        own = len(slopes) // axis.size
        module.placement.set(NAME, scores=replace(scores, slopes=slopes[axis.rank * own :][:own]))
    if module.config.qk_norm is not None and module.config.qk_norm.over == "all":
        for norm in (module.q_norm, module.k_norm):
            total = partial(differentiable.all_reduce_fwd_all_reduce_bwd, group=axis.group)
            norm.placement.set(NAME, sum_over_parts=total)


def _set_views(module: SpecifiedModule, axis: _Axis, summed: bool) -> None:
    """`summed`: gradients of replicated parameters are parts of a sum over ranks."""
    for name, spec in module.specs.items():
        parameter = getattr(module, name)
        assert isinstance(parameter, DTensor)
        if parameter.placements[-1] == Replicate():
            view, replicated = f"view_of_{name}", sharding.local_of_sum if summed else sharding.local
            module.placement.replace(view, NAME, replicated, instead_of=sharding.NAME, compiles=True)
            if spec.axes[0] == "kv_group":
                module.placement.wrap(view, NAME, after(_group_slots(spec, axis)), compiles=True)
    if isinstance(module, Linear) and _adds_parts(module):
        for adapter in module.low_ranks():
            total = partial(differentiable.all_reduce, group=axis.group)
            adapter.placement.replace("sum_over_parts", NAME, total, compiles=True)
    if module.specs.get("bias") is not None and _adds_parts(module):
        first = 1.0 if axis.rank == 0 else 0.0  # the sum over ranks has the bias once
        module.placement.wrap("view_of_bias", NAME, after(lambda bias: bias * first), compiles=True)


def _adds_parts(module: SpecifiedModule) -> bool:
    """Whether the results of a projection are parts of a sum over ranks: its input is sharded (row-parallel)."""
    return isinstance(module, Linear | StackedLinear) and ALONG.get(module.specs["weight"].axes[-1]) == "tp"


def _group_slots(spec: ParameterSpec, axis: _Axis) -> View:
    """Of `[kv_group, slot, ...]`, fewer groups than ranks: one group, some of its query heads, its key and value.

    Every rank keeps all groups, and computes only these. Adapters and prefixes may have some of the slots only."""
    groups, slots = spec.shape[:2]
    ranks_per_group = axis.size // groups
    own = (slots - {"slot": 2, "q_slot": 0, "kv_slot": slots}[spec.axes[1]]) // ranks_per_group  # query heads
    group, place = divmod(axis.rank, ranks_per_group)

    def cut(whole: Tensor) -> Tensor:
        mine = whole[group : group + 1]
        return torch.cat((mine[:, place * own : (place + 1) * own], mine[:, own * ranks_per_group :]), 1)

    return cut


def _set_border(placement: Placement, group: ProcessGroup, sequence: bool) -> None:
    """Activations outside of blocks are the same on all ranks; with sequence parallelism `[batch, seq / ranks, embed]`,
    of other tokens on every rank."""
    enter, leave = differentiable.identity_fwd_all_reduce_bwd, differentiable.all_reduce_fwd_identity_bwd
    if sequence:
        enter = partial(differentiable.all_gather_fwd_reduce_scatter_bwd, dim=1)
        leave = partial(differentiable.reduce_scatter_fwd_all_gather_bwd, dim=1)
    if "enter" in placement.hooks:
        placement.wrap("enter", NAME, before(partial(enter, group=group)), compiles=True)
    if "exit" in placement.hooks:
        placement.wrap("exit", NAME, after(partial(leave, group=group)), compiles=True)


@dataclass(frozen=True)
class _Vocabulary:
    """This rank's shard of the vocabulary, for embedding and head; shards may differ in size."""

    group: ProcessGroup
    start: int
    stop: int
    sizes: tuple[int, ...]  # of all shards

    @staticmethod
    def of(vocab_size: int, axis: _Axis) -> "_Vocabulary":
        start, stop = part_of(vocab_size, axis.rank, axis.size)
        parts = (part_of(vocab_size, rank, axis.size) for rank in range(axis.size))
        return _Vocabulary(axis.group, start, stop, tuple(end - begin for begin, end in parts))

    @property
    def rows(self) -> int:
        """Tokens of the largest shard."""
        return max(self.sizes)

    def lookup(self, index: Tensor, rows: Tensor) -> Tensor:
        """Zeros for tokens of other shards, so that the sum over ranks is the embedding."""
        here = (index >= self.start) & (index < self.stop)
        return F.embedding((index - self.start).clamp(0, len(rows) - 1), rows).masked_fill(~here[..., None], 0.0)

    def largest(self, x: Tensor) -> Tensor:
        return differentiable.all_reduce_max(x, self.group)

    def total(self, x: Tensor) -> Tensor:
        return differentiable.all_reduce(x, self.group)

    def join(self, logits: Tensor) -> Tensor:
        return differentiable.all_gather_fwd_split_bwd(logits, self.group, -1, self.sizes)
