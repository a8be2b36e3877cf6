"""Multi-head latent attention: keys and values of all heads from one compressed vector a token (DeepSeek-V2, 2024).

Two forms of the same sum. Over a whole sequence, keys and values are expanded for every head. For tokens that
continue a cache, which holds nothing but the compressed vectors, the expansion moves to the other side of the
products: queries are brought into the compressed space, where all heads share one key, and what they gather there
is expanded afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cordee.model.attention import AttentionPlacement, Context, weight_dropout
from cordee.model.config import LatentAttentionConfig, ModelConfig
from cordee.model.linear import Linear, scaled_std
from cordee.model.norm import Norm
from cordee.model.parameter import ParameterSpec, SpecifiedModule
from cordee.model.placement import altered
from cordee.ops.attention import Scores
from cordee.ops.rope import rotate


class LatentAttention(SpecifiedModule[AttentionPlacement]):
    """Dims of a head: first those without, then those with rotary positions; `kv_up` gives its keys, then values."""

    prefix: Tensor | None

    def __init__(self, config: LatentAttentionConfig, model: ModelConfig, index: int, **factory):
        super().__init__(AttentionPlacement(scores=Scores(scale=config.scale)))
        self.config = config
        self.index = index
        self.dropout = model.attention_dropout
        self._build_queries(model, factory)
        latent, rope = config.kv_lora_rank, config.rope_head_dim
        plain = {"std": model.init_std, **factory}
        self.kv_down = Linear((latent + rope,), ("latent",), model.hidden_size, "embed", bias=config.bias, **plain)
        self.kv_norm = Norm(config.norm, latent, "latent", **factory)
        shape = (config.num_heads, config.nope_head_dim + config.v_head_dim)
        self.kv_up = Linear(shape, ("heads", "head_dim"), latent, "latent", bias=False, **plain)
        self.out = Linear(
            (model.hidden_size,),
            ("embed",),
            config.num_heads * config.v_head_dim,
            "heads",
            bias=config.bias,
            std=scaled_std(model.init_std, model.num_layers),
            **factory,
        )
        # As tokens leave it to later ones: compressed, and a rotary key.
        shape, axes = (model.num_prefix_tokens, latent + rope), ("virtual", "latent")
        prefix = ParameterSpec(shape, axes, std=model.init_std, origin="adapter")
        self.declare("prefix", prefix if model.num_prefix_tokens else None, **factory)

    def _build_queries(self, model: ModelConfig, factory: dict) -> None:
        config, rank = self.config, self.config.q_lora_rank
        shape, axes = (config.num_heads, config.nope_head_dim + config.rope_head_dim), ("heads", "head_dim")
        plain = {"std": model.init_std, **factory}
        if rank is None:
            self.q = Linear(shape, axes, model.hidden_size, "embed", bias=False, **plain)
            return
        self.q_down = Linear((rank,), ("latent",), model.hidden_size, "embed", bias=config.bias, **plain)
        self.q_norm = Norm(config.norm, rank, "latent", **factory)
        self.q_up = Linear(shape, axes, rank, "latent", bias=False, **plain)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """`[batch, seq, embed]` to the same."""
        return self.placement.call(self._forward, x, context)

    def _forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.placement.enter(x)
        q_nope, q_rope = self._queries(x, context)
        latent, k_rope = self._compressed(x, context)
        cache = context.cache
        if cache is not None:
            stored = torch.cat((latent, k_rope), -1)[:, None]  # [batch, 1, seq, latent + rope]
            stored, _ = cache.layers[self.index].append(stored, stored[..., :0], cache.length)
            if cache.length:
                if altered(self.kv_up, honoured=("views.weight", "views.a", "views.b")) is None:
                    stored = self._behind_prefix(stored, 0)
                    return self.placement.exit(self.out(self._absorbed(q_nope, q_rope, stored, context)))
                latent, k_rope = stored[:, 0].split((self.config.kv_lora_rank, self.config.rope_head_dim), -1)
        latent, k_rope = self._behind_prefix(latent, 0), self._behind_prefix(k_rope, latent.shape[-1])
        y = self._expanded(q_nope, q_rope, latent, k_rope, context)
        return self.placement.exit(self.out(y, drop=context.drop))

    def _queries(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """`[batch, seq, heads, nope_head_dim]` and, turned by their positions, `[batch, seq, heads, rope_head_dim]`."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q(x, drop=context.drop)
        else:
            q = self.q_up(self.q_norm(self.q_down(x, drop=context.drop)), drop=context.drop)
        q = q.unflatten(-1, (-1, config.nope_head_dim + config.rope_head_dim))
        return q[..., : config.nope_head_dim], self._rotate(q[..., config.nope_head_dim :], context)

    def _compressed(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """What a token leaves to later ones: `[batch, seq, latent]`, and a rotary key `[batch, seq, rope_head_dim]`."""
        kv = self.kv_down(x, drop=context.drop)
        latent, k_rope = kv.split((self.config.kv_lora_rank, self.config.rope_head_dim), -1)
        return self.kv_norm(latent), self._rotate(k_rope[:, :, None], context)[:, :, 0]

    def _rotate(self, x: Tensor, context: Context) -> Tensor:
        """x `[batch, seq, heads, rope_head_dim]`, turned by its positions."""
        cos, sin = context.positions.angles(self.config.rope, self.config.rope_head_dim)
        return rotate(x, cos.squeeze(3), sin.squeeze(3))

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, context: Context) -> Tensor:
        """Attention with keys and values of every head; `[batch, seq, heads * v_head_dim]`."""
        nope, values = self.config.nope_head_dim, self.config.v_head_dim
        kv = self.kv_up(latent, drop=context.drop).unflatten(-1, (-1, nope + values))
        k_nope, v = kv.split((nope, values), -1)
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, k_nope.shape[2], -1)), -1)
        q = torch.cat((q_nope, q_rope), -1)
        y = self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), context)
        return y.transpose(1, 2).flatten(2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, stored: Tensor, context: Context) -> Tensor:
        """Attention in the compressed space, over `stored` `[batch, 1, keys, latent + rope]`; as `_expanded`."""
        kv_up = self.kv_up.merged(self.kv_up.local("weight"))
        key_up, value_up = kv_up.split((self.config.nope_head_dim, self.config.v_head_dim), 1)
        q = torch.cat((torch.einsum("bshd,hdr->bhsr", q_nope, key_up), q_rope.transpose(1, 2)), -1)
        y = self._attend(q, stored, stored, context)[..., : self.config.kv_lora_rank]
        return torch.einsum("bhsr,hdr->bshd", y, value_up).flatten(2)

    def _behind_prefix(self, x: Tensor, first: int) -> Tensor:
        """x `[batch, ..., keys, channels]` with the prefix before it, of which x has the channels from `first` on."""
        if (prefix := self.local("prefix")) is None:
            return x
        prefix = prefix[:, first : first + x.shape[-1]]
        return torch.cat((prefix.expand(*x.shape[:-2], -1, -1), x), -2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        dropout = weight_dropout(context, self.dropout, self.index, self.placement.first_head)
        return self.placement.core(q, k, v, context.mask, self.placement.scores, dropout=dropout)
