"""Decoding straight over the weights, for models of the common form.

A step of one token is so little arithmetic that on small models most of its time goes into calling modules. Here the
same step is one function over the weights: views are made once, all heads of a group are queries of one attention, and
keys and values are written from where rotary positions leave them. `CachedDecoder` is the reference.

Owns this second way and which models it is for; every other model goes through its modules.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cordee.device import KINDS
from cordee.generate.decoder import CachedDecoder
from cordee.model.attention import Attention
from cordee.model.cache import LayerCache
from cordee.model.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    MLPConfig,
    ModelConfig,
    NormConfig,
    RopeConfig,
)
from cordee.model.gpt import GPTModel
from cordee.model.head import Head
from cordee.model.layer import Layer
from cordee.model.linear import Embedding, Linear
from cordee.model.mlp import MLP, activate
from cordee.model.norm import Norm
from cordee.model.placement import altered
from cordee.model.rotary import Positions, depends_on_length
from cordee.ops.gemm import fixed_linear, fixed_linear_onto

Turn = tuple[RopeConfig, int, int]  # a kind of rotary positions: what, over which head_dim, for how many heads a group
Function = Callable[[Tensor], Tensor]  # [batch, in] to [batch, out]


@dataclass(frozen=True)
class _Step:
    """What all layers of one step share: the place of the new token and the number of places filled with it, which of
    them each row sees (bool `[batch, 1, 1, filled]`, None: all), and cos and sin of every `Turn` of the model."""

    place: int
    filled: int
    visible: Tensor | None
    angles: list[tuple[Tensor, Tensor]]


Block = Callable[[Tensor, LayerCache, _Step], Tensor]


class StraightDecoder(CachedDecoder):
    """As `CachedDecoder`. The model must be one that `obstacle` finds nothing against, and not change meanwhile."""

    def __init__(self, model: GPTModel, max_length: int):
        super().__init__(model, max_length)
        self._blocks: list[Block] = []
        self._final_norm = _norm(model.final_norm)
        self._turns = [turn for turn in dict.fromkeys(_turn(layer.attention) for layer in model.config.layers) if turn]
        positions = Positions(torch.arange(max_length, device=model.embedding.weight.device)[None])
        self._tables = [_table(positions, *turn) for turn in self._turns]
        self._visible: Tensor | None = None  # bool [batch, 1, 1, max_length]; None: every row sees all places

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        logits = super().begin(prompts)
        self._blocks = [_block(layer, self._turns, len(prompts)) for layer in self._model.own_layers()]
        self._visible = None
        if self._positions is not None:
            lengths = self._positions + 1  # [batch, 1]
            places = torch.arange(self._max_length, device=lengths.device)
            self._visible = (places >= max(map(len, prompts)) - lengths)[:, None, None]
        return logits

    def extend(self, tokens: Tensor) -> Tensor:
        cache = self._cache
        assert cache is not None, "extend before begin"
        cache.check_room(1)
        if self._positions is not None:
            self._positions = self._positions + 1
        step = self._step(cache.length)
        x = self._embed(tokens, cache.length)
        for block, layer_cache in zip(self._blocks, cache.layers, strict=True):
            x = block(x, layer_cache, step)
        cache.advance(1)
        return self._model.head.logits(self._final_norm(x))

    def keep(self, rows: Tensor) -> None:
        super().keep(rows)
        if self._visible is not None:
            self._visible = self._visible[rows]

    def _step(self, place: int) -> _Step:
        visible = None if self._visible is None else self._visible[..., : place + 1]
        if self._positions is None:
            angles = [(cos[place : place + 1], sin[place : place + 1]) for cos, sin in self._tables]
        else:
            rows = self._positions[:, 0]
            angles = [(cos[rows], sin[rows]) for cos, sin in self._tables]
        return _Step(place, place + 1, visible, angles)

    def _embed(self, tokens: Tensor, place: int) -> Tensor:
        x = F.embedding(tokens, self._model.embedding.weight)  # [batch, embed]
        if not self._model.config.learned_positions:
            return x
        table = self._model.position_embedding.weight
        return x + (table[place] if self._positions is None else table[self._positions[:, 0]])


# ---- one layer -------------------------------------------------------------------------------------------------------


def _block(layer: nn.Module, turns: list[Turn], rows: int) -> Block:
    assert isinstance(layer, Layer)
    attention_norm, mlp_norm = _norm(layer.attention_norm), _norm(layer.mlp_norm)
    attend, feed_forward = _attention(layer.attention, turns, rows), _mlp(layer.mlp, rows)

    def block(x: Tensor, cache: LayerCache, step: _Step) -> Tensor:
        x = attend(x, attention_norm(x), cache, step)
        return feed_forward(x, mlp_norm(x))

    return block


def _attention(
    attention: nn.Module, turns: list[Turn], rows: int
) -> Callable[[Tensor, Tensor, LayerCache, _Step], Tensor]:
    assert isinstance(attention, Attention)
    config, scale = attention.config, attention.placement.scores.scale
    groups, heads, dim = config.num_kv_heads, config.q_per_group, config.head_dim
    half = dim // 2
    turn = None if (kind := _turn(config)) is None else turns.index(kind)
    qkv, out = fixed_linear(*_matrix(attention.qkv), rows), fixed_linear_onto(*_matrix(attention.out), rows)

    def attend(residual: Tensor, x: Tensor, cache: LayerCache, step: _Step) -> Tensor:
        y = qkv(x).view(-1, groups, heads + 2, dim)
        if turn is not None:
            cos, sin = step.angles[turn]
            y = torch.addcmul(y * cos, y.roll(half, -1), sin).to(y.dtype)
        cache.keys.select(2, step.place).copy_(y.select(2, heads))
        cache.values.select(2, step.place).copy_(y.select(2, heads + 1))
        # The heads of a group share its keys, as queries at several places would: [batch, groups, heads, head_dim].
        k, v = cache.keys.narrow(2, 0, step.filled), cache.values.narrow(2, 0, step.filled)
        y = F.scaled_dot_product_attention(y.narrow(2, 0, heads), k, v, step.visible, scale=scale)
        return out(y.flatten(1), residual)

    return attend


def _mlp(mlp: nn.Module, rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    assert isinstance(mlp, MLP)
    config = mlp.config
    up = fixed_linear(*_matrix(mlp.gate_up if config.gated else mlp.up), rows)
    down = fixed_linear_onto(*_matrix(mlp.down), rows)
    return lambda residual, x: down(activate(up(x), config), residual)


def _matrix(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight `[out, in]` and bias `[out]`."""
    assert isinstance(module, Linear)
    bias = None if module.bias is None else module.bias.detach().flatten()
    return module.weight.detach().flatten(0, -2), bias


def _norm(module: nn.Module) -> Function:
    assert isinstance(module, Norm) and module.weight is not None
    weight, size, eps = module.weight.detach(), module.size, module.config.eps
    if module.config.kind == "layer" or KINDS[weight.device.type].fused_rms_norm or weight.dtype != torch.float32:
        return module
    # Where torch's RMS norm is a series of operators, this is a shorter one: x / sqrt(x.x / n + eps) is the same as
    # x sqrt(n) / hypot(|x|, sqrt(n eps)).
    scaled, least = weight * math.sqrt(size), torch.tensor(math.sqrt(size * eps))
    return lambda x: (x * scaled).div_(torch.hypot(torch.linalg.vector_norm(x, 2, -1, True), least))


def _turn(config: AttentionConfig | LatentAttentionConfig) -> Turn | None:
    assert isinstance(config, AttentionConfig)
    return None if config.rope is None else (config.rope, config.head_dim, config.q_per_group)


def _table(positions: Positions, rope: RopeConfig, head_dim: int, heads: int) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions, float32 `[positions, 1, heads + 2, head_dim]`.

    x cos + roll(x) sin turns the queries and the key of a group, and leaves its value as it is.
    """
    half_cos, half_sin = (half[0, :, 0] for half in positions.angles(rope, head_dim))  # [positions, 1, head_dim / 2]
    cos = torch.cat((half_cos, half_cos), -1).expand(-1, heads + 1, -1)
    sin = torch.cat((-half_sin, half_sin), -1).expand(-1, heads + 1, -1)
    return F.pad(cos, (0, 0, 0, 1), value=1.0)[:, None], F.pad(sin, (0, 0, 0, 1))[:, None]


# ---- for which models ------------------------------------------------------------------------------------------------

# What may differ between models of the common form. Anything else that a configuration sets is an obstacle, also what
# may be added to it later. The head is called as a module, so that what concerns it alone may be of any form.
_KNOWN = {
    ModelConfig: """vocab_size hidden_size max_position_embeddings layers final_norm learned_positions
        tie_word_embeddings norm_head logit_scale logit_softcap embedding_dropout attention_dropout hidden_dropout
        init_std""",
    LayerConfig: "attention mlp norm",
    AttentionConfig: "num_heads num_kv_heads head_dim qkv_bias out_bias rope scale",
    MLPConfig: "ffn_hidden_size activation gated bias limit",
    NormConfig: "kind eps",
}
_PARTS = (GPTModel, nn.ModuleDict, nn.Parameter, Layer, Attention, MLP, Linear, Norm, Embedding, Head)


def obstacle(model: GPTModel) -> str | None:
    """Why a model cannot be decoded straight over its weights; None if it can."""
    if (why := _uncommon(model.config)) is not None:
        return why
    if not (model.has_embedding and model.has_head):
        return "its layers are not all here"
    for part in (*model.modules(), *model.parameters()):
        if type(part) not in _PARTS:
            return f"it has a {type(part).__name__}"
    return altered(model)


def _uncommon(config: ModelConfig) -> str | None:
    """What in a configuration is not of the common form."""
    layers = dict.fromkeys(config.layers)
    parts = [config, config.final_norm, *(part for x in layers for part in (x, x.attention, x.mlp, x.norm))]
    for part in parts:
        if type(part) not in _KNOWN:
            return f"it has a {type(part).__name__}"
        known = _KNOWN[type(part)].split()
        for field in fields(part):
            if field.name not in known and getattr(part, field.name) != field.default:
                return f"its {type(part).__name__} has {field.name}"
    attentions = [layer.attention for layer in layers if isinstance(layer.attention, AttentionConfig)]
    ropes = [(attention.rope, attention.head_dim) for attention in attentions]
    if any(rope and (depends_on_length(rope) or rope.rotary_dim not in (None, dim)) for rope, dim in ropes):
        return "its rotary positions are partial, or change with the length"
    return None
