"""Self-attention with query groups: multi-head, grouped-query and multi-query attention in one form.

Owns what stands between hidden states and an attention core: projections, norms, rotation, the cache."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from cordee.model import specs
from cordee.model.bound import Binding, BoundAttention, DecodeStep, require_known, require_plain
from cordee.model.config import AttentionConfig, ModelConfig, QKNormConfig
from cordee.model.inputs import Context
from cordee.model.linear import Linear
from cordee.model.norm import Norm
from cordee.model.parameter import SpecifiedModule
from cordee.model.placement import BlockPlacement
from cordee.ops.attention import AttentionCore, Scores, alibi_slopes, behind_prefix, sdpa_attention
from cordee.ops.mask import AttentionMask
from cordee.ops.rope import rotate, split_rotated


@dataclass(eq=False, kw_only=True)
class AttentionPlacement(BlockPlacement):
    """Of attention of every kind. A rank may compute some of the heads only: those from `first_head` on."""

    scores: Scores
    core: AttentionCore = sdpa_attention
    first_head: int = 0

    def scores_of(self, context: Context, dropout: float, layer: int, sinks: Tensor | None = None) -> Scores:
        """`scores` of one forward of a layer, with what drops its attention weights."""
        drop = context.dropout(dropout, layer, "attention weights", first_head=self.first_head)
        return self.scores if drop is None and sinks is None else replace(self.scores, sinks=sinks, dropout=drop)


@dataclass(eq=False, kw_only=True)
class GroupedPlacement(AttentionPlacement):
    """Of attention with query groups: `slots` is how many slots of a group are computed here."""

    slots: int


class Attention(SpecifiedModule[GroupedPlacement]):
    """q, k and v leave one GEMM over `[kv_group, slot, head_dim, embed]`; the slots are the group's q heads, k, v."""

    sinks: Tensor | None
    prefix: Tensor | None

    def __init__(self, config: AttentionConfig, model: ModelConfig, index: int, **factory):
        scores = Scores(
            scale=config.head_dim**-0.5 if config.scale is None else config.scale,
            window=config.window,
            chunk=config.chunk,
            softcap=config.softcap,
            slopes=alibi_slopes(config.num_heads) if config.alibi else None,
        )
        super().__init__(GroupedPlacement(scores=scores, slots=config.q_per_group + 2))
        self.config = config
        self.index = index
        self.dropout = model.attention_dropout
        own = specs.grouped_attention(config, model)
        self.qkv = Linear(specs.of_part(own, "qkv"), **factory)
        self.out = Linear(specs.of_part(own, "out"), **factory)
        if config.qk_norm is not None:
            self.q_norm = Norm(config.qk_norm.norm, *specs.qk_norm_dim(config, config.num_heads), **factory)
            self.k_norm = Norm(config.qk_norm.norm, *specs.qk_norm_dim(config, config.num_kv_heads), **factory)
        self.declare(own, "sinks", "prefix", **factory)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, seq, embed]` to the same."""
        return self.placement.call(self._forward, x, context)

    def _forward(self, x: Tensor, context: Context) -> Tensor:
        placement = self.placement
        q, k, v = self._project(placement.enter(x), context)
        scores = placement.scores_of(context, self.dropout, self.index, self.local("sinks"))
        y = context.attend(self.index, behind_prefix(placement.core, self.local("prefix")), q, k, v, scores)
        y = y.transpose(1, 2).flatten(2)  # [batch, seq, heads * head_dim]
        return placement.exit(self.out(y, drop=context.drop))

    def bind(self, binding: Binding) -> BoundAttention:
        config, index, scale = self.config, self.index, self.placement.scores.scale
        require_known(config, "num_heads num_kv_heads head_dim qkv_bias out_bias rope scale")
        require_plain(self, Attention, "qkv out")
        groups, heads, dim, half = config.num_kv_heads, config.q_per_group, config.head_dim, config.head_dim // 2
        rotation = binding.rotation(config.rope, dim, heads)
        qkv, out = self.qkv.bind(binding), self.out.bind_onto(binding)
        wide = self.qkv.weight.dtype == torch.float32  # as what rotates is

        def core(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, binding.bias(mask, q), scale=scale)

        def attend(residual: Tensor, x: Tensor, now: DecodeStep) -> Tensor:
            y = qkv(x).view(-1, groups, heads + 2, dim)
            if rotation is not None:
                cos, sin = now.angles[rotation]
                y = torch.addcmul(y * cos, y.roll(half, -1), sin)
                y = y if wide else y.to(x.dtype)
            # The heads of a group share its keys, as several queries would: [batch, groups, heads, head_dim].
            q, kv = y.split_with_sizes((heads, 2), 2)
            return out(now.step.cache.attend(index, q, kv.unsqueeze(3), now.step, core).flatten(1), residual)

        return attend

    def _project(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """q `[batch, heads, seq, head_dim]`; k and v `[batch, kv_heads, seq, head_dim]`, rotated by their positions."""
        dim = self.config.head_dim
        # [batch, seq, groups, slots, head_dim]
        qkv = self.qkv(x, drop=context.drop).unflatten(-1, (-1, self.placement.slots, dim))
        if self.config.qk_norm is not None:
            q, k = self._normed(qkv[..., :-1, :], self.config.qk_norm, context)
            v = qkv[..., -1, :]
        elif self.config.rope is not None:
            q, k, v = split_rotated(qkv, *context.positions.angles(self.config.rope, dim))
        else:
            q, k, v = qkv[..., :-2, :], qkv[..., -2, :], qkv[..., -1, :]
        if self.config.query_scaling is not None:
            scale = context.positions.query_scale(self.config.query_scaling)
            q = q if scale is None else (q * scale).to(q.dtype)
        q = q.flatten(2, 3)  # [batch, seq, heads, head_dim]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _rotate(self, x: Tensor, context: Context) -> Tensor:
        """x `[batch, seq, groups, slots, head_dim]`, rotated by its positions."""
        rope = self.config.rope
        return x if rope is None else rotate(x, *context.positions.angles(rope, self.config.head_dim))

    def _normed(self, qk: Tensor, config: QKNormConfig, context: Context) -> tuple[Tensor, Tensor]:
        """q `[batch, seq, groups, slots, head_dim]` and k `[batch, seq, groups, head_dim]`, normed and rotated."""
        if config.after_rope:
            qk = self._rotate(qk, context)
        q, k = qk[..., :-1, :], qk[..., -1:, :]
        if config.over == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        else:
            q = self.q_norm(q.flatten(2)).view(q.shape)
            k = self.k_norm(k.flatten(2)).view(k.shape)
        if not config.after_rope:
            q, k = self._rotate(q, context), self._rotate(k, context)
        return q, k.squeeze(3)
